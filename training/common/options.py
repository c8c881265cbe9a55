"""Command-line options from the fields of a dataclass: name, type, default and help are written once, at the field.

Of the libraries for this, tyro 1.0 makes 38 options of the one mapping among `LabelConfig`'s fields, simple_parsing
0.1.9 fails on a docstring with a per cent sign, and both want a parser of their own in place of argparse's.
"""

import argparse
import ast
import inspect
import textwrap
from collections.abc import Iterable
from dataclasses import fields
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints


def add_field_options(parser: argparse.ArgumentParser, kind: type, names: Iterable[str], **defaults: Any) -> None:
    """Add an option for each of the named fields of the dataclass `kind`: `--batch-size` for `batch_size`.

    Args:
        parser: Gets the options.
        kind: A dataclass whose fields have docstrings.
        names: Fields of type str, int, float, Path, a Literal, one of these or None, or a tuple of one of these.
        defaults: Defaults that differ on the command line from the field's own.
    """
    hints, texts, by_name = get_type_hints(kind), field_docstrings(kind), {f.name: f for f in fields(kind)}
    for name in names:
        hint: Any = next((arg for arg in get_args(hints[name]) if arg is not NoneType), hints[name])
        choices = get_args(hints[name]) if get_origin(hints[name]) is Literal else None
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=str if choices else hint,
            choices=choices,
            nargs="*" if get_origin(hints[name]) is tuple else None,
            default=defaults.get(name, by_name[name].default),
            help=texts[name].replace("%", "%%"),
        )


def field_values(arguments: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """What was given for the named fields, as keyword arguments of their dataclass."""
    given = {name: getattr(arguments, name) for name in names}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}


def field_docstrings(kind: type) -> dict[str, str]:
    """The string literal under each field of a class, on one line, without the final full stop."""
    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(body, ast.ClassDef)
    texts = {}
    for field, below in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr):
            texts[field.target.id] = " ".join(ast.literal_eval(below.value).split()).removesuffix(".")
    return texts
