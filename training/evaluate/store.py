"""Results of evaluations, kept by the hash of what they depend on: asked again of the same model, they cost nothing."""

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from training.report import Table

HERE = Path(__file__).parent

log = logging.getLogger(__name__)


def fingerprint(folders: list[Path], *depends: Any) -> str:
    """Hash of all weights in `folders`, of `depends` (dataclasses or JSON-able), and of the evaluations' own code."""
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted(folder.rglob("*.safetensors")):
            digest.update(path.relative_to(folder).as_posix().encode())
            digest.update(path.read_bytes())
    for value in depends:
        plain = asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
        digest.update(json.dumps(plain, sort_keys=True).encode())
    for path in sorted(HERE.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def kept(folder: Path, name: str, key: str, make: Callable[[], Table]) -> Table:
    """The table of this name and key from `folder`, made and put there if it is missing."""
    path = folder / f"{name}-{key}.json"
    if path.exists():
        log.info("%s: measured before (%s)", name, path)
        return Table(**json.loads(path.read_text()))
    table = make()
    folder.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(asdict(table), indent=1))
    part.replace(path)
    return table
