"""How rare words are: the bits it takes to guess a word where nothing else is known. Imports no torch.

Of the embedded model's words its own captions tell, in a table made with the model. Of other models' the package
`wordfreq` tells, if somebody has installed it: how often a word comes up in English text.
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
"""The table among a model's assets."""


@cache
def _read(path: Path) -> dict[str, float]:
    table: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))
    return table


def load_surprisal(spec: ModelSpec) -> Callable[[str], float] | None:
    """Bits of a word's surprisal, by word, infinite for one that is never met; None where nothing tells them."""
    if spec.assets is not None:
        table = _read(spec.assets / TABLE)
        return lambda word: table.get(word, math.inf)
    if find_spec("wordfreq") is None:
        return None
    frequency = import_module("wordfreq").word_frequency
    return lambda word: -math.log2(p) if (p := frequency(word, "en")) else math.inf
