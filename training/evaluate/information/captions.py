"""Whether the caption of an image is ranked above captions that differ in one respect: an object, the relation, the
background, the style, or the order of the words (after ARO, Yuksekgonul et al. 2023, arXiv 2210.01936), on painted
scenes.

Ranked by direct bits, as `core.rank_captions` does, and by orthogonal bits over the empty prompt, the rule of Kong et
al. 2024 (arXiv 2310.07972), from the same samples.
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
from training.evaluate.common.evaluation import Evaluation
from training.evaluate.common.masks import Resampled, resampled
from training.evaluate.common.proportions import proportion, with_interval
from training.picturebook.world.captions import Caption, Relation
from training.picturebook.world.scenes import Scene, caption_of, make_scene, paint
from training.picturebook.world.world import BACKGROUNDS, NOUNS, STYLES

N_SHUFFLES = 4
"""Shuffled captions per caption, as in ARO."""
SURE = 0.95
"""Probability from which on a comparison counts as sure."""
UNREACHABLE = 1 - 1e-9
"""A certainty no run reaches, so that every scene gets the same number of samples."""
OPPOSITE: Mapping[Relation, Relation] = {"left": "right", "right": "left", "above": "below", "below": "above"}

Option = TypeVar("Option")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CaptionSettings:
    """How much is measured."""

    n_scenes: int = 100
    """Held-out painted scenes."""
    n_points: int = 8
    """Noise samples in a replicate."""
    n_replicates: int = 8
    """Replicates per scene."""
    n_bootstrap: int = 2000
    """Bootstrap resamples of the scenes for each interval."""


QUICK = CaptionSettings(n_scenes=5, n_points=4)
"""A smoke test; its figures mean little."""


class Outcome(NamedTuple):
    """How a scene's caption compares with the alternatives of one kind."""

    direct: bool
    """Whether it is first by direct bits."""
    orthogonal: bool
    """Whether it is first by orthogonal bits."""
    sure: bool
    """Whether every comparison is sure, whichever way it goes."""
    margin: float
    """Direct bits by which it is ahead of the best alternative."""


class CaptionBench:
    """The captions of the scenes, ranked once, on first use."""

    def __init__(self, model: Diffuser, settings: CaptionSettings) -> None:
        self._model, self.settings = model, settings

    @cached_property
    def outcomes(self) -> dict[str, list[Outcome]]:
        """Outcomes by kind of alternative."""
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
            certainty=UNREACHABLE,
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
    """Captions that differ from a scene's caption in one respect, for each respect the caption has."""
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
    """`N_SHUFFLES` other orders of a text's words, without punctuation; none if it has too few words."""
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
    """How the first caption compares with some of the others."""
    orthogonal = ranking.orthogonal_bits
    if orthogonal is None:
        raise ValueError("Ranking by orthogonal bits needs the empty prompt as a reference.")
    listed = list(others)
    p = ranking.p_ahead[0, listed]
    return Outcome(
        direct=bool(ranking.bits[0] > ranking.bits[listed].max()),
        orthogonal=bool(orthogonal[0] > orthogonal[listed].max()),
        sure=bool((np.maximum(p, 1 - p) >= SURE).all()),
        margin=float(ranking.ahead[0, listed].min()),
    )


def aro(bench: CaptionBench) -> Table:
    """How often the correct caption is ranked first."""
    rows: list[dict[str, Cell]] = []
    for kind, outcomes in bench.outcomes.items():
        chance = 1 / (1 + N_SHUFFLES) if kind == "order of the words" else 1 / 2
        direct, orthogonal = (np.array([float(o[i]) for o in outcomes]) for i in range(2))
        ahead = _mean(np.array([o.margin for o in outcomes]), bench).estimate
        difference = _mean(100 * direct, bench).minus(_mean(100 * orthogonal, bench))
        rows.append(
            {
                "difference": kind,
                "captions": len(outcomes),
                "correct": str(proportion(o.direct for o in outcomes)),
                "correct, Kong et al. 2024": str(proportion(o.orthogonal for o in outcomes)),
                "direct minus orthogonal": with_interval(difference, "+.0f"),
                "chance": f"{100 * chance:.0f} %",
                "bits ahead": with_interval(ahead, ".1f"),
                "sure": str(proportion(o.sure for o in outcomes)),
                "correct where sure": str(proportion(o.direct for o in outcomes if o.sure)),
            }
        )
    settings = bench.settings
    notes = (
        f"{settings.n_scenes} held-out painted scenes. Each caption against one with another object, the opposite "
        "relation, another background or another style, where it mentions them, and against "
        f"{N_SHUFFLES} other orders of its words, which never occur in training (correct: ahead of all of them).",
        f"{settings.n_replicates} replicates of {settings.n_points} noise samples, the same for all captions of a "
        "scene. Correct: by direct bits; Kong et al. 2024: by orthogonal bits over the empty prompt, from the same "
        "samples; direct minus orthogonal: in percentage points. Bits ahead: of the best alternative. Sure: a "
        f"probability of at least {SURE} that the model prefers one caption to the other, either way. 95 % intervals "
        "over scenes.",
    )
    return Table("aro", "Correct caption against altered ones", rows, notes)


def _mean(values: Floats, bench: CaptionBench) -> Resampled:
    return resampled(values[:, None], bench.settings.n_bootstrap)


def any_of(rng: np.random.Generator, options: Sequence[Option]) -> Option:
    """A uniformly random element."""
    return options[int(rng.integers(len(options)))]


EVALUATION = Evaluation(
    name="captions",
    title="Caption ranking",
    description=__doc__,
    settings=CaptionSettings(),
    quick=QUICK,
    bench=lambda subject, settings: CaptionBench(subject.model, settings),
    parts=(aro,),
)
