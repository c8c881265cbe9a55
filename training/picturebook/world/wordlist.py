"""The grammar's words by kind, for a page that offers them."""

import json
from pathlib import Path
from typing import Any

from core.files import write_text
from training.picturebook.world.captions import RELATIONS
from training.picturebook.world.world import BACKGROUNDS, NOUNS, STYLES

WORDLIST = "words.json"
"""File name among the model's assets, which the page reads."""
N_SWAPS = 3
"""Nouns offered in the place of a noun."""


def wordlist() -> dict[str, Any]:
    """Objects with words to swap them for, backgrounds with their preposition, styles and relations."""
    return {
        "objects": [{"words": noun.words, "swaps": _swaps(i)} for i, noun in enumerate(NOUNS)],
        "backgrounds": [
            {"words": background.words, "preposition": background.preposition} for background in BACKGROUNDS
        ],
        "styles": STYLES[1:],
        "relations": RELATIONS,
    }


def _swaps(index: int) -> list[str]:
    """The nearest nouns in the order of their declaration, which goes from animals over plants to things in the sky."""
    others = sorted((i for i in range(len(NOUNS)) if i != index), key=lambda i: (abs(i - index), -i))
    return [NOUNS[i].name for i in others[:N_SWAPS]]


def write_wordlist(path: Path) -> None:
    """Store the words as JSON."""
    write_text(path, json.dumps(wordlist(), indent=1) + "\n")
