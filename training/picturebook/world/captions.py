"""The grammar: what a scene holds, how a caption says it, and how probable each word is given the others.

A `Story` is what is drawn (nouns, relation, background, style); a `Caption` is one wording of it. Both come from finite
distributions with known probabilities, which bounds exactly the information that a word can carry.
"""

import zlib
from bisect import bisect
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate
from math import log2
from typing import Literal, TypeVar

import numpy as np
import numpy.typing as npt

from core.diffusion.text import delete_words, distinct_words
from training.common.splits import HELD_OUT
from training.picturebook.world.world import (
    BACKGROUND_INDEX,
    BACKGROUNDS,
    NOUN_INDEX,
    NOUNS,
    OBJECT_INDEX,
    OBJECTS,
    PLANTED_PAIR,
    SENSE_IN_ITS_BACKGROUND,
    STYLES,
)

Probabilities = npt.NDArray[np.float64]
Choice = TypeVar("Choice", bound=str)
Relation = Literal["left", "right", "above", "below"]
Split = Literal["train", "test", "any"]

RELATIONS: tuple[Relation, ...] = ("left", "right", "above", "below")
N_OBJECTS_P = (0.35, 0.5, 0.15)
"""Probability of one, two and three nouns."""
RELATED_P = 0.8
"""Probability that a pair stands in a relation that the caption states."""
AT_HOME_P = 0.5
"""Probability that the background is drawn from the nouns' homes; otherwise all are equally likely."""
BACKGROUND_NAMED_P = 0.75
STYLE_P = (0.4, 0.12, 0.12, 0.12, 0.12, 0.12)
STYLE_NAMED_P = 0.85
BACKGROUND_FIRST_P = 0.2
STYLE_FIRST_P = 0.5
OPENINGS: tuple[tuple[str, float], ...] = (("", 0.7), ("a picture of ", 0.15), ("there is ", 0.15))
"""What stands before the nouns if the style is not named."""
PAIRINGS: tuple[tuple[str, float], ...] = (("and", 0.7), ("with", 0.3))


@dataclass(frozen=True)
class Story:
    """What a scene holds."""

    nouns: tuple[str, ...]
    """Names of one to three nouns in the order in which a caption names them."""
    relation: Relation | None
    """Position of the first of two nouns relative to the second, if the caption states it."""
    background: str
    style: str

    @property
    def held_out(self) -> bool:
        """Whether one of its pairs of nouns (or its single noun), with this background and style, is held out."""
        first = self.nouns
        groups = [first] if len(first) == 1 else [(a, b) for i, a in enumerate(first) for b in first[i + 1 :]]
        return any(
            zlib.crc32("|".join([*sorted(group), self.background, self.style]).encode()) % HELD_OUT == 0
            for group in groups
        )


@dataclass(frozen=True)
class Caption:
    """One way of putting a story into words."""

    story: Story
    words: tuple[str, ...]
    """The word chosen for each noun."""
    pairing: str
    """What joins two nouns that stand in no relation: `and` or `with`."""
    background_word: str | None
    """The word chosen for the background, or None if it is not named."""
    background_first: bool
    style_named: bool
    style_first: bool
    opening: str
    """One of `OPENINGS`; always the empty one if the style is named."""

    @property
    def text(self) -> str:
        """The caption as a prompt."""
        body = self._nouns()
        if self.style_named and self.style_first:
            body = f"a {self.story.style} picture of {body}"
        body = self.opening + body
        if self.background_word is not None:
            preposition = BACKGROUNDS[BACKGROUND_INDEX[self.story.background]].preposition
            where = f"{preposition} the {self.background_word}"
            body = f"{where}, {body}" if self.background_first else f"{body} {where}"
        if self.style_named and not self.style_first:
            body = f"{body}, {self.story.style} style"
        return body

    @property
    def content_words(self) -> tuple[str, ...]:
        """The different words that a slot of the story chose: objects, background, style and relation."""
        chosen = [*self.words, self.background_word, self.story.style if self.style_named else None]
        return tuple(dict.fromkeys(word for word in (*chosen, self.story.relation) if word is not None))

    def _nouns(self) -> str:
        objects = [f"a {word}" for word in self.words]
        if len(objects) == 1:
            return objects[0]
        if len(objects) == 3:
            return f"{objects[0]}, {objects[1]} and {objects[2]}"
        relation = self.story.relation
        if relation is None:
            return f"{objects[0]} {self.pairing} {objects[1]}"
        joint = f"{relation} of" if relation in ("left", "right") else relation
        return f"{objects[0]} {joint} {objects[1]}"


# --- probabilities ----------------------------------------------------------------------------------------------------


@cache
def _pair_weights() -> Probabilities:
    """Joint probability of an ordered pair of nouns, [nouns, nouns]; symmetric, zero on the diagonal."""
    size = np.array([len(noun.objects) for noun in NOUNS], dtype=np.float64)
    weights = np.outer(size, size)
    np.fill_diagonal(weights, 0)
    a, b = (NOUN_INDEX[name] for name in PLANTED_PAIR)
    # As much weight as all other partners of the first noun together: given it, the second is there every other time.
    weights[a, b] = weights[b, a] = weights[a].sum() - weights[a, b]
    joint: Probabilities = weights / weights.sum()
    return joint


@cache
def _single_weights() -> Probabilities:
    size = np.array([len(noun.objects) for noun in NOUNS], dtype=np.float64)
    single: Probabilities = size / size.sum()
    return single


@cache
def _homes(noun: str) -> Probabilities:
    """Probability of each background at this noun's homes, [backgrounds]."""
    home = np.zeros(len(BACKGROUNDS))
    for object_name in NOUNS[NOUN_INDEX[noun]].objects:
        backgrounds = OBJECTS[OBJECT_INDEX[object_name]].homes
        for background in backgrounds:
            home[BACKGROUND_INDEX[background]] += 1 / len(backgrounds)
    home /= home.sum()
    return home


def background_probabilities(nouns: tuple[str, ...]) -> Probabilities:
    """Probability of each background given the nouns, [backgrounds]."""
    home: Probabilities = np.mean([_homes(noun) for noun in nouns], axis=0)
    mixed: Probabilities = AT_HOME_P * home + (1 - AT_HOME_P) / len(BACKGROUNDS)
    return mixed


def nouns_probability(nouns: tuple[str, ...]) -> float:
    """Probability of these nouns in this order."""
    index = [NOUN_INDEX[noun] for noun in nouns]
    if len(set(index)) < len(index):
        return 0.0
    if len(index) == 1:
        return float(N_OBJECTS_P[0] * _single_weights()[index[0]])
    p = float(N_OBJECTS_P[len(index) - 1] * _pair_weights()[index[0], index[1]])
    return p / (len(NOUNS) - 2) if len(index) == 3 else p


def sense_probabilities(noun: str, background: str) -> dict[str, float]:
    """Probability of each object that a noun can mean on a background."""
    objects = NOUNS[NOUN_INDEX[noun]].objects
    if len(objects) == 1:
        return {objects[0]: 1.0}
    wild = SENSE_IN_ITS_BACKGROUND if BACKGROUNDS[BACKGROUND_INDEX[background]].wild else 1 - SENSE_IN_ITS_BACKGROUND
    return {objects[0]: wild, objects[1]: 1 - wild}


def caption_probability(caption: Caption) -> float:
    """Probability of a caption before held-out combinations are set aside."""
    story = caption.story
    p = nouns_probability(story.nouns)
    p *= float(background_probabilities(story.nouns)[BACKGROUND_INDEX[story.background]]) if p else 0.0
    p *= STYLE_P[STYLES.index(story.style)]
    for noun in story.nouns:
        p /= len(NOUNS[NOUN_INDEX[noun]].words)
    if len(story.nouns) == 2:
        if story.relation is None:
            p *= (1 - RELATED_P) * dict(PAIRINGS)[caption.pairing]
        else:
            p *= RELATED_P / len(RELATIONS)
    if caption.background_word is None:
        p *= 1 - BACKGROUND_NAMED_P
    else:
        p *= BACKGROUND_NAMED_P / len(BACKGROUNDS[BACKGROUND_INDEX[story.background]].words)
        p *= BACKGROUND_FIRST_P if caption.background_first else 1 - BACKGROUND_FIRST_P
    if caption.style_named:
        p *= STYLE_NAMED_P * (STYLE_FIRST_P if caption.style_first else 1 - STYLE_FIRST_P)
    else:
        p *= (1.0 if story.style == "plain" else 1 - STYLE_NAMED_P) * dict(OPENINGS)[caption.opening]
    return p


# --- sampling ---------------------------------------------------------------------------------------------------------


def sample_story(rng: np.random.Generator, split: Split = "any") -> Story:
    """A story; `train` never returns a held-out combination, `test` nothing else."""
    while True:
        story = _sample_story(rng)
        if split == "any" or story.held_out == (split == "test"):
            return story


@cache
def _single_odds() -> tuple[float, ...]:
    return tuple(_single_weights())


@cache
def _pair_odds() -> tuple[float, ...]:
    return tuple(_pair_weights().ravel())


@cache
def _cumulated(odds: tuple[float, ...]) -> list[float]:
    return list(accumulate(odds))


def _choose(rng: np.random.Generator, odds: tuple[float, ...]) -> int:
    """An index drawn with these probabilities; ten times as fast as numpy's `choice` on short lists."""
    return min(bisect(_cumulated(odds), rng.random()), len(odds) - 1)


def _any_of(rng: np.random.Generator, options: tuple[Choice, ...]) -> Choice:
    return options[int(rng.integers(len(options)))]


def _sample_story(rng: np.random.Generator) -> Story:
    n = 1 + _choose(rng, N_OBJECTS_P)
    index = [_choose(rng, _single_odds())] if n == 1 else list(divmod(_choose(rng, _pair_odds()), len(NOUNS)))
    if n == 3:
        others = [i for i in range(len(NOUNS)) if i not in index]
        index.append(others[int(rng.integers(len(others)))])
    nouns = tuple(NOUNS[i].name for i in index)
    related = n == 2 and rng.random() < RELATED_P
    return Story(
        nouns=nouns,
        relation=_any_of(rng, RELATIONS) if related else None,
        background=BACKGROUNDS[_choose(rng, tuple(background_probabilities(nouns)))].name,
        style=STYLES[_choose(rng, STYLE_P)],
    )


def sample_caption(rng: np.random.Generator, story: Story) -> Caption:
    """One way of putting a story into words."""
    background_words = BACKGROUNDS[BACKGROUND_INDEX[story.background]].words
    style_named = story.style != "plain" and rng.random() < STYLE_NAMED_P
    opening = OPENINGS[_choose(rng, tuple(p for _, p in OPENINGS))][0]
    return Caption(
        story=story,
        words=tuple(_any_of(rng, NOUNS[NOUN_INDEX[noun]].words) for noun in story.nouns),
        pairing=PAIRINGS[_choose(rng, tuple(p for _, p in PAIRINGS))][0],
        background_word=_any_of(rng, background_words) if rng.random() < BACKGROUND_NAMED_P else None,
        background_first=bool(rng.random() < BACKGROUND_FIRST_P),
        style_named=style_named,
        style_first=bool(rng.random() < STYLE_FIRST_P),
        opening="" if style_named else opening,
    )


# --- the ceiling ------------------------------------------------------------------------------------------------------


def log2_word_given_rest(caption: Caption, word: str) -> float:
    """log2 p(word | rest of the caption): its negative bounds the bits that the word can carry, on average.

    The rest is the caption without the word; the alternatives are all fillings of the same slot that leave the same
    rest. 0.0 for words that no slot chose: they follow from the rest (articles, prepositions) or say nothing about the
    image (`and` or `with`).

    Raises:
        ValueError: The word is not in the caption.
    """
    text = caption.text
    if word not in distinct_words(text):
        raise ValueError(f"{word!r} is not a word of {text!r}")
    rest = delete_words(text, [word])
    alike: dict[str, float] = {}
    for other in _alternatives(caption, word):
        for gone in distinct_words(other.text):
            if delete_words(other.text, [gone]) == rest and gone not in distinct_words(rest):
                alike[gone] = alike.get(gone, 0.0) + caption_probability(other)
                break
    total = sum(alike.values())
    return log2(alike[word] / total) if total else 0.0


def _alternatives(caption: Caption, word: str) -> Iterator[Caption]:
    """The caption with the slot of `word` filled in every possible way, itself included."""
    story = caption.story
    if word in caption.words:
        at = caption.words.index(word)
        for noun in NOUNS:
            nouns = (*story.nouns[:at], noun.name, *story.nouns[at + 1 :])
            for other in noun.words:
                words = (*caption.words[:at], other, *caption.words[at + 1 :])
                # A background that is not named is summed over.
                for background in (
                    BACKGROUNDS
                    if caption.background_word is None
                    else (BACKGROUNDS[BACKGROUND_INDEX[story.background]],)
                ):
                    yield replace(caption, story=replace(story, nouns=nouns, background=background.name), words=words)
    elif word == caption.background_word:
        for background in BACKGROUNDS:
            for other in background.words:
                yield replace(caption, story=replace(story, background=background.name), background_word=other)
    elif caption.style_named and word == story.style:
        for style in STYLES[1:]:
            yield replace(caption, story=replace(story, style=style))
    elif story.relation is not None and word == story.relation:
        for relation in RELATIONS:
            yield replace(caption, story=replace(story, relation=relation))


def vocabulary() -> list[str]:
    """Every word that a caption can hold, sorted."""
    words = {word for noun in NOUNS for word in noun.words} | {
        word for background in BACKGROUNDS for word in background.words
    }
    words |= set(STYLES[1:]) | set(RELATIONS) | {background.preposition for background in BACKGROUNDS}
    words |= {word for text, _ in OPENINGS for word in distinct_words(text)} | {text for text, _ in PAIRINGS}
    return sorted(words | {"a", "the", "of", "style", "picture"})
