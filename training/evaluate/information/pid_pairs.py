"""Pairs of words of a caption, by what the grammar made of them, and how much two words tell of each other there."""

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
    pick: Callable[[Caption], Pair | None]
    """The pair in a caption whose place is told, if it has one of this kind. Of things and places, the thing first."""

    def of(self, caption: Caption) -> Pair:
        """The pair in a caption that has one.

        Raises:
            ValueError: It has none.
        """
        pair = self.pick(caption)
        if pair is None:
            raise ValueError(f"{caption.text!r} has no {self.name}.")
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
PLANTED = Kind("planted pair", _planted)
OBJECTS = Kind("two other things", _two_objects)
HOMONYM = Kind("homonym and place", _with_background(2))
OBJECT_AND_BACKGROUND = Kind("other thing and place", _with_background(1))
KINDS = (SYNONYMS, PLANTED, OBJECTS, HOMONYM, OBJECT_AND_BACKGROUND)


def scenes_with(kind: Kind) -> Iterator[Scene]:
    """Held-out scenes whose captions tell the place and have such a pair."""
    for seed in count():
        scene = make_scene(seed, "test")
        caption = caption_of(scene)
        if caption.background_word is not None and kind.pick(caption):
            yield scene


def log2_together(caption: Caption, first: str, second: str) -> float:
    """log2 p(both | rest) / p(first | rest) p(second | rest) for the words of two of a caption's slots.

    The rest is the caption without the two, its place told; the slots are of things or the place's.
    """
    joint = joint_of(caption, first, second)
    total = sum(joint.values())
    one = sum(p for (word, _), p in joint.items() if word == first)
    other = sum(p for (_, word), p in joint.items() if word == second)
    return math.log2(joint[first, second] * total / (one * other))


def joint_of(caption: Caption, first: str, second: str) -> dict[Pair, float]:
    """Probability of every filling of two slots, with the rest of the caption as it is."""
    slots = [caption.words.index(word) if word in caption.words else None for word in (first, second)]
    joint: dict[Pair, float] = {}
    for one, changed in _fillings(caption, slots[0]):
        for other, both in _fillings(changed, slots[1]):
            joint[one, other] = caption_probability(both)
    return joint


def _fillings(caption: Caption, slot: int | None) -> Iterator[tuple[str, Caption]]:
    """Every word that a thing's slot, or the place's (None), could have, with the caption that has it."""
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
