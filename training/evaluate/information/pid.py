"""Partial information decomposition (PID) of pairs of words, on painted scenes: whether redundancy and synergy appear
where the grammar puts them (claims of Dewan et al. 2024, arXiv 2406.05191).

Expected: high redundancy for synonyms and for two objects that the grammar puts together more often than chance (the
planted pair), low redundancy for unrelated objects, and synergy where a background resolves a homonym.
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
from training.evaluate.common.evaluation import Evaluation
from training.evaluate.common.masks import Resampled, resampled
from training.evaluate.common.proportions import with_interval
from training.evaluate.common.scenes import NO_TARGET
from training.evaluate.information.pid_pairs import (
    HOMONYM,
    KINDS,
    OBJECT_AND_BACKGROUND,
    SYNONYMS,
    Kind,
    log2_together,
    scenes_with,
)
from training.picturebook.world.captions import Caption
from training.picturebook.world.scenes import CELL, Scene, caption_of, paint
from training.picturebook.world.world import NOUN_INDEX, NOUNS, OBJECT_INDEX

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PidSettings:
    """How much is measured."""

    n_scenes: int = 32
    """Held-out painted scenes for each kind of pair."""
    n_points: int = 8
    """Noise samples in a replicate."""
    n_replicates: int = 8
    """Replicates per scene."""
    n_bootstrap: int = 2000
    """Bootstrap resamples of the scenes for each interval."""


QUICK = PidSettings(n_scenes=3, n_points=4)
"""A smoke test; its figures mean little."""


class Found(NamedTuple):
    """Measurements of one kind of pair, one row per scene."""

    parts: Floats
    """[N, 4] bits: redundancy, unique to the first word, unique to the second word, synergy."""
    alone: Floats
    """[N] bits of the two words alone, added."""
    there: Floats
    """[N, 2] bits of synergy and of both words together, in the cells of the first word's object."""
    coinformation: Floats
    """[N] bits: redundancy minus synergy, direct estimate."""
    grammar: Floats
    """[N] the same under the grammar, given the rest of the caption; NaN for synonyms, which never share a caption."""


class PidBench:
    """The decompositions of the scenes' pairs of words; measured once, on first use."""

    def __init__(self, model: Diffuser, settings: PidSettings) -> None:
        self._model, self.settings = model, settings
        self._found: dict[tuple[Kind, Given], Found] = {}

    def found(self, kind: Kind, given: Given) -> Found:
        """The measurements of a kind of pair."""
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
        pair_bits = core.decompose(
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
            np.array([part.bits for part in pair_bits.parts]),
            sum(part.bits for part in pair_bits.alone),
            np.array([float((cells * part.map).sum()) for part in (pair_bits.synergy, pair_bits.together)]),
            pair_bits.coinformation.bits,
            math.nan if kind is SYNONYMS else log2_together(caption, *pair),
        )

    def mean(self, values: Floats) -> Resampled:
        """The mean of one figure per scene."""
        return resampled(values[:, None], self.settings.n_bootstrap)

    @property
    def note(self) -> str:
        """How it was measured."""
        return (
            f"{self.settings.n_scenes} held-out painted scenes of each kind, whose captions mention the background; "
            f"{self.settings.n_replicates} replicates of {self.settings.n_points} noise samples each. 95 % intervals "
            "over scenes in brackets."
        )


def shares(bench: PidBench) -> Table:
    """The information of two words, decomposed."""
    rows: list[dict[str, Cell]] = []
    for kind in KINDS:
        found = bench.found(kind, "nothing")
        redundancy = bench.mean(found.parts[:, 0])
        columns = ("redundancy", "unique, first", "unique, second", "synergy")
        row: dict[str, Cell] = {"pair": kind.name}
        row |= {name: with_interval(bench.mean(found.parts[:, i]).estimate) for i, name in enumerate(columns)}
        row["redundancy share"] = str(redundancy.over(bench.mean(found.alone / 2)))
        rows.append(row)
    notes = (
        "Bits given nothing (prompts of one and of two words). Redundancy share: redundancy over the mean of the two "
        "words' bits alone; 1 if each carries all the information of the other.",
        "Synonyms: the caption's word and the one it might as well have used. No caption has both, so the model was "
        "never trained on a prompt of the two; synergy depends on that prompt, the other parts do not.",
        bench.note,
    )
    return Table("shares", "Redundancy and synergy by kind of pair", rows, notes)


def planted(bench: PidBench) -> Table:
    """Redundancy minus synergy, next to the information two words carry about each other in the grammar."""
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
                "measured minus grammar": with_interval(measured.minus(true)),
            }
        )
    notes = (
        "Bits. Measured: redundancy minus synergy given the rest of the caption, direct estimate. Grammar: log2 "
        "p(both | rest) / (p(one | rest) p(other | rest)), which a perfect model would give where the image shows what "
        "both words say.",
        bench.note,
    )
    return Table("planted", "Redundancy minus synergy, measured and under the grammar", rows, notes)


def homonyms(bench: PidBench) -> Table:
    """Synergy of an object's word with the background's, where the object is."""
    rows: list[dict[str, Cell]] = []
    for given in ("nothing", "rest"):
        for kind in (HOMONYM, OBJECT_AND_BACKGROUND):
            found = bench.found(kind, given)
            synergy, together = (bench.mean(found.there[:, i]) for i in range(2))
            rows.append(
                {
                    "pair": kind.name,
                    "given": given,
                    "synergy": with_interval(synergy.estimate),
                    "both words": with_interval(together.estimate),
                    "synergy share": str(synergy.over(together)),
                }
            )
    notes = (
        "Bits in the object's cells, each weighted by the object's share of its pixels. A homonym names one of two "
        "objects, which the background mostly tells apart: if that shows, synergy is a larger share of both words' "
        "information than for objects of one sense.",
        bench.note,
    )
    return Table("homonyms", "Synergy of object and background, where the object is", rows, notes)


def _share_of_cells(labels: object, caption: Caption, word: str) -> Floats:
    """[h, w] share of each latent cell's pixels that show a word's object; 1 if the word names the background."""
    pixels = np.asarray(labels)
    rows, columns = (n // CELL for n in pixels.shape)
    if word not in caption.words:
        return np.ones((rows, columns))
    noun = NOUNS[NOUN_INDEX[caption.story.nouns[caption.words.index(word)]]]
    shown = np.isin(pixels, [OBJECT_INDEX[name] for name in noun.objects])
    shares_: Floats = shown.reshape(rows, CELL, columns, CELL).mean((1, 3))
    return shares_


EVALUATION = Evaluation(
    name="pid",
    title="Partial information decomposition",
    description=__doc__,
    settings=PidSettings(),
    quick=QUICK,
    bench=lambda subject, settings: PidBench(subject.model, settings),
    parts=(shares, planted, homonyms),
)
