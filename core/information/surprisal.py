"""What words can tell at most, and how much more a model says they tell. Imports no torch.

A perfect model would give a word at most -log2 of its probability under the condition, in direct bits, on any image:
log p(x | word, rest) / p(x | rest) = log p(word | x, rest) / p(word | rest). What lies above is the model's own error.

The embedded model comes with tables made from the grammar of its captions and from held-out scenes. For other models,
frequencies in English text come from the package `wordfreq`, if it is installed.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from core.information.results import Given
from core.spec import ModelSpec

TABLE = "surprisals.json"
"""Name of the table of surprisals without context in the folder of a model's assets."""
CEILINGS = "ceilings.json"
"""Name of the table of words' kinds and of what they can tell beyond the rest of a caption."""
EXCESS = "excess.json"
"""Name of the table of what the model says beyond that, by kind of word."""


class Ceiling(NamedTuple):
    """What a word can tell beyond the rest of a caption, in bits."""

    kind: str
    """`object`, `background`, `style` or `relation`."""
    bits: float
    """Mean over captions."""
    most: float
    """The most in any caption."""


class Excess(NamedTuple):
    """Direct bits that words of a kind got beyond what they can tell: the mean over held-out true scenes."""

    bits: float
    """At least this much of a word's bits is the model's error, on average."""
    low: float
    """95 % interval of the mean: its lower end."""
    high: float
    """Its upper end."""
    n_words: int
    """Words measured."""
    half_width: float | None
    """Half-width of a 95 % interval of one word in one image after `bits` are subtracted. None where that was not shown
    to cover held-out words, or is wider than what is known without measuring, so that no image is to be corrected."""


@cache
def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def load_surprisal(spec: ModelSpec) -> Callable[[str], float] | None:
    """A function from a word to its surprisal in bits; None if the model has no table and `wordfreq` is not installed.

    The surprisal of a word that never occurs is infinite.
    """
    if spec.assets is not None:
        table: dict[str, float] = _read(spec.assets / TABLE)
        return lambda word: table.get(word, math.inf)
    if find_spec("wordfreq") is None:
        return None
    frequency = import_module("wordfreq").word_frequency
    return lambda word: -math.log2(p) if (p := frequency(word, "en")) else math.inf


def load_ceilings(spec: ModelSpec) -> Mapping[str, Ceiling]:
    """What each word can tell beyond the rest of a caption; empty if the model has no such table."""
    table = None if spec.assets is None else _read(spec.assets / CEILINGS)
    return {word: Ceiling(*entry) for word, entry in (table or {}).items()}


def ceiling(spec: ModelSpec, word: str, given: Given) -> float | None:
    """The most direct bits that a perfect model could give a word, on any image; None where that is not known.

    Args:
        spec: The model's; only those with assets have a grammar.
        word: Lower case.
        given: The condition: for the `rest` of the prompt the most in any caption, for `nothing` the word's surprisal.
    """
    if given == "rest":
        entry = load_ceilings(spec).get(word)
        return None if entry is None else entry.most
    surprisal = None if spec.assets is None else load_surprisal(spec)
    bits = math.inf if surprisal is None else surprisal(word)
    return bits if math.isfinite(bits) else None


def load_excess(spec: ModelSpec) -> Mapping[str, Excess]:
    """The excess by kind of word, given the rest; empty if it was not measured on these weights."""
    table = None if spec.assets is None else _read(spec.assets / EXCESS)
    if table is None or table["unet"] != unet_digest(Path(spec.source)):
        return {}
    return {kind: Excess(**entry) for kind, entry in table["kinds"].items()}


@cache
def unet_digest(folder: Path) -> str:
    """SHA-256 of the weights of the U-Net in a model's folder; empty if there are none."""
    digest = hashlib.sha256()
    files = sorted((folder / "unet").glob("*.safetensors"))
    for path in files:
        digest.update(path.read_bytes())
    return digest.hexdigest() if files else ""
