"""Word dropout: texts with some of a caption's words, of the kinds that attribution compares.

Partial texts are made by the functions that attribution uses. Otherwise they would be out of distribution for the
denoiser, and what it does worse without a word would be counted as that word's information.
"""

from bisect import bisect
from dataclasses import asdict, dataclass
from itertools import accumulate

import numpy as np

from core.diffusion.text import delete_words, distinct_words, only_words
from training.picturebook.world.captions import Caption


@dataclass(frozen=True)
class WordDropout:
    """Shares of the kinds of partial text; they add up to 1.

    Content words are the caption's objects, background, style and relation, chosen evenly. The other words say little
    that the rest does not, and need few samples.
    """

    empty: float = 0.25
    """The empty text: the other side of an image's whole information, and of guidance."""
    without_one: float = 0.38
    """The caption without one content word: CMI."""
    without_two: float = 0.12
    """The caption without two content words: PID given the rest."""
    one: float = 0.1
    """One content word alone: MI."""
    two: float = 0.07
    """Two content words alone: PID."""
    any_words: float = 0.08
    """One or two words of any kind, articles and prepositions included; left out and alone equally often."""

    def __post_init__(self) -> None:
        shares = list(asdict(self).values())
        if min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
            raise ValueError(f"the shares of word dropout have to be at least 0 and add up to 1, not {sum(shares):g}.")


def drop_words(rng: np.random.Generator, caption: Caption, dropout: WordDropout) -> str:
    """A partial text of a caption, of a kind drawn with `dropout`'s shares.

    A caption of one content word is treated as if one were wanted where two are.
    """
    shares = asdict(dropout)
    kind = list(shares)[min(bisect(list(accumulate(shares.values())), rng.random()), len(shares) - 1)]
    if kind == "empty":
        return ""
    words = distinct_words(caption.text) if kind == "any_words" else caption.content_words
    n = 1 + int(rng.integers(2)) if kind == "any_words" else 2 if kind.endswith("two") else 1
    chosen = [words[i] for i in rng.permutation(len(words))[:n]]
    alone = rng.random() < 0.5 if kind == "any_words" else not kind.startswith("without")
    return only_words(caption.text, chosen) if alone else delete_words(caption.text, chosen)
