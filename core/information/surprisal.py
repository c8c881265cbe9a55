"""The surprisal of words: -log2 of a word's frequency without any context, in bits. Imports no torch.

The embedded model comes with a table made from its training captions. For other models, frequencies in English text
come from the package `wordfreq`, if it is installed.
"""

import json
import math
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from core.spec import ModelSpec

TABLE = "surprisals.json"
"""Name of the table in the folder of a model's assets."""


@cache
def _read(path: Path) -> dict[str, float]:
    table: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))
    return table


def load_surprisal(spec: ModelSpec) -> Callable[[str], float] | None:
    """A function from a word to its surprisal in bits; None if the model has no table and `wordfreq` is not installed.

    The surprisal of a word that never occurs is infinite.
    """
    if spec.assets is not None:
        table = _read(spec.assets / TABLE)
        return lambda word: table.get(word, math.inf)
    if find_spec("wordfreq") is None:
        return None
    frequency = import_module("wordfreq").word_frequency
    return lambda word: -math.log2(p) if (p := frequency(word, "en")) else math.inf
