"""Whether redundancy and synergy are found where the grammar puts them: in synonyms, in what is drawn together more
often than chance, in homonyms that the place resolves; and not in things that have nothing to do with each other.

On painted scenes, whose every word and mask is known (the claims: Dewan et al. 2024, arXiv 2406.05191).
"""

import logging
import math
from dataclasses import dataclass, replace
from itertools import islice
from typing import NamedTuple

import numpy as np
from PIL import Image

import core
from core.arrays import Floats
from core.diffusion.diffuser import Diffuser
from core.information.measuring import sampler_for
from core.information.results import Given
from training.common.report import Cell, Table
from training.evaluate.common.masks import Resampled, resampled
from training.evaluate.common.proportions import with_interval
from training.evaluate.information.pid_pairs import (
    HOMONYM,
    KINDS,
    OBJECT_AND_BACKGROUND,
    SYNONYMS,
    Kind,
    log2_together,
    scenes_with,
)
from training.evaluate.picturebook import NO_TARGET
from training.picturebook.world.captions import Caption
from training.picturebook.world.scenes import CELL, Scene, caption_of, paint
from training.picturebook.world.world import NOUN_INDEX, NOUNS, OBJECT_INDEX

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """How much is measured."""

    n_scenes: int = 32
    """Held-out true scenes for each kind of pair."""
    n_points: int = 8
    """Noise samples in a replicate."""
    n_replicates: int = 8
    """Replicates a scene."""
    n_bootstrap: int = 2000
    """Resamples of the scenes for each interval."""


QUICK = Settings(n_scenes=3, n_points=4)
"""Shows that it works; its figures mean little."""


class Found(NamedTuple):
    """What was measured of one kind of pair, a row a scene."""

    parts: Floats
    """[N, 4] bits of redundancy, of what is unique to the first and to the second word, and of synergy."""
    alone: Floats
    """[N] bits that the two words tell by themselves, added."""
    there: Floats
    """[N, 2] synergy, and what both words tell together, in the cells where the first word's thing is."""
    coinformation: Floats
    """[N] redundancy less synergy, direct."""
    grammar: Floats
    """[N] the same by the grammar, given the rest of the caption; not a number for synonyms, which share no caption."""


class Bench:
    """The scenes and what their pairs of words tell: measured once, when first asked for."""

    def __init__(self, model: Diffuser, settings: Settings) -> None:
        self._model, self.settings = model, settings
        self._found: dict[tuple[Kind, Given], Found] = {}

    def found(self, kind: Kind, given: Given) -> Found:
        """The scenes of a kind, measured."""
        if (kind, given) not in self._found:
            log.info("%s, given %s", kind.name, given)
            scenes = list(islice(scenes_with(kind), self.settings.n_scenes))
            rows = [self._measure(scene, kind, given) for scene in scenes]
            self._found[kind, given] = Found(*(np.array(column) for column in zip(*rows, strict=True)))
        return self._found[kind, given]

    def _measure(self, scene: Scene, kind: Kind, given: Given) -> tuple[Floats, float, Floats, float, float]:
        caption, painting = caption_of(scene), paint(scene)
        first, second = pair = kind.of(caption)
        prompt = f"{first} {second}" if kind is SYNONYMS else caption.text
        settings = self.settings
        told = core.decompose(
            self._model,
            Image.fromarray(painting.image),
            prompt,
            first,
            second,
            given=given,
            rel_error=NO_TARGET,
            sampler=replace(
                sampler_for(self._model, None), n_points=settings.n_points, min_replicates=settings.n_replicates
            ),
            seed=scene.seed[-1],
        ).pairs[0]
        cells = _share_of_cells(painting.labels, caption, first)
        return (
            np.array([part.bits for part in told.parts]),
            sum(part.bits for part in told.alone),
            np.array([float((cells * part.map).sum()) for part in (told.synergy, told.together)]),
            told.coinformation.bits,
            math.nan if kind is SYNONYMS else log2_together(caption, *pair),
        )

    def mean(self, values: Floats) -> Resampled:
        """The mean of one figure a scene."""
        return resampled(values[:, None], self.settings.n_bootstrap)

    @property
    def note(self) -> str:
        """How it was measured."""
        return (
            f"{self.settings.n_scenes} held-out painted scenes of each kind, all with a told place; "
            f"{self.settings.n_replicates} replicates of {self.settings.n_points} noises each. In brackets: 95 % "
            "intervals over scenes."
        )


def shares(bench: Bench) -> Table:
    """What two words tell alone, in its parts."""
    rows: list[dict[str, Cell]] = []
    for kind in KINDS:
        found = bench.found(kind, "nothing")
        redundancy = bench.mean(found.parts[:, 0])
        columns = ("redundancy", "unique, first", "unique, second", "synergy")
        row: dict[str, Cell] = {"pair": kind.name}
        row |= {name: with_interval(bench.mean(found.parts[:, i]).estimate) for i, name in enumerate(columns)}
        row["shared"] = str(redundancy.share_of(bench.mean(found.alone / 2)))
        rows.append(row)
    notes = (
        "Bits that the two words tell given nothing (texts of one and of two words). Shared: redundancy over the mean "
        "of what the two tell alone, 1 where either says all that the other does.",
        "Synonyms: the caption's word and the one that it might as well have used. No caption has both, so that the "
        "text of the two is none that the model was trained on; synergy depends on it, the other parts do not.",
        bench.note,
    )
    return Table("shares", "What two words tell, by kind of pair", rows, notes)


def planted(bench: Bench) -> Table:
    """Redundancy less synergy beside the information that two words of the grammar have about each other."""
    rows: list[dict[str, Cell]] = []
    for kind in KINDS:
        if kind is SYNONYMS:
            continue
        found = bench.found(kind, "rest")
        measured, true = bench.mean(found.coinformation), bench.mean(found.grammar)
        rows.append(
            {
                "pair": kind.name,
                "measured": with_interval(measured.estimate),
                "grammar": with_interval(true.estimate),
                "measured less grammar": with_interval(measured.less(true)),
            }
        )
    notes = (
        "Bits. Measured: redundancy less synergy given the rest of the caption, by the direct estimate. Grammar: log2 "
        "p(both | rest) / p(one | rest) p(other | rest), which it equals for a perfect model where the picture shows "
        "what both words say.",
        bench.note,
    )
    return Table("planted", "What words of the grammar tell about each other, found in pictures", rows, notes)


def homonyms(bench: Bench) -> Table:
    """Synergy of a thing's word with the place's, where the thing is."""
    rows: list[dict[str, Cell]] = []
    for given in ("nothing", "rest"):
        for kind in (HOMONYM, OBJECT_AND_BACKGROUND):
            found = bench.found(kind, given)
            synergy, together = (bench.mean(found.there[:, i]) for i in range(2))
            rows.append(
                {
                    "pair": kind.name,
                    "given": given,
                    "synergy there": with_interval(synergy.estimate),
                    "told together there": with_interval(together.estimate),
                    "share of synergy": str(synergy.share_of(together)),
                }
            )
    notes = (
        "Bits in the cells where the thing is, each cell by the share of its pixels that the thing has. A homonym is "
        "one of two things, which the place mostly tells apart: if that shows, more of what both words tell there is "
        "synergy than for things of one sense.",
        bench.note,
    )
    return Table("homonyms", "Synergy of thing and place, where the thing is", rows, notes)


PARTS = (shares, planted, homonyms)
"""In this order."""


def _share_of_cells(labels: object, caption: Caption, word: str) -> Floats:
    """[h, w] share of each latent cell's pixels that show a word's thing; all of them where the word names a place."""
    pixels = np.asarray(labels)
    rows, columns = (n // CELL for n in pixels.shape)
    if word not in caption.words:
        return np.ones((rows, columns))
    noun = NOUNS[NOUN_INDEX[caption.story.nouns[caption.words.index(word)]]]
    shown = np.isin(pixels, [OBJECT_INDEX[name] for name in noun.objects])
    shares_: Floats = shown.reshape(rows, CELL, columns, CELL).mean((1, 3))
    return shares_
