"""Where what is made on this computer lives, unless told otherwise: outside the checkout, and apart by model."""

import hashlib
import os
import re
from pathlib import Path

from core.spec import ModelSpec


def cache_folder(name: str) -> Path:
    """The folder of one command's runs or results."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return cache / "interpretable-diffusion" / name


def collections_folder(spec: ModelSpec) -> Path:
    """Where `python -m training sae` puts finished collections of a model's autoencoders, and where the app looks."""
    return cache_folder("collections") / model_key(spec)


def model_key(spec: ModelSpec) -> str:
    """A model as the name of a folder: readable, and another for each source and revision."""
    folder = Path(spec.source).expanduser()
    source = str(folder.resolve()) if folder.is_dir() else f"{spec.source}@{spec.revision}"
    readable = re.sub(r"[^\w.-]+", "--", spec.name)
    return f"{readable}-{hashlib.sha256(source.encode()).hexdigest()[:8]}"
