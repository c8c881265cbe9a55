"""How well the model expects true scenes: its own bits a dimension, with a scene's caption, without, with another's.

Beside two densities that know less: the standard normal that the model's are counted from, and a normal with the mean
and the spread of each channel of the latents.
"""

import logging
import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

import core
from core.arrays import Floats
from core.diffusion.diffuser import Diffuser
from core.information.likelihood import WIDE, Likelihood
from training.common.report import Cell, Table
from training.evaluate.common.masks import Resampled, resampled
from training.evaluate.common.proportions import with_interval
from training.evaluate.picturebook import NO_TARGET
from training.picturebook.world.scenes import caption_of, make_scene, paint

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """How much is measured."""

    n_scenes: int = 32
    """Held-out true scenes."""
    n_fit: int = 200
    """Training scenes from which the channels' mean and spread are taken."""
    n_bootstrap: int = 2000
    """Resamples of the scenes for each interval."""


QUICK = Settings(n_scenes=4, n_fit=20)
"""Shows that it works; its figures mean little."""


class Found(NamedTuple):
    """Bits a dimension, a row a scene."""

    captioned: Floats
    uncaptioned: Floats
    miscaptioned: Floats
    """With the next scene's caption."""
    channels: Floats
    """By the normal of the channels."""
    standard: Floats
    """By the standard normal."""
    gains: Floats
    """[N, 2] bits that the scene's own caption saves in the whole picture, and the next scene's."""
    errors: Floats
    """[N, 2, S] the curves of squared errors a dimension, without and with the caption."""


class Bench:
    """The scenes: measured once, when first asked for."""

    def __init__(self, model: Diffuser, settings: Settings) -> None:
        self._model, self.settings = model, settings
        self.last: Likelihood | None = None

    @cached_property
    def found(self) -> Found:
        """What was measured."""
        x = torch.cat([self._latents(seed, "train") for seed in range(self.settings.n_fit)]).double()
        mean, spread = x.mean((0, 2, 3), keepdim=True), x.std((0, 2, 3), keepdim=True)
        rows = [self._measure(seed, mean, spread) for seed in range(self.settings.n_scenes)]
        return Found(*(np.array(column) for column in zip(*rows, strict=True)))

    def _latents(self, seed: int, split: str) -> torch.Tensor:
        return self._model.encode(Image.fromarray(paint(make_scene(seed, split)).image)).cpu()  # type: ignore[arg-type]

    def _measure(self, seed: int, mean: torch.Tensor, spread: torch.Tensor) -> tuple[object, ...]:
        if seed % 8 == 0:
            log.info("likelihood: scene %d of %d", seed, self.settings.n_scenes)
        x = self._latents(seed, "test")
        captions = [caption_of(make_scene(number, "test")).text for number in (seed, seed + 1)]
        own, other = (core.likelihood(self._model, x, text, error=NO_TARGET, seed=seed) for text in captions)
        self.last = own
        normal = ((x.double() - mean) / spread).square().mean() / 2 + spread.log().mean()
        constant = math.log(2 * math.pi) / 2
        return (
            own.bits_per_dim,
            own.unprompted_bits_per_dim,
            other.bits_per_dim,
            (float(normal) + constant) / math.log(2),
            (float(x.double().square().mean()) / 2 + constant) / math.log(2),
            (own.gain, other.gain),
            own.errors,
        )

    def mean(self, values: Floats) -> Resampled:
        """The mean of one figure a scene."""
        return resampled(values[:, None], self.settings.n_bootstrap)


def bits(bench: Bench) -> Table:
    """Bits a dimension, and what a caption saves."""
    found = bench.found
    named = {
        "the model, with the caption": (found.captioned, found.gains[:, 0]),
        "the model, without": (found.uncaptioned, None),
        "the model, with another scene's caption": (found.miscaptioned, found.gains[:, 1]),
        "a normal with each channel's mean and spread": (found.channels, None),
        "the standard normal": (found.standard, None),
    }
    rows: list[dict[str, Cell]] = []
    for name, (figures, gain) in named.items():
        apart = bench.mean(figures).less(bench.mean(found.uncaptioned))
        rows.append(
            {
                "density": name,
                "bits a dimension": with_interval(bench.mean(figures).estimate, ".3f"),
                "less the model's without": None if figures is found.uncaptioned else with_interval(apart, "+.3f"),
                "saved in the picture, bits": None if gain is None else with_interval(bench.mean(gain).estimate, ".1f"),
            }
        )
    if (last := bench.last) is None:
        raise AssertionError("the scenes were measured")
    low, high = last.log_snr_range
    notes = (
        f"-log2 p of the latents of {bench.settings.n_scenes} held-out painted scenes over their {last.n_dims} "
        f"dimensions, integrated over log-SNR {low:.2f} to {high:.2f}, all that the model was trained on; outside, the "
        "model is taken to know no more than the standard normal, so that the true figure is lower by what it knows of "
        f"details finer than that. {last.n_replicates} replicates of {WIDE.n_points} noises. The caption's bits are "
        "the direct information of the whole caption. In brackets: 95 % intervals over scenes.",
    )
    edges = last.edges
    details = {"edges": edges.tolist(), "errors": found.errors.mean(0).tolist(), "normal": last.normal_errors.tolist()}
    return Table("bits", "The model's own bits a dimension", rows, notes, details)


def curves(bench: Bench) -> Table:
    """The squared errors that the bits come from, in six stretches of log-SNR."""
    found = bench.found
    if (last := bench.last) is None:
        raise AssertionError("the scenes were measured")
    widths = np.diff(last.edges)
    rows: list[dict[str, Cell]] = []
    for part in np.array_split(np.arange(len(widths)), 6):
        if not (span := widths[part].sum()):
            continue
        shown: dict[str, Cell] = {"log-SNR": f"{last.edges[part[0]]:.1f} to {last.edges[part[-1] + 1]:.1f}"}
        for side, name in enumerate(("without the caption", "with it")):
            values = (found.errors[:, side, part] * widths[part]).sum(1) / span
            shown[name] = with_interval(bench.mean(values).estimate, ".4f")
        apart = ((found.errors[:, 0, part] - found.errors[:, 1, part]) * widths[part]).sum(1) * last.n_dims
        shown["bits the caption tells there"] = with_interval(bench.mean(apart / (2 * math.log(2))).estimate, ".2f")
        shown["a standard normal's"] = round(float((last.normal_errors[part] * widths[part]).sum() / span), 4)
        rows.append(shown)
    note = (
        "Mean squared error of the guessed noise, a dimension; half the area between the curves is the caption's bits."
    )
    return Table("curves", "Squared errors of the guessed noise", rows, (note,))


PARTS = (bits, curves)
"""In this order."""
