"""Where commands keep what they make on the way: outside the checkout."""

import os
from pathlib import Path


def cache_folder(name: str) -> Path:
    """The folder of one command's runs or results."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return cache / "interpretable-diffusion" / name
