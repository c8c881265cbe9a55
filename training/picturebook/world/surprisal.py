"""Surprisal of each word of the grammar in its captions: an upper bound on the bits that it carries given nothing."""

import json
from collections import Counter
from math import log2
from pathlib import Path

import numpy as np

from core.diffusion.text import distinct_words
from core.files import write_text
from training.picturebook.world.captions import sample_caption, sample_story, vocabulary

N_CAPTIONS = 400_000
"""Sampled captions; the rarest words are then known to 0.03 bit."""


def surprisals(n_captions: int = N_CAPTIONS, seed: int = 0) -> dict[str, float]:
    """-log2 of the fraction of captions with a word, in bits, by word."""
    rng = np.random.default_rng(seed)
    counts = Counter(
        word for _ in range(n_captions) for word in distinct_words(sample_caption(rng, sample_story(rng)).text)
    )
    return {word: round(log2(n_captions / max(counts[word], 1)), 3) for word in vocabulary()}


def write_surprisals(path: Path, n_captions: int = N_CAPTIONS) -> None:
    """Store the surprisals as JSON, one line per word."""
    write_text(path, json.dumps(surprisals(n_captions), indent=1) + "\n")
