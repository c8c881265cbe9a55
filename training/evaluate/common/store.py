"""Tables of evaluations, cached by the hash of everything they depend on: an evaluation is not repeated for nothing."""

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

import training.picturebook.world
from core.files import write_text
from training.common.report import Table
from training.common.sources import CORE, source_digest

CODE = (CORE, Path(__file__).parents[1], Path(training.picturebook.world.__file__).parent)
"""Packages whose code decides the results: the engine, the evaluations, and the world of their scenes."""
WEIGHTS = (".safetensors", ".parquet", ".json")
"""Suffixes of the files of a model or a collection that decide the results."""

log = logging.getLogger(__name__)


def fingerprint(folders: Sequence[Path], *values: Any) -> str:
    """Hash of all weights, tables and configs in `folders`, of `values` (dataclasses or JSON), and of `CODE`."""
    digest = hashlib.sha256(_code().encode())
    for folder in folders:
        for path in sorted(path for path in folder.rglob("*") if path.suffix in WEIGHTS):
            digest.update(path.relative_to(folder).as_posix().encode())
            digest.update(path.read_bytes())
    for value in values:
        plain = asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
        digest.update(json.dumps(plain, sort_keys=True).encode())
    return digest.hexdigest()[:16]


@cache
def _code() -> str:
    return source_digest(CODE)


def cached(path: Path, make: Callable[[], Table]) -> Table:
    """The table stored in a JSON file; made and stored there if the file is missing."""
    if path.exists():
        log.info("%s: cached result", path)
        return Table(**json.loads(path.read_text(encoding="utf-8")))
    table = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(asdict(table), indent=1))
    return table
