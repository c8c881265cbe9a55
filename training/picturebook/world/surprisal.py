"""How rare each word of the grammar is in its captions: the most bits that it can tell on average, given nothing."""

import json
from collections import Counter
from math import log2
from pathlib import Path

import numpy as np

from core.diffusion.text import distinct_words
from core.files import write_text
from training.picturebook.world.captions import sample_caption, sample_story, vocabulary

N_CAPTIONS = 400_000
"""Drawn captions; the rarest words are then known to 0.03 bit."""


def surprisals(n_captions: int = N_CAPTIONS, seed: int = 0) -> dict[str, float]:
    """-log2 of the share of captions that have a word, by word, in bits."""
    rng = np.random.default_rng(seed)
    counts = Counter(
        word for _ in range(n_captions) for word in distinct_words(sample_caption(rng, sample_story(rng)).text)
    )
    return {word: round(log2(n_captions / max(counts[word], 1)), 3) for word in vocabulary()}


def write_surprisals(path: Path, n_captions: int = N_CAPTIONS) -> None:
    """Store them as JSON, a line a word."""
    write_text(path, json.dumps(surprisals(n_captions), indent=1) + "\n")
