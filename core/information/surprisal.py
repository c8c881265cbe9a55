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

TABLE = Path(__file__).parents[1] / "picturebook" / "surprisals.json"


@cache
def _table() -> dict[str, float]:
    table: dict[str, float] = json.loads(TABLE.read_text())
    return table


def load_surprisal(model_name: str) -> Callable[[str], float] | None:
    """Bits of a word's surprisal, by word, infinite for one that is never met; None where nothing tells them."""
    if model_name == "picturebook":
        return lambda word: _table().get(word, math.inf)
    if find_spec("wordfreq") is None:
        return None
    frequency = import_module("wordfreq").word_frequency
    return lambda word: -math.log2(p) if (p := frequency(word, "en")) else math.inf
