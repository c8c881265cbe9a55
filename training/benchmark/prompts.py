"""What the benchmark asks about: held-out captions of a given length, each with the painted scene that it tells of."""

from typing import NamedTuple

from PIL import Image

from core.diffusion.text import delete_words, distinct_words
from training.picturebook.world.captions import Split
from training.picturebook.world.scenes import caption_of, make_scene, paint

_SCENES = 2000
"""Scenes looked through before giving up."""
_SHORT = 3
"""No caption has as few different words; captions without their articles do, and training showed such texts."""


class Sample(NamedTuple):
    """A prompt and its picture."""

    prompt: str
    image: Image.Image


def held_out(n_words: int, n: int) -> list[Sample]:
    """`scenes_with` of captions that never met in training."""
    return scenes_with(n_words, n, "test")


def scenes_with(n_words: int, n: int, split: Split) -> list[Sample]:
    """The first `n` scenes of a split whose captions have `n_words` different words; no prompt comes twice.

    Different words are counted, because each is a map: `a cat and a dog` has 4.
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
    raise ValueError(f"Only {len(found)} of {_SCENES} captions have {n_words} different words, not {n}.")
