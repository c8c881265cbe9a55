"""Hashes of source code: what was computed by other code is not reused."""

import hashlib
from collections.abc import Collection, Sequence
from pathlib import Path

import core

CORE = Path(core.__file__).parent
"""The engine's package."""
PAGE = CORE / "ui"
"""The web page, on which no measured figure depends."""


def source_digest(folders: Sequence[Path], exclude: Collection[Path] = (PAGE,)) -> str:
    """SHA-256 of the names and texts of all Python files under some folders, those under `exclude` left out."""
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            if not any(path.is_relative_to(other) for other in exclude):
                digest.update(f"{folder.name}/{path.relative_to(folder).as_posix()}".encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()
