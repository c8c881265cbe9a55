"""Results of evaluations, kept by the hash of what they depend on: asked again of the same model, they cost nothing."""

import hashlib
import json
import logging
import re
from collections.abc import Callable
from dataclasses import asdict, is_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from core.files import write_text
from training.common.report import Table

HERE = Path(__file__).parent

log = logging.getLogger(__name__)


def fingerprint(module: ModuleType, folders: list[Path], *depends: Any) -> str:
    """Hash of all weights in `folders`, of `depends` (dataclasses or JSON-able), and of an evaluation's own code.

    Its code is its module and what that imports of this package, and so on: another evaluation changes nothing.
    """
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted(folder.rglob("*.safetensors")):
            digest.update(path.relative_to(folder).as_posix().encode())
            digest.update(path.read_bytes())
    for value in depends:
        plain = asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
        digest.update(json.dumps(plain, sort_keys=True).encode())
    for source in _sources(module.__name__.rpartition(".")[2]):
        digest.update(source.encode())
    return digest.hexdigest()[:16]


def _sources(name: str) -> list[str]:
    """The text of a module of this package and of all that it imports of it, in the order of their names."""
    texts: dict[str, str] = {}
    wanted = [name]
    while wanted:
        if (one := wanted.pop()) not in texts:
            texts[one] = (HERE / f"{one}.py").read_text(encoding="utf-8")
            wanted += re.findall(r"^from training\.evaluate\.(\w+) import", texts[one], re.MULTILINE)
    return [texts[one] for one in sorted(texts)]


def cached(folder: Path, name: str, key: str, make: Callable[[], Table]) -> Table:
    """The table of this name and key from `folder`, made and put there if it is missing."""
    path = folder / f"{name}-{key}.json"
    if path.exists():
        log.info("%s: measured before (%s)", name, path)
        return Table(**json.loads(path.read_text(encoding="utf-8")))
    table = make()
    folder.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(asdict(table), indent=1))
    return table
