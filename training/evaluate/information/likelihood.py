"""The model's likelihood of painted scenes, in bits per dimension: with the scene's caption, without a caption, and
with another scene's caption.

Baselines: the standard normal distribution, and a normal distribution with the mean and the standard deviation of each
channel of the latents. Lower is better.
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
from training.evaluate.common.evaluation import Evaluation
from training.evaluate.common.masks import Resampled, resampled
from training.evaluate.common.proportions import with_interval
from training.evaluate.common.scenes import NO_TARGET
from training.picturebook.world.scenes import caption_of, make_scene, paint

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LikelihoodSettings:
    """How much is measured."""

    n_scenes: int = 32
    """Held-out painted scenes."""
    n_fit: int = 200
    """Training scenes on which the channels' mean and standard deviation are fitted."""
    n_bootstrap: int = 2000
    """Bootstrap resamples of the scenes for each interval."""


QUICK = LikelihoodSettings(n_scenes=4, n_fit=20)
"""A smoke test; its figures mean little."""


class Found(NamedTuple):
    """Bits per dimension, one row per scene."""

    captioned: Floats
    """[N] with the scene's caption."""
    uncaptioned: Floats
    """[N] without a caption."""
    miscaptioned: Floats
    """[N] with the next scene's caption."""
    channels: Floats
    """[N] under the normal distribution per channel."""
    standard: Floats
    """[N] under the standard normal distribution."""
    gains: Floats
    """[N, 2] bits saved in the whole image by the scene's caption, and by the next scene's."""
    errors: Floats
    """[N, 2, S] squared errors per dimension along log-SNR, without and with the caption."""


class LikelihoodBench:
    """The likelihoods of the scenes; measured once, on first use."""

    def __init__(self, model: Diffuser, settings: LikelihoodSettings) -> None:
        self._model, self.settings = model, settings
        self.last: Likelihood | None = None

    @cached_property
    def found(self) -> Found:
        """The measurements."""
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
        """The mean of one figure per scene."""
        return resampled(values[:, None], self.settings.n_bootstrap)


def bits(bench: LikelihoodBench) -> Table:
    """Bits per dimension, and the bits a caption saves."""
    found = bench.found
    named = {
        "the model, with the caption": (found.captioned, found.gains[:, 0]),
        "the model, without a caption": (found.uncaptioned, None),
        "the model, with another scene's caption": (found.miscaptioned, found.gains[:, 1]),
        "normal distribution per channel": (found.channels, None),
        "standard normal distribution": (found.standard, None),
    }
    rows: list[dict[str, Cell]] = []
    for name, (figures, gain) in named.items():
        apart = bench.mean(figures).minus(bench.mean(found.uncaptioned))
        rows.append(
            {
                "density": name,
                "bits per dimension": with_interval(bench.mean(figures).estimate, ".3f"),
                "minus the model's without a caption": None
                if figures is found.uncaptioned
                else with_interval(apart, "+.3f"),
                "bits saved in the image": None if gain is None else with_interval(bench.mean(gain).estimate, ".1f"),
            }
        )
    if (last := bench.last) is None:
        raise AssertionError("the scenes were measured")
    low, high = last.log_snr_range
    notes = (
        f"-log2 p of the latents of {bench.settings.n_scenes} held-out painted scenes over their {last.n_dims} "
        f"dimensions, integrated over log-SNR {low:.2f} to {high:.2f}, the range the model was trained on. Outside it "
        "the model is assumed to be as good as the standard normal, so that the true figure is lower by what it knows "
        f"about finer details. {last.n_replicates} replicates of {WIDE.n_points} noise samples. The bits saved are the "
        "direct information of the whole caption. 95 % intervals over scenes in brackets.",
    )
    edges = last.edges
    details = {"edges": edges.tolist(), "errors": found.errors.mean(0).tolist(), "normal": last.normal_errors.tolist()}
    return Table("bits", "Bits per dimension", rows, notes, details)


def curves(bench: LikelihoodBench) -> Table:
    """The squared errors that are integrated, in six ranges of log-SNR."""
    found = bench.found
    if (last := bench.last) is None:
        raise AssertionError("the scenes were measured")
    widths = np.diff(last.edges)
    rows: list[dict[str, Cell]] = []
    for part in np.array_split(np.arange(len(widths)), 6):
        if not (span := widths[part].sum()):
            continue
        shown: dict[str, Cell] = {"log-SNR": f"{last.edges[part[0]]:.1f} to {last.edges[part[-1] + 1]:.1f}"}
        for side, name in enumerate(("without the caption", "with the caption")):
            values = (found.errors[:, side, part] * widths[part]).sum(1) / span
            shown[name] = with_interval(bench.mean(values).estimate, ".4f")
        apart = ((found.errors[:, 0, part] - found.errors[:, 1, part]) * widths[part]).sum(1) * last.n_dims
        shown["bits of the caption"] = with_interval(bench.mean(apart / (2 * math.log(2))).estimate, ".2f")
        shown["standard normal"] = round(float((last.normal_errors[part] * widths[part]).sum() / span), 4)
        rows.append(shown)
    note = (
        "Mean squared error of the predicted noise per dimension; half the area between the two is the caption's bits."
    )
    return Table("curves", "Squared error of the predicted noise", rows, (note,))


EVALUATION = Evaluation(
    name="likelihood",
    title="Likelihood",
    description=__doc__,
    settings=LikelihoodSettings(),
    quick=QUICK,
    bench=lambda subject, settings: LikelihoodBench(subject.model, settings),
    parts=(bits, curves),
)
