"""Recipes: frozen dataclasses written as JSON. A missing key has its default; an unknown key is an error."""

import difflib
import json
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

Config = TypeVar("Config")


def read_recipe(kind: type[Config], path: Path) -> Config:
    """Read a JSON file with the fields of the dataclass `kind`.

    Raises:
        ValueError: It cannot be read or is not JSON, a key is unknown or missing, or a value has the wrong type.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a recipe: {error}") from error
    config = _fill(kind, values, path.name)
    assert isinstance(config, kind)
    return config


def _fill(kind: Any, values: Any, where: str) -> Any:
    """The dataclass `kind` from a JSON object; `where` begins the message of an error."""
    if not isinstance(values, dict):
        raise ValueError(f"{where}: {values!r} is not a JSON object with keys.")
    known = {f.name: f for f in fields(kind)}
    if unknown := set(values) - set(known):
        near = difflib.get_close_matches(min(unknown), known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{where}: {sorted(unknown)} is not among {sorted(known)}.{hint}")
    required = [name for name, f in known.items() if f.default is MISSING and f.default_factory is MISSING]
    if missing := [name for name in required if name not in values]:
        raise ValueError(f"{where}: {missing} is missing.")
    hints = get_type_hints(kind)
    filled = {}
    for name, value in values.items():
        if is_dataclass(hints[name]):
            filled[name] = _fill(hints[name], value, f"{where}: {name}")
        elif not _fits(value, hints[name]):
            raise ValueError(f"{where}: {name} is {value!r}, not {_readable(hints[name])}.")
        else:
            filled[name] = tuple(value) if isinstance(value, list) else value
    try:
        return kind(**filled)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _fits(value: Any, hint: Any) -> bool:
    """Whether a JSON value has the type of a field; lists stand for tuples, whole numbers for floats too."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return value in args
    if origin in (Union, UnionType):
        return any(_fits(value, arg) for arg in args)
    if origin is tuple:
        n = len(value) if args[-1] is ... and isinstance(value, list) else len(args)
        return isinstance(value, list) and len(value) == n and all(_fits(v, args[0]) for v in value)
    if origin is not None:  # a mapping or a sequence
        return isinstance(value, dict if len(args) == 2 else list)
    if isinstance(value, bool) or hint is bool:
        return isinstance(value, bool) and hint is bool
    return isinstance(value, (int, float) if hint is float else hint)


def _readable(hint: Any) -> str:
    """A type hint in words of JSON."""
    if get_origin(hint) is Literal:
        return " or ".join(map(json.dumps, get_args(hint)))
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(_readable(arg) for arg in get_args(hint))
    if get_origin(hint) is tuple:
        return f"a list of {_readable(get_args(hint)[0])}"
    names = {int: "a whole number", float: "a number", str: "a string", bool: "true or false", NoneType: "null"}
    return names.get(hint, str(hint))
