"""At which log-SNR the maps of a model's words have the largest variance, and what else could reduce their error.

Measured on training scenes. The first table gives the sampling profile stored in a model's spec
(`core.spec.ModelSpec`). The second gives, from the same samples, the gain of that profile on scenes it was not fitted
on, and the gains of methods that `core.information` does without: an allocation fitted on the prompt itself, and
control variates of known mean.
"""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch

from core.arrays import Floats
from core.diffusion.diffuser import Diffuser
from core.information.attribution import choose_words, compare
from core.information.estimator import noisy
from core.information.quadrature import Sampler, draw
from training.benchmark.arithmetic import Indices, Interval, interval, resamples
from training.benchmark.benchmark import Benchmark
from training.benchmark.prompts import Sample, scenes_with
from training.common.report import Cell, Table

log = logging.getLogger(__name__)

FLAT_SHARE = 0.3
"""Uniform share of a profile. It bounds the loss on a scene unlike the others, keeps the error of the direct estimate,
which varies less over log-SNR, from growing, and leaves samples in every bin of a timeline. Of profiles fitted on other
images, .4, .3, .2 and .1 were equally good on average on seven images; below .3 one of them lost."""
RUN = 64
"""Noise samples of a run, against which those of a pilot count."""


@dataclass(frozen=True)
class DensitySettings:
    """How much is measured."""

    lengths: tuple[int, ...] = (3, 6, 10)
    """Distinct words in a prompt."""
    n_prompts: int = 5
    """Prompts of each length."""
    n_pieces: int = 12
    """Intervals of log-SNR, equally likely under the flat density."""
    n_noises: int = 8
    """Independent noise samples in each interval; half of them serve as a pilot."""
    batch_size: int = 32
    """Most latents in a U-Net call."""


QUICK = DensitySettings(lengths=(3,), n_prompts=3, n_noises=4)
"""A smoke test; its figures mean little."""


class Spread(NamedTuple):
    """Single noise samples of one prompt, by interval of log-SNR."""

    maps: Floats
    """[K, J, W, h, w] integrand of W words for J noise samples in each of K intervals, over the norm of the word's
    map."""
    longer: Floats
    """[K, J, h, w] squared norm of the noise in a cell, minus its mean."""
    along: Floats
    """[K, J, W, h, w] product of the noise with the word's mean effect on the prediction under the other noise samples
    of the interval; of mean 0."""

    def variance(self, which: slice = slice(None)) -> Floats:
        """[K, W] variance of a single sample's map, summed over cells."""
        return np.asarray(self.maps[:, which].var(1, ddof=1).sum((2, 3)))


def tables(model: Diffuser, settings: DensitySettings) -> list[Table]:
    """The profile, and the gains of other methods."""
    spreads: list[Spread] = []
    for n_words in settings.lengths:
        for number, sample in enumerate(scenes_with(n_words, settings.n_prompts, "train")):
            log.info("density: %d words, prompt %d of %d", n_words, number + 1, settings.n_prompts)
            spreads.append(measure(model, sample, settings, len(spreads)))
    drawn = resamples(np.repeat(settings.lengths, settings.n_prompts))
    note = (
        f"{len(spreads)} training scenes, {settings.n_prompts} each with captions of "
        f"{', '.join(map(str, settings.lengths))} distinct words, every word given the rest; {settings.n_noises} "
        f"independent noise samples in each of {settings.n_pieces} intervals. 95 % bootstrap intervals over scenes."
    )
    return [_profile_table(model, spreads, drawn, settings, note), _variance_table(spreads, drawn, settings, note)]


@torch.no_grad()
def measure(model: Diffuser, sample: Sample, settings: DensitySettings, seed: int) -> Spread:
    """One prompt's words under `n_noises` noise samples in each interval."""
    comparisons = compare(sample.prompt, choose_words(sample.prompt, None), "rest")
    texts = [sample.prompt, *(comparison.context for comparison in comparisons)]
    sampler = Sampler(n_points=settings.n_pieces * settings.n_noises, antithetic=False)
    samples = draw(sampler, sampler.density(model.schedule.log_snr_range), model.latent_shape, (seed, 0))
    x_a = noisy(model.encode(sample.image)[0], samples.log_snr, samples.noise)
    conditions = model.encode_text(texts)
    parts = []
    stride = max(1, settings.batch_size // len(texts))
    with model.busy():
        for at in range(0, len(x_a), stride):
            rows = slice(at, at + stride)
            x, a, n = x_a[rows], samples.log_snr[rows], len(x_a[rows])
            x, a = x.repeat_interleave(len(texts), 0), a.repeat_interleave(len(texts))
            eps = model.predict_noise(x, a, conditions.repeat(n))
            eps = eps.reshape(n, len(texts), *eps.shape[1:]).cpu()
            parts.append((eps[:, :1] - eps[:, 1:]).double().numpy())
    shape = settings.n_pieces, settings.n_noises
    apart = np.concatenate(parts)
    noise = samples.noise.double().numpy()
    return spread_of(apart.reshape(*shape, *apart.shape[1:]), noise.reshape(*shape, *noise.shape[1:]))


def spread_of(apart: Floats, noise: Floats) -> Spread:
    """From the words' effects on the prediction [K, J, W, C, h, w] under noise [K, J, C, h, w]."""
    maps = (apart**2).sum(3)
    length = np.sqrt((maps.mean((0, 1)) ** 2).sum((1, 2)))
    n = apart.shape[1]
    others = (apart.sum(1, keepdims=True) - apart) / (n - 1)
    along = (others * noise[:, :, None]).sum(3)
    return Spread(maps / length[:, None, None], (noise**2).sum(2) - noise.shape[2], along)


def profile_of(spreads: Sequence[Spread], flat_share: float = FLAT_SHARE) -> Floats:
    """[K] relative sampling rate of each interval, 1 on average: partly uniform, partly following the spread of maps.

    The optimal density is proportional to the root of the words' mean variance (Owen 2013, ch. 9), averaged over
    prompts.
    """
    roots = [np.sqrt(spread.variance().mean(1)) for spread in spreads]
    followed = np.mean([root / root.mean() for root in roots], axis=0)
    return np.asarray(flat_share + (1 - flat_share) * followed)


def error(variance: Floats, profile: Floats | float = 1.0) -> float:
    """Relative error of a map from one sample, mean over words, for variances [K, W] and sampling rates [K]."""
    return float(np.sqrt((variance / np.broadcast_to(profile, len(variance))[:, None]).mean(0)).mean())


def controlled(spread: Spread, control: Floats) -> float:
    """Factor by which a control variate [K, J, W, h, w] of mean 0 reduces the evaluations for the same error.

    Its coefficients, one per interval and word, are fitted on half of the noise samples and used on the other half.
    """
    half = control.shape[1] // 2
    left, whole = np.zeros(spread.maps.shape[::2][:2]), np.zeros(spread.maps.shape[::2][:2])
    for fit, use in ((slice(half), slice(half, None)), (slice(half, None), slice(half))):
        maps, known = spread.maps[:, fit], control[:, fit]
        top = ((maps - maps.mean(1, keepdims=True)) * known).sum((1, 3, 4))
        coefficient = np.divide(top, (known**2).sum((1, 3, 4)))
        used = spread.maps[:, use] - coefficient[:, None, :, None, None] * control[:, use]
        left += used.var(1, ddof=1).sum((2, 3)) / 2
        whole += spread.maps[:, use].var(1, ddof=1).sum((2, 3)) / 2
    return (error(whole) / error(left)) ** 2


def _profile_table(
    model: Diffuser, spreads: Sequence[Spread], drawn: Indices, settings: DensitySettings, note: str
) -> Table:
    density = Sampler().density(model.schedule.log_snr_range)
    edges = density.quantile(np.linspace(0, 1, settings.n_pieces + 1))
    roots = np.array([np.sqrt(spread.variance().mean(1)) for spread in spreads])
    roots /= roots.mean(1, keepdims=True)
    profile = [round(float(weight), 2) for weight in profile_of(spreads)]
    rows: list[dict[str, Cell]] = []
    for piece, (low, high) in enumerate(pairwise(edges)):
        spread = interval(float(roots[:, piece].mean()), roots[drawn, piece].mean(1))
        rows.append(
            {"log-SNR": f"{low:.1f} to {high:.1f}", "spread of a sample": str(spread), "profile": profile[piece]}
        )
    notes = (
        "Spread: standard deviation of a single sample's map, mean over words, 1 on average over the intervals. "
        f"Profile: {FLAT_SHARE:.0%} uniform, the rest follows the spread. In the spec: "
        f"log_snr_profile={tuple(profile)}.",
        note,
    )
    details = {"settings": asdict(settings), "profile": profile}
    return Table("profile", "Variance of maps by log-SNR", rows, notes, details)


def _variance_table(spreads: Sequence[Spread], drawn: Indices, settings: DensitySettings, note: str) -> Table:
    half = settings.n_noises // 2
    pilot, rest = slice(half), slice(half, None)
    least = np.array([len(spread.maps) * half for spread in spreads])
    own, shared = [], []
    for i, spread in enumerate(spreads):
        others = [*spreads[:i], *spreads[i + 1 :]]
        fitted = profile_of([spread._replace(maps=spread.maps[:, pilot])])
        flat = error(spread.variance(rest))
        shared.append((flat / error(spread.variance(rest), profile_of(others))) ** 2)
        own.append((flat / error(spread.variance(rest), fitted)) ** 2)
    gains = {
        "profile fitted on other scenes (the default)": np.array(shared),
        "Neyman allocation after a pilot, not counting the pilot": np.array(own),
        f"the same, counting a pilot of {least[0]} against a run of {RUN}": np.array(own) * RUN / (RUN + least),
        "control variate: norm of the noise in the cell": np.array(
            [controlled(s, s.longer[:, :, None] * s.maps.mean((0, 1))) for s in spreads]
        ),
        "control variate: norm of the whole noise": np.array(
            [controlled(s, s.longer.mean((2, 3))[:, :, None, None, None] * s.maps.mean((0, 1))) for s in spreads]
        ),
        "control variate: projection of the noise on the effect under other noise": np.array(
            [controlled(s, s.along * np.sqrt(s.maps.mean((0, 1)))) for s in spreads]
        ),
    }
    rows: list[dict[str, Cell]] = [
        {"instead of a flat density over strata": name, "times fewer evaluations": str(_mean(gain, drawn))}
        for name, gain in gains.items()
    ]
    notes = (
        "Evaluations for the same relative error of maps, mean over words, within strata of log-SNR. The profile is "
        "fitted on all other scenes; Neyman allocation on half of the scene's own noise samples, and scored on the "
        "other half. A control variate's coefficients, one per interval and word, are fitted and used likewise.",
        note,
    )
    return Table("variance", "Ways to reduce the error", rows, notes)


def _mean(values: Floats, drawn: Indices) -> Interval:
    return interval(float(values.mean()), values[drawn].mean(1))


BENCHMARK = Benchmark(
    title="Sampling density over log-SNR",
    description=__doc__,
    settings=DensitySettings(),
    quick=QUICK,
    measure=lambda run, settings: tables(run.model, settings),
)
