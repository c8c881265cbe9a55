"""Sampling of log-SNR and noise, and the weights of the samples.

Every estimate here is an integral over log-SNR of an expectation over Gaussian noise. A replicate is one unbiased
estimate of it from `n_points` noise samples, and the spread of replicates is the error. The strata of `interleaved`
consecutive replicates interleave; such blocks are independent.
"""

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from core.arrays import Floats

MANY = 8
"""Replicates from which on their spread is a fair estimate of the error: seven degrees of freedom."""
_SHIFT = 1
"""Tells the key of a block's shift from that of a draw."""


@dataclass(frozen=True)
class Sampler:
    """How noise samples are drawn. The defaults are the fastest; each switch turns off one of their techniques."""

    loc: float = 1.0
    """Location of the truncated logistic density over log-SNR, and centre of its range."""
    scale: float = 12.0
    """Scale of the logistic. 12 is nearly uniform. With 2, as in Kong et al. 2024 (arXiv 2310.07972), few samples fall
    below -3, where information about layout lies: on `picturebook`, independent draws then need about twice as many
    samples."""
    clip: float = 0.5
    """Half-width of the integrated range in scales: -5 to 7, as in Kong et al. 2024. The rest is left out."""
    profile: tuple[float, ...] = ()
    """Relative frequencies of samples in equally likely pieces of the logistic; empty: equal. A model's profile,
    measured beforehand on other images, is in its spec; on `picturebook` it saves a third of the evaluations. A density
    fitted to the image itself saves no more, and costs a pilot."""
    n_points: int = 4
    """Noise samples in a replicate."""
    min_replicates: int = 4
    """Replicates before the error is first checked; checks follow at 1.5, 2, 3, 4, 6, ... times as many."""
    stratified: bool = True
    """Evenly spaced quantiles of the density with one random shift per replicate; False: independent draws."""
    interleaved: int = 4
    """Consecutive replicates whose shifts are evenly spaced, so that together they have as many times finer strata.
    Small replicates give an error after few samples, large ones have a smaller error; this has both. 1: independent."""
    antithetic: bool = True
    """Use each noise with both signs, at two log-SNRs that mirror each other in their stratum."""
    shared: bool = True
    """Evaluate all words on the same noise; False: each word has noise and prompts of its own."""
    fitted: bool = False
    """Fit the density to the integrand on a pilot sample, instead of `profile`."""
    n_pilot: int = 16
    """Noise samples of the pilot."""
    prompts_per_word: int = 2
    """Prompts evaluated per noise sample and word if not `shared`: the 2 that are compared, or 3 as in the code of Kong
    et al. 2024, which also evaluates the empty prompt and does not use it."""

    exact_every: int | None = None
    """Where most noise samples are evaluated in half precision: of how many one is evaluated in float32, too. 1: all of
    them, and in float32 alone; None: decided by the measured time and rounding (`core.information.precision`)."""

    def __post_init__(self) -> None:
        if self.exact_every is not None and self.exact_every < 1:
            raise ValueError(f"exact_every is at least 1, not {self.exact_every}.")
        if self.interleaved not in (1, 2, 4, 8):
            raise ValueError(f"interleaved is 1, 2, 4 or 8, not {self.interleaved}.")
        if self.n_points < 2 or self.n_points % 2 or self.min_replicates < 2:
            raise ValueError("n_points has to be even and at least 2, min_replicates at least 2.")
        if any(weight <= 0 for weight in self.profile):
            raise ValueError(f"Every weight of a profile has to be positive, not {min(self.profile)}.")
        if self.prompts_per_word not in (2, 3):
            raise ValueError(f"prompts_per_word is 2 or 3, not {self.prompts_per_word}.")

    @classmethod
    def kong2024(cls, prompts_per_word: int = 3) -> "Sampler":
        """Importance sampling as in the code of Kong et al. 2024: independent logistic draws, each word by itself."""
        return cls(
            scale=2.0,
            clip=3.0,
            stratified=False,
            interleaved=1,
            antithetic=False,
            shared=False,
            prompts_per_word=prompts_per_word,
        )

    def density(self, trained_range: tuple[float, float]) -> "Density":
        """The sampling density, truncated to the log-SNRs that the model was trained on."""
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
    """Scale of the logistic."""
    low: float
    """Smallest log-SNR."""
    high: float
    """Largest log-SNR."""
    knots: Floats = field(default_factory=lambda: np.array([0.0, 1.0]))
    """[K + 1] values of the cumulative distribution at evenly spaced quantiles of the truncated logistic, rising from 0
    to 1; (0, 1) gives the logistic itself."""

    def quantile(self, u: Floats) -> Floats:
        """Quantiles: the log-SNR below which a share u of the density lies."""
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
    """One replicate. Its randomness depends on `key` (seed, replicate, ...) alone, not on words or the batch size."""
    generator = _generator(key)
    n = sampler.n_points // 2 if sampler.antithetic else sampler.n_points
    first, second = _strata(n, _shift(sampler, key, generator)) if sampler.stratified else _independent(n, generator)
    noise = torch.randn(n, *shape, generator=generator)
    u = first.numpy()
    if sampler.antithetic:
        u = torch.stack([first, second], dim=1).flatten().numpy()
        noise = torch.stack([noise, -noise], dim=1).flatten(0, 1)
    log_snr = density.quantile(u)
    weight = 1 / (len(log_snr) * density.pdf(log_snr))
    return Draw(torch.from_numpy(log_snr), torch.from_numpy(weight), noise)


def _generator(key: tuple[int, ...]) -> torch.Generator:
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1))


def _shift(sampler: Sampler, key: tuple[int, ...], generator: torch.Generator) -> float:
    """The shift of a replicate's strata, uniform in (0, 1): evenly spaced in a block of replicates.

    Half of a block, or a quarter, is evenly spaced too: the order is that of van der Corput.
    """
    if sampler.interleaved == 1:
        return float(torch.rand((), generator=generator, dtype=torch.float64))
    seed, replicate, *rest = key
    block, member = divmod(replicate, sampler.interleaved)
    start = float(torch.rand((), generator=_generator((seed, block, *rest, _SHIFT)), dtype=torch.float64))
    n_bits = sampler.interleaved.bit_length() - 1
    turned = int(f"{member:0{n_bits}b}"[::-1], 2)
    return (start + turned / sampler.interleaved) % 1


def block_size(n: int, interleaved: int) -> int:
    """How many consecutive ones of n replicates to take as one, for the spread to be the error.

    As many as interleave, since together they are finer and blocks are independent; fewer if fewer than `MANY` blocks
    would be left. The spread of what interleaves is too large an error, as for any stratified sample.
    """
    sizes = [size for size in (1, 2, 4, 8) if size <= interleaved and n % size == 0 and n // size >= MANY]
    return max(sizes, default=1)


def _strata(n: int, shift: float) -> tuple[Tensor, Tensor]:
    """n evenly spaced points of (0, 1), shifted, and their mirror images, each within its stratum.

    Each point is uniform. The linear part of a function over a stratum cancels in a pair.
    """
    strata = torch.arange(n, dtype=torch.float64)
    return (strata + shift) / n, (strata + 1 - shift) / n


def _independent(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    u = torch.rand(n, generator=generator, dtype=torch.float64)
    return u, 1 - u


def fit(density: Density, log_snr: Floats, values: Floats, share_kept: float = 0.1) -> Density:
    """A density fitted to the integrand, from a pilot sample.

    values [P, n] are the integrands of P comparisons at log_snr [n], one in each n-th of `density`, not yet reshaped.
    The optimal density for one integrand is proportional to the root of its mean square (Owen 2013, ch. 9); for
    several, to the root of the mean of those, each relative to its integral. Neighbours are averaged, because each
    value is one noisy draw; mixing in `share_kept` of the old density bounds the weights.
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
    """The cumulative distribution at the ends of equally likely pieces, from their weights."""
    return np.concatenate([[0.0], np.cumsum(weights / weights.sum())[:-1], [1.0]])
