"""Whether the caption of a picture is ranked above others that differ in a thing, the relation, the place, the style,
or the order of the words: after ARO (Yuksekgonul et al. 2023, arXiv 2210.01936), on painted scenes.

By direct bits, as `core.rank_captions` decides, and by orthogonal bits, as published (Kong et al. 2024, arXiv
2310.07972), from the same samples.
"""

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image

import core
from core.arrays import Floats
from core.diffusion.diffuser import Diffuser
from core.diffusion.text import split_words
from core.information.measuring import sampler_for
from core.information.ranking import Ranking
from training.common.report import Cell, Table
from training.evaluate.common.masks import Resampled, resampled
from training.evaluate.common.proportions import proportion, with_interval
from training.picturebook.world.captions import Caption, Relation
from training.picturebook.world.scenes import Scene, caption_of, make_scene, paint
from training.picturebook.world.world import BACKGROUNDS, NOUNS, STYLES

N_SHUFFLES = 4
"""Orders of words beside the caption's own, as in ARO."""
SURE = 0.95
"""Probability from which on a ranking counts as sure."""
ENDLESS = 1 - 1e-9
"""Certainty that no run reaches: every scene gets the same samples."""
OPPOSITE: Mapping[Relation, Relation] = {"left": "right", "right": "left", "above": "below", "below": "above"}

Option = TypeVar("Option")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """How much is measured."""

    n_scenes: int = 100
    """Held-out true scenes."""
    n_points: int = 8
    """Noise samples in a replicate."""
    n_replicates: int = 8
    """Replicates a scene."""
    n_bootstrap: int = 2000
    """Resamples of the scenes for each interval."""


QUICK = Settings(n_scenes=5, n_points=4)
"""Shows that it works; its figures mean little."""


class Outcome(NamedTuple):
    """How a scene's caption fared against those of one kind."""

    direct: bool
    """Whether it comes first by direct bits."""
    orthogonal: bool
    """Whether it does by orthogonal bits."""
    sure: bool
    """Whether the ranking is sure of every one of the comparisons, whichever way they go."""
    margin: float
    """Direct bits by which it is ahead of the best of the others."""


class Bench:
    """The scenes, ranked once, when first asked for."""

    def __init__(self, model: Diffuser, settings: Settings) -> None:
        self._model, self.settings = model, settings

    @cached_property
    def outcomes(self) -> dict[str, list[Outcome]]:
        """By the kind of the other captions."""
        found: dict[str, list[Outcome]] = defaultdict(list)
        for seed in range(self.settings.n_scenes):
            if seed % 10 == 0:
                log.info("captions: scene %d of %d", seed, self.settings.n_scenes)
            for kind, outcome in self._measure(make_scene(seed, "test")).items():
                found[kind].append(outcome)
        return found

    def _measure(self, scene: Scene) -> dict[str, Outcome]:
        caption = caption_of(scene)
        others = others_of(caption, np.random.default_rng([*scene.seed, 5]))
        captions = [caption.text, *(text for texts in others.values() for text in texts)]
        settings = self.settings
        ranking = core.rank_captions(
            self._model,
            Image.fromarray(paint(scene).image),
            captions,
            certainty=ENDLESS,
            sampler=replace(
                sampler_for(self._model, None), n_points=settings.n_points, min_replicates=settings.n_replicates
            ),
            max_evals=settings.n_points * settings.n_replicates * (len(captions) + 1),
            seed=scene.seed[-1],
        )
        outcomes, start = {}, 1
        for kind, texts in others.items():
            outcomes[kind] = outcome_of(ranking, range(start, start + len(texts)))
            start += len(texts)
        return outcomes


def others_of(caption: Caption, rng: np.random.Generator) -> dict[str, list[str]]:
    """Captions that differ from a scene's own in one respect, for each respect that it has."""
    story = caption.story
    at = int(rng.integers(len(caption.words)))
    noun = any_of(rng, [noun for noun in NOUNS if noun.name not in story.nouns])
    words = (*caption.words[:at], noun.name, *caption.words[at + 1 :])
    others = {"object": [replace(caption, words=words).text]}
    if story.relation is not None:
        others["relation"] = [replace(caption, story=replace(story, relation=OPPOSITE[story.relation])).text]
    if caption.background_word is not None:
        background = any_of(rng, [background for background in BACKGROUNDS if background.name != story.background])
        changed = replace(caption, story=replace(story, background=background.name), background_word=background.name)
        others["background"] = [changed.text]
    if caption.style_named:
        style = any_of(rng, [style for style in STYLES[1:] if style != story.style])
        others["style"] = [replace(caption, story=replace(story, style=style)).text]
    shuffles = shuffled(caption.text, rng)
    return others | ({"order of the words": shuffles} if shuffles else {})


def shuffled(text: str, rng: np.random.Generator, tries: int = 100) -> list[str]:
    """`N_SHUFFLES` other orders of a text's words, without its punctuation; none where it has too few words."""
    words = [word.text for word in split_words(text)]
    found: dict[str, None] = {}
    for _ in range(tries):
        other = [words[i] for i in rng.permutation(len(words))]
        if other != words:
            found[" ".join(other)] = None
        if len(found) == N_SHUFFLES:
            return list(found)
    return []


def outcome_of(ranking: Ranking, others: Sequence[int]) -> Outcome:
    """How the first caption fared against some others."""
    orthogonal = ranking.orthogonal_bits
    if orthogonal is None:
        raise ValueError("The published rule needs the empty text beside.")
    listed = list(others)
    p = ranking.p_ahead[0, listed]
    return Outcome(
        direct=bool(ranking.bits[0] > ranking.bits[listed].max()),
        orthogonal=bool(orthogonal[0] > orthogonal[listed].max()),
        sure=bool((np.maximum(p, 1 - p) >= SURE).all()),
        margin=float(ranking.ahead[0, listed].min()),
    )


def aro(bench: Bench) -> Table:
    """How often the right caption wins."""
    rows: list[dict[str, Cell]] = []
    for kind, outcomes in bench.outcomes.items():
        chance = 1 / (1 + N_SHUFFLES) if kind == "order of the words" else 1 / 2
        direct, orthogonal = (np.array([float(o[i]) for o in outcomes]) for i in range(2))
        ahead = _mean(np.array([o.margin for o in outcomes]), bench).estimate
        difference = _mean(100 * direct, bench).less(_mean(100 * orthogonal, bench))
        rows.append(
            {
                "what differs": kind,
                "captions": len(outcomes),
                "right": str(proportion(o.direct for o in outcomes)),
                "right, published rule": str(proportion(o.orthogonal for o in outcomes)),
                "difference": with_interval(difference, "+.0f"),
                "chance": f"{100 * chance:.0f} %",
                "bits ahead": with_interval(ahead, ".1f"),
                "sure": str(proportion(o.sure for o in outcomes)),
                "right where sure": str(proportion(o.direct for o in outcomes if o.sure)),
            }
        )
    settings = bench.settings
    notes = (
        f"{settings.n_scenes} held-out painted scenes, each with its caption and one that differs in a thing, in the "
        f"relation (its opposite), in the place, in the style, where the caption tells them, and {N_SHUFFLES} other "
        "orders of its words (right: ahead of all of them). Orders other than the grammar's never occur in training.",
        f"{settings.n_replicates} replicates of {settings.n_points} noises, the same for all captions of a scene. "
        "Right: by direct bits; the published rule: by orthogonal bits over the empty text, from the same samples. "
        "Difference: in percentage points. Bits ahead: of the best of the others. Sure: a probability of at least "
        f"{SURE} that the model prefers one to the other, either way. In brackets: 95 % intervals over scenes.",
    )
    return Table("aro", "Right caption against wrong ones", rows, notes)


PARTS = (aro,)
"""In this order."""


def _mean(values: Floats, bench: Bench) -> Resampled:
    return resampled(values[:, None], bench.settings.n_bootstrap)


def any_of(rng: np.random.Generator, options: Sequence[Option]) -> Option:
    """One of them, all equally likely."""
    return options[int(rng.integers(len(options)))]
