"""Prompts of the benchmarks: captions of a given length, each with the painted scene it describes."""

from typing import NamedTuple

from PIL import Image

from core.diffusion.text import delete_words, distinct_words
from training.picturebook.world.captions import Split
from training.picturebook.world.scenes import caption_of, make_scene, paint

_SCENES = 2000
"""Scenes searched before giving up."""
_SHORT = 3
"""No caption has so few distinct words; captions without articles do, and training showed such prompts."""


class Sample(NamedTuple):
    """A prompt and its image."""

    prompt: str
    image: Image.Image


def held_out(n_words: int, n: int) -> list[Sample]:
    """`scenes_with` of captions that never occur in training."""
    return scenes_with(n_words, n, "test")


def scenes_with(n_words: int, n: int, split: Split) -> list[Sample]:
    """The first `n` scenes of a split whose captions have `n_words` distinct words; every prompt is different.

    Distinct words are counted, because each has one map: `a cat and a dog` has 4.
    """
    found: dict[str, Sample] = {}
    for seed in range(_SCENES):
        if len(found) == n:
            return list(found.values())
        scene = make_scene(seed, split)
        text = caption_of(scene).text
        prompt = delete_words(text, ["a", "the"]) if n_words <= _SHORT else text
        if len(distinct_words(prompt)) == n_words and prompt not in found:
            found[prompt] = Sample(prompt, Image.fromarray(paint(scene).image))
    raise ValueError(f"Only {len(found)} of {_SCENES} captions have {n_words} distinct words, not {n}.")
