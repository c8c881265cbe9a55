"""Recipes: frozen dataclasses written as JSON. What a recipe leaves out has its default; unknown names are refused."""

import json
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

Config = TypeVar("Config")


def read_recipe(kind: type[Config], path: Path) -> Config:
    """A recipe: JSON with the fields of the dataclass `kind`; what it leaves out has its default.

    Raises:
        ValueError: It is not JSON, or a name in it is not a field.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a recipe: {error}") from error
    config = _fill(kind, values, path.name)
    assert isinstance(config, kind)
    return config


def _fill(kind: Any, values: dict[str, Any], where: str) -> Any:
    known = {f.name for f in fields(kind)}
    if unknown := set(values) - known:
        raise ValueError(f"{where}: {sorted(unknown)} is not among {sorted(known)}")
    hints = get_type_hints(kind)
    filled = {}
    for name, value in values.items():
        if is_dataclass(hints[name]) and isinstance(hints[name], type):
            filled[name] = _fill(hints[name], value, f"{where}: {name}")
        else:
            filled[name] = tuple(value) if isinstance(value, list) else value
    return kind(**filled)
