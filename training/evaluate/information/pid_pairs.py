"""Pairs of words of a caption by their relation in the grammar, and the information they carry about each other
there."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from typing import NamedTuple

from training.picturebook.world.captions import Caption, caption_probability
from training.picturebook.world.scenes import Scene, caption_of, make_scene
from training.picturebook.world.world import BACKGROUNDS, NOUN_INDEX, NOUNS, PLANTED_PAIR

Pair = tuple[str, str]


class Kind(NamedTuple):
    """A kind of pairs of words."""

    name: str
    """Name in tables."""
    pick: Callable[[Caption], Pair | None]
    """The pair in a caption that mentions the background, or None if it has no such pair. An object comes first."""

    def of(self, caption: Caption) -> Pair:
        """The pair in a caption.

        Raises:
            ValueError: It has no such pair.
        """
        pair = self.pick(caption)
        if pair is None:
            raise ValueError(f"{caption.text!r} has no pair of the kind {self.name!r}.")
        return pair


def _synonyms(caption: Caption) -> Pair | None:
    groups = [noun.words for noun in NOUNS] + [background.words for background in BACKGROUNDS]
    for word in (*caption.words, str(caption.background_word)):
        for other in next(group for group in groups if word in group):
            if other != word:
                return word, other
    return None


def _planted(caption: Caption) -> Pair | None:
    if not set(PLANTED_PAIR) <= set(caption.story.nouns):
        return None
    first, second = sorted(caption.story.nouns.index(noun) for noun in PLANTED_PAIR)
    return caption.words[first], caption.words[second]


def _two_objects(caption: Caption) -> Pair | None:
    if len(caption.words) < 2 or _planted(caption) or any(_n_senses(noun) > 1 for noun in caption.story.nouns):
        return None
    return caption.words[0], caption.words[1]


def _with_background(n_senses: int) -> Callable[[Caption], Pair | None]:
    def pick(caption: Caption) -> Pair | None:
        words = [
            word for word, noun in zip(caption.words, caption.story.nouns, strict=True) if _n_senses(noun) == n_senses
        ]
        return (words[0], str(caption.background_word)) if words else None

    return pick


def _n_senses(noun: str) -> int:
    return len(NOUNS[NOUN_INDEX[noun]].objects)


SYNONYMS = Kind("synonyms", _synonyms)
PLANTED = Kind("planted pair of objects", _planted)
OBJECTS = Kind("two other objects", _two_objects)
HOMONYM = Kind("homonym and background", _with_background(2))
OBJECT_AND_BACKGROUND = Kind("other object and background", _with_background(1))
KINDS = (SYNONYMS, PLANTED, OBJECTS, HOMONYM, OBJECT_AND_BACKGROUND)


def scenes_with(kind: Kind) -> Iterator[Scene]:
    """Held-out scenes whose captions mention the background and have a pair of the kind."""
    for seed in count():
        scene = make_scene(seed, "test")
        caption = caption_of(scene)
        if caption.background_word is not None and kind.pick(caption):
            yield scene


def log2_together(caption: Caption, first: str, second: str) -> float:
    """log2 p(both | rest) / (p(first | rest) p(second | rest)) for the words of two of a caption's slots.

    The rest is the caption without the two; each slot is an object's or the background's.
    """
    joint = joint_of(caption, first, second)
    total = sum(joint.values())
    one = sum(p for (word, _), p in joint.items() if word == first)
    other = sum(p for (_, word), p in joint.items() if word == second)
    return math.log2(joint[first, second] * total / (one * other))


def joint_of(caption: Caption, first: str, second: str) -> dict[Pair, float]:
    """Probability of every pair of words in two slots, with the rest of the caption unchanged."""
    slots = [caption.words.index(word) if word in caption.words else None for word in (first, second)]
    joint: dict[Pair, float] = {}
    for one, changed in _fillings(caption, slots[0]):
        for other, both in _fillings(changed, slots[1]):
            joint[one, other] = caption_probability(both)
    return joint


def _fillings(caption: Caption, slot: int | None) -> Iterator[tuple[str, Caption]]:
    """Every word that could fill an object's slot, or the background's (None), with the resulting caption."""
    story = caption.story
    if slot is None:
        for background in BACKGROUNDS:
            for word in background.words:
                yield word, replace(caption, story=replace(story, background=background.name), background_word=word)
        return
    for noun in NOUNS:
        nouns = (*story.nouns[:slot], noun.name, *story.nouns[slot + 1 :])
        for word in noun.words:
            words = (*caption.words[:slot], word, *caption.words[slot + 1 :])
            yield word, replace(caption, story=replace(story, nouns=nouns), words=words)
