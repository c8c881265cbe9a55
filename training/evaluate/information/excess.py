"""How many bits the model gives words beyond what they can tell: the part of a measurement that is its own error.

Direct bits of the words of held-out painted scenes, less what each can tell: its surprisal given the rest of the
caption, less the choice between words for the same thing, which no image shows. A denoiser's error exceeds the optimal
one's by some amount with the word and by more without it, since captions without a word are rarer in training; only the
difference of the two can be identified, and only as a total, where the word's own part is known. The total is a lower
bound where an image does not show the word.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import log2
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

import core
from core.arrays import Floats, Ints
from core.diffusion.diffuser import Diffuser
from core.diffusion.text import distinct_words
from core.files import write_text
from core.information.measuring import sampler_for
from core.information.results import t_quantile
from core.information.surprisal import CEILINGS, EXCESS, unet_digest
from training.common.report import Cell, Table
from training.evaluate.common.evaluation import Evaluation
from training.evaluate.common.proportions import with_interval
from training.evaluate.common.scenes import NO_TARGET
from training.evaluate.information.words import BACKGROUND, KINDS, OBJECT, OTHER, kind_of
from training.picturebook.world.captions import Caption, log2_word_given_rest, sample_caption, sample_story
from training.picturebook.world.scenes import caption_of, make_scene, paint
from training.picturebook.world.world import BACKGROUND_INDEX, BACKGROUNDS, NOUN_INDEX, NOUNS

N_CAPTIONS = 1500
"""Captions from which the ceilings are taken."""
N_SPLITS = 200
"""Random halves of the scenes in the check: a correction is fitted on one half and tested on the other."""
LEAST_COVERAGE = 0.9
"""Share of 95 % intervals that have to hold the truth before one is offered."""
N_BINS = 500
"""Bins of log-SNR in which bits are measured, narrow enough to be added up between `EDGES`."""
EDGES = (-5.0, -3.0, -2.0, -1.0, 0.0, 2.0, 7.0)
"""Log-SNRs between which bits are reported."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExcessSettings:
    """How much is measured."""

    n_scenes: int = 96
    """Held-out painted scenes."""
    n_replicates: int = 4
    """Replicates per scene."""


QUICK = ExcessSettings(n_scenes=6, n_replicates=2)
"""A smoke test; its figures mean little."""


class ToldWord(NamedTuple):
    """A word of a scene."""

    image: int
    """Number of the scene."""
    word: str
    kind: str
    """One of `KINDS`."""
    bits: float
    """Direct bits given the rest."""
    told: float
    """What it can tell, in bits."""
    by_log_snr: Floats
    """[6] its direct bits between `EDGES`."""


class Check(NamedTuple):
    """How a correction fitted on half of the scenes does on the other half, over random halves."""

    mean: float
    """Share of halves in which the interval of the corrected mean holds what the words can tell on average."""
    each: float
    """Share of words for which the interval of the corrected word holds what it can tell."""
    half_width: float
    """Half-width of that interval."""


def told_by(caption: Caption, word: str) -> float:
    """Bits that a word of a caption can tell beyond the rest: its surprisal, less the choice of the word itself."""
    surprisal = -log2_word_given_rest(caption, word)
    kind, story = kind_of(caption, word), caption.story
    if kind == OBJECT:
        return surprisal - log2(len(NOUNS[NOUN_INDEX[story.nouns[caption.words.index(word)]]].words))
    if kind == BACKGROUND:
        return surprisal - log2(len(BACKGROUNDS[BACKGROUND_INDEX[story.background]].words))
    return surprisal


def write_ceilings(folder: Path, n_captions: int = N_CAPTIONS) -> None:
    """Store each word's kind, and mean and maximum of what it can tell beyond the rest, over sampled captions."""
    rng = np.random.default_rng(0)
    found: dict[str, tuple[str, list[float]]] = {}
    for _ in range(n_captions):
        caption = sample_caption(rng, sample_story(rng))
        for word in content_words(caption):
            found.setdefault(word, (kind_of(caption, word), []))[1].append(told_by(caption, word))
    table = {
        word: [kind, round(float(np.mean(bits)), 3), round(max(bits), 3)]
        for word, (kind, bits) in sorted(found.items())
    }
    write_text(folder / CEILINGS, "{\n" + ",\n".join(f' "{w}": {json.dumps(e)}' for w, e in table.items()) + "\n}\n")


def content_words(caption: Caption) -> list[str]:
    """The words of a caption that say something about the image."""
    return [word for word in distinct_words(caption.text) if kind_of(caption, word) != OTHER]


class ExcessBench:
    """The words of the scenes; measured once, on first use."""

    def __init__(self, model: Diffuser, settings: ExcessSettings) -> None:
        self._model, self.settings = model, settings

    @cached_property
    def words(self) -> list[ToldWord]:
        """The words of all scenes."""
        found: list[ToldWord] = []
        for number in range(self.settings.n_scenes):
            if number % 8 == 0:
                log.info("excess: scene %d of %d", number, self.settings.n_scenes)
            found += self._measure(number)
        return found

    def _measure(self, number: int) -> list[ToldWord]:
        scene = make_scene(number, "test")
        caption = caption_of(scene)
        sampler = replace(sampler_for(self._model, None), min_replicates=self.settings.n_replicates)
        a = core.attribute(
            self._model,
            Image.fromarray(paint(scene).image),
            caption.text,
            words=content_words(caption),
            rel_error=NO_TARGET,
            sampler=sampler,
            num_inference_steps=N_BINS,
            seed=number,
        )
        assert a.curves is not None
        edges = a.timeline.edges
        gaps = (a.curves.without - a.curves.with_word) * np.diff(edges) / (2 * np.log(2))
        piece = np.digitize((edges[1:] + edges[:-1]) / 2, EDGES[1:-1])
        parts = np.stack([gaps[:, piece == i].sum(1) for i in range(len(EDGES) - 1)], axis=1)
        return [
            ToldWord(number, word, kind_of(caption, word), float(bits), told_by(caption, word), part)
            for word, bits, part in zip(a.words, a.direct_bits, parts, strict=True)
        ]

    def write(self, folder: Path, unet: str) -> None:
        """Store the excess of each kind of word, as measured on a U-Net with this digest."""
        kinds = {}
        for kind in KINDS:
            if words := [word for word in self.words if word.kind == kind]:
                (bits, low, high), check = excess_of(words), check_of(words)
                told = float(np.mean([word.told for word in words]))
                kinds[kind] = {
                    "bits": round(bits, 2),
                    "low": round(low, 2),
                    "high": round(high, 2),
                    "n_words": len(words),
                    "half_width": round(check.half_width, 2) if is_of_use(check, told) else None,
                }
        write_text(folder / EXCESS, json.dumps({"unet": unet, "kinds": kinds}, indent=1) + "\n")


def excess_of(words: Sequence[ToldWord]) -> tuple[float, float, float]:
    """Mean of bits less what can be told, with its 95 % interval; the words of one scene are not independent."""
    of_scene: dict[int, list[float]] = {}
    for word in words:
        of_scene.setdefault(word.image, []).append(word.bits - word.told)
    sums, counts = (np.array([f(each) for each in of_scene.values()], float) for f in (sum, len))
    mean, n = float(sums.sum() / counts.sum()), len(sums)
    if n < 2:
        return mean, -np.inf, np.inf
    # The delta method for a ratio of means.
    stderr = float(np.sqrt(n / (n - 1) * ((sums - mean * counts) ** 2).sum()) / counts.sum())
    half = t_quantile(0.975, n - 1) * stderr
    return mean, mean - half, mean + half


def check_of(words: Sequence[ToldWord], n_splits: int = N_SPLITS) -> Check:
    """Fit the correction on one half of the scenes and test it on the other, over random halves."""
    images = np.array([word.image for word in words])
    excess = np.array([word.bits - word.told for word in words])
    rng = np.random.default_rng(0)
    means, each, widths = [], [], []
    for _ in range(n_splits):
        fit = _half(images, rng)
        if not 1 < fit.sum() < len(fit) - 1:
            continue
        first, second = ([w for w, inside in zip(words, side, strict=True) if inside] for side in (fit, ~fit))
        (a, *_, a_high), (b, *_, b_high) = excess_of(first), excess_of(second)
        means.append(abs(a - b) <= np.hypot(a_high - a, b_high - b))
        # Split conformal: the quantile of the residuals with the correction for their number.
        residuals = np.sort(np.abs(excess[fit] - a))
        rank = int(np.ceil(0.95 * (len(residuals) + 1)))
        width = float(residuals[rank - 1]) if rank <= len(residuals) else np.inf
        each.append((np.abs(excess[~fit] - a) <= width).mean())
        widths.append(width)
    return Check(*(float(np.mean(values)) if values else np.nan for values in (means, each, widths)))


def is_of_use(check: Check, told: float) -> bool:
    """Whether one image's figure may be corrected: the interval covers, and is narrower than from 0 to the ceiling."""
    return check.each >= LEAST_COVERAGE and 2 * check.half_width < told


def _half(images: Ints, rng: np.random.Generator) -> "np.ndarray[tuple[int], np.dtype[np.bool_]]":
    present = np.unique(images)
    return np.isin(images, rng.permutation(present)[: len(present) // 2])


def excess(bench: ExcessBench) -> Table:
    """What the model says beyond what words can tell, and whether a correction holds on other scenes."""
    rows: list[dict[str, Cell]] = []
    for kind in KINDS:
        if not (words := [word for word in bench.words if word.kind == kind]):
            continue
        bits, told = (float(np.mean([getattr(word, name) for word in words])) for name in ("bits", "told"))
        check = check_of(words)
        rows.append(
            {
                "word": kind,
                "words": len(words),
                "direct bits": bits,
                "can be told": told,
                "excess": with_interval(excess_of(words)),
                "a perfect model could not have told": f"{max(0.0, 1 - told / bits):.0%}" if bits > 0 else "none",
                "corrected mean holds": f"{check.mean:.0%}",
                "corrected word holds": f"{check.each:.0%}",
                "its half-width, bits": check.half_width if np.isfinite(check.half_width) else None,
                "one image corrected": "yes" if is_of_use(check, told) else "no",
            }
        )
    notes = (
        f"Words of {bench.settings.n_scenes} held-out painted scenes given the rest of the caption. 95 % intervals "
        "over scenes.",
        "Holds: a kind's mean excess, measured on one half of the scenes, is subtracted on the other; how often the "
        f"interval of its mean, and of each of its words, then holds what can be told. {N_SPLITS} random halves. One "
        "image is corrected only where the interval of a word covers and is narrower than from 0 to what can be told.",
    )
    return Table("excess", "Bits beyond what words can tell", rows, notes)


def by_log_snr(bench: ExcessBench) -> Table:
    """At which log-SNR the bits of each kind of word are, and from where on all of them are excess."""
    rows: list[dict[str, Cell]] = []
    for kind in KINDS:
        if not (words := [word for word in bench.words if word.kind == kind]):
            continue
        parts = np.mean([word.by_log_snr for word in words], axis=0)
        told = float(np.mean([word.told for word in words]))
        row: dict[str, Cell] = {"word": kind}
        row |= {f"{low:g} to {high:g}": float(part) for low, high, part in zip(EDGES, EDGES[1:], parts, strict=False)}
        above = np.flatnonzero(np.cumsum(parts) > told)
        row["all told by"] = f"{EDGES[1:][above[0]]:g}" if len(above) else "7"
        rows.append(row)
    notes = (
        "Mean direct bits in each interval of log-SNR. All told by: where the sum from the left passes what the words "
        "can tell; at least what lies to the right of it is excess.",
    )
    return Table("by_log_snr", "Bits by log-SNR", rows, notes)


EVALUATION = Evaluation(
    name="excess",
    title="Bits beyond what words can tell",
    description=__doc__,
    settings=ExcessSettings(),
    quick=QUICK,
    bench=lambda subject, settings: ExcessBench(subject.model, settings),
    parts=(excess, by_log_snr),
)


def write_tables(model: Diffuser, folder: Path, settings: ExcessSettings | None = None) -> None:
    """Store both tables in the folder of a model's assets; the model's weights are in its subfolder `model`."""
    write_ceilings(folder)
    ExcessBench(model, settings or ExcessSettings()).write(folder, unet_digest(folder / "model"))
