"""Where on the log-SNR line to look, with which noise, and with what weight.

Every estimate here is an integral over log-SNR of an expectation over Gaussian noise. A replicate is one unbiased
estimate of it from `n_points` noise samples; replicates are independent, so their spread is the error.
"""

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from core.arrays import Floats


@dataclass(frozen=True)
class Sampler:
    """How noise samples are drawn. The defaults are the fast way; each switch turns one part of it off."""

    loc: float = 1.0
    """Location of the truncated logistic over log-SNR, and centre of its range."""
    scale: float = 12.0
    """Its scale. 12 is as good as flat. The published 2 (Kong et al. 2024, arXiv 2310.07972) hardly looks below -3,
    where places and other large things are told: on `picturebook`, independent draws from it need about twice as many
    samples."""
    clip: float = 0.5
    """The range ends this many scales on either side of `loc`: -5 to 7, as published. What lies outside is left out."""
    profile: tuple[float, ...] = ()
    """How often to look into each of equally likely pieces of the logistic, in any unit; none: equally often. A model's
    own, measured beforehand on other pictures, stands in its spec: on `picturebook` it saves a third of the
    evaluations. A density fitted to the very picture would save no more, and costs a pilot."""
    n_points: int = 8
    """Noise samples in a replicate."""
    min_replicates: int = 8
    """Replicates before the first look at the error; looks follow at 1.5, 2, 3, 4, 6... times as many."""
    stratified: bool = True
    """Quantiles of the density, evenly spaced with one random shift a replicate; False: independent draws."""
    antithetic: bool = True
    """Each noise is used with both signs, at two log-SNRs that mirror each other in their stratum."""
    shared: bool = True
    """One noise and one batch for all words; False: each word has its own noise, and its own prompts."""
    fitted: bool = False
    """Fit the density to the integrand on a pilot that is left out of the estimate, in the place of `profile`."""
    n_pilot: int = 16
    """Noise samples of the pilot."""
    prompts_per_word: int = 2
    """Prompts evaluated a noise sample where nothing is shared: the 2 that are compared, or 3 as in the published code,
    which evaluates the empty prompt as well and does not use it."""

    def __post_init__(self) -> None:
        if self.n_points < 2 or self.n_points % 2 or self.min_replicates < 2:
            raise ValueError("n_points has to be even and at least 2, min_replicates at least 2.")
        if any(weight <= 0 for weight in self.profile):
            raise ValueError(f"Every weight of a profile has to be positive, not {min(self.profile)}.")
        if self.prompts_per_word not in (2, 3):
            raise ValueError(f"prompts_per_word is 2 or 3, not {self.prompts_per_word}.")

    @classmethod
    def published(cls, prompts_per_word: int = 3) -> "Sampler":
        """Plain importance sampling as in Kong et al.'s code: independent logistic draws, each word by itself."""
        return cls(
            scale=2.0, clip=3.0, stratified=False, antithetic=False, shared=False, prompts_per_word=prompts_per_word
        )

    def density(self, trained_range: tuple[float, float]) -> "Density":
        """The density over the range, inside the log-SNRs that the model was trained on."""
        low = max(self.loc - self.scale * self.clip, trained_range[0])
        high = min(self.loc + self.scale * self.clip, trained_range[1])
        if low >= high:
            raise ValueError(f"The log-SNR range of {self} does not meet the trained range {trained_range}.")
        density = Density(self.loc, self.scale, low, high)
        if not self.profile or self.fitted:
            return density
        return replace(density, knots=_knots(np.array(self.profile)))


@dataclass(frozen=True, eq=False)
class Density:
    """A density over log-SNR: a truncated logistic, reshaped by a piecewise linear map of its quantiles."""

    loc: float
    """Location of the logistic."""
    scale: float
    """Its scale."""
    low: float
    """Smallest log-SNR."""
    high: float
    """Largest log-SNR."""
    knots: Floats = field(default_factory=lambda: np.array([0.0, 1.0]))
    """[K + 1], rising from 0 to 1: the density's own distribution function at K + 1 evenly spaced quantiles of the
    truncated logistic; (0, 1) is the logistic itself."""

    def quantile(self, u: Floats) -> Floats:
        """Log-SNR below which a share u of the density lies."""
        v = np.interp(u, self.knots, np.linspace(0, 1, len(self.knots)))
        below, above = self._logistic_cdf(np.array([self.low, self.high]))
        p = below + v * (above - below)
        log_snr: Floats = self.loc + self.scale * np.log(p / (1 - p))
        return np.clip(log_snr, self.low, self.high)

    def pdf(self, log_snr: Floats) -> Floats:
        """Probability per unit of log-SNR."""
        below, above = self._logistic_cdf(np.array([self.low, self.high]))
        p = self._logistic_cdf(log_snr)
        n = len(self.knots) - 1
        piece = ((p - below) / (above - below) * n).astype(int).clip(0, n - 1)
        density: Floats = np.diff(self.knots)[piece] * n * p * (1 - p) / (self.scale * (above - below))
        return density

    def _logistic_cdf(self, log_snr: Floats) -> Floats:
        return np.asarray(1 / (1 + np.exp((self.loc - log_snr) / self.scale)), np.float64)


class Draw(NamedTuple):
    """The noise samples of one replicate: an integral of f is estimated by sum(weight * f)."""

    log_snr: Tensor
    """[n] float64."""
    weight: Tensor
    """[n] float64: one over n times the density."""
    noise: Tensor
    """[n, C, h, w] float32, standard normal."""


def draw(sampler: Sampler, density: Density, shape: tuple[int, ...], key: tuple[int, ...]) -> Draw:
    """One replicate. `key` (seed, replicate, ...) alone decides the randomness: not the words, nor the batch size."""
    generator = torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1))
    n = sampler.n_points // 2 if sampler.antithetic else sampler.n_points
    first, second = _strata(n, generator) if sampler.stratified else _independent(n, generator)
    noise = torch.randn(n, *shape, generator=generator)
    u = first.numpy()
    if sampler.antithetic:
        u = torch.stack([first, second], dim=1).flatten().numpy()
        noise = torch.stack([noise, -noise], dim=1).flatten(0, 1)
    log_snr = density.quantile(u)
    weight = 1 / (len(log_snr) * density.pdf(log_snr))
    return Draw(torch.from_numpy(log_snr), torch.from_numpy(weight), noise)


def _strata(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """n evenly spaced points of (0, 1) under one random shift, and their mirror images, each in its stratum.

    Each is uniform, and together they leave no gap. What rises along a stratum is too large at the one as it is too
    small at the other, so that a pair of them errs in the curvature alone.
    """
    strata = torch.arange(n, dtype=torch.float64)
    shift = torch.rand((), generator=generator, dtype=torch.float64)
    return (strata + shift) / n, (strata + 1 - shift) / n


def _independent(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    u = torch.rand(n, generator=generator, dtype=torch.float64)
    return u, 1 - u


def fit(density: Density, log_snr: Floats, values: Floats, share_kept: float = 0.1) -> Density:
    """A density that follows the integrand, from a pilot.

    values [P, n] are the integrands of P comparisons at log_snr [n], one in each n-th of `density`, not yet reshaped.
    The best density for one integrand is in proportion to the root of its mean square (Owen 2013, ch. 9); for several,
    each scaled by its own integral, to the root of the mean of those. Neighbours are averaged, because every value is
    one noisy draw; `share_kept` of the old density bounds every weight.
    """
    ratio = values / density.pdf(log_snr)
    mean = ratio.mean(1, keepdims=True)
    relative = np.divide(ratio, mean, out=np.ones_like(ratio), where=mean > 0)
    strength = np.sqrt((relative**2).mean(0))
    padded = np.pad(strength, 1, mode="edge")
    smooth = padded[:-2] / 4 + padded[1:-1] / 2 + padded[2:] / 4
    shares = share_kept / len(smooth) + (1 - share_kept) * smooth / smooth.sum()
    return replace(density, knots=_knots(shares))


def _knots(weights: Floats) -> Floats:
    """The distribution function at the ends of evenly likely pieces, from what each of them weighs."""
    return np.concatenate([[0.0], np.cumsum(weights / weights.sum())[:-1], [1.0]])
