"""What callers hand over, made uniform: one thing where several are meant, and seeds. Imports no torch."""

import operator
from collections.abc import Iterable
from typing import Any

N_SEEDS = 2**64
"""Seeds lie from 0 to this, exclusive: what a generator of torch tells apart."""


def as_items(given: Any) -> tuple[Any, ...]:
    """The items that were given, or the one that was: a text is one item, never its letters."""
    if isinstance(given, str) or not isinstance(given, Iterable):
        return (given,)
    return tuple(given)


def as_seed(seed: Any) -> int:
    """A seed of any integer type, such as numpy's, as Python's own.

    Raises:
        ValueError: It is no whole number from 0 to 2**64 - 1; the message shows it.
    """
    try:
        number = int(seed) if isinstance(seed, float) and seed.is_integer() else operator.index(seed)
    except TypeError:
        number = -1
    if isinstance(seed, bool) or not 0 <= number < N_SEEDS:
        raise ValueError(f"A seed is a whole number from 0 to 2**64 - 1, not {str(seed)[:40]!r}.")
    return number
