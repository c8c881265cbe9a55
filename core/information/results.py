"""What measuring information returns. Numbers only: imports no torch, so that stored results can be shown without it.

`Attribution` is here; what `decompose` and `rank_captions` return stands beside them, built on the same `Measurement`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import numpy as np

from core.arrays import Bools, Floats

Stopped = Literal["converged", "budget", "cancelled"]
Given = Literal["rest", "nothing"]
Result = TypeVar("Result")

STOPPING_FACTOR = 1.08
"""Intervals of a run that stopped because its error looked small are this much wider: an error that is looked at
repeatedly stops the run the sooner the smaller it happens to look. Without it, normal replicates looked at after 8, 16,
32 and 64 are covered in as few as 93.2 % (the worst over their spread); with it in 94.5 to 96.3 %. Simulated
beforehand, so it depends on no result."""


class Timeline(NamedTuple):
    """When in the denoising each word spoke: bits per unit of log-SNR in one bin a sampler step, noise first."""

    edges: Floats
    """[S + 1] log-SNR, rising. A step outside the integrated range has a bin of no width."""
    bits: Floats
    """[W, S] bits per unit of log-SNR; times the bins' widths they add up to the word's bits."""
    stderr: Floats
    """[W, S] standard errors of `bits`."""


class Curves(NamedTuple):
    """How far the model's guesses of the noise are off, without and with each word, in the timeline's bins.

    Squared errors, summed over the latents, mean over a bin; 0 in one of no width. Half the area between a word's two
    curves is its direct information, in nats (Guo, Shamai & Verdu 2005; Kong et al. 2024, arXiv 2310.07972).
    """

    without: Floats
    """[W, S] given the rest of the prompt, or nothing."""
    without_stderr: Floats
    """[W, S] its standard error. The two curves share their noise: their difference is known better than either."""
    with_word: Floats
    """[W, S] given the word as well."""
    with_word_stderr: Floats
    """[W, S] its standard error."""
    difference_stderr: Floats | None = None
    """[W, S] the standard error of the first less the second; None in results that were stored without."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Measurement:
    """How an estimate of information came about, whatever was estimated."""

    n_evals: int
    """Latents that went through the U-Net, pilot included."""
    n_replicates: int
    """Independent replicates behind every mean and error: Student's t with one degree of freedom less."""
    stopped: Stopped
    """`converged`, `budget`, or `cancelled` (what was known when the work was stopped)."""
    rel_error: float
    """Reached relative error of the worst figure that the stopping rule looks at."""
    seed: int
    """Seed of the noise."""
    settings: Mapping[str, Any]
    """Everything else that it takes to repeat the result; JSON-able."""

    def interval_factor(self, level: float = 0.95) -> float:
        """Half-width of a confidence interval in standard errors, for totals, cells and bins alike."""
        widened = STOPPING_FACTOR if self.stopped == "converged" else 1.0
        return widened * t_quantile((1 + level) / 2, self.n_replicates - 1)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form."""
        return {name: _plain(value) for name, value in vars(self).items()}


@dataclass(frozen=True, eq=False, kw_only=True)
class Attribution(Measurement):
    """How many bits each word told the picture, where and when. All arrays are float64.

    `rel_error` is that of the worst word: standard error over max(its bits, a tenth of the largest word's).
    """

    words: tuple[str, ...]
    """The words asked for, lower case, in the prompt's order."""
    bits: Floats
    """[W] orthogonal estimate of each word's information in the picture, in bits; never negative."""
    stderr: Floats
    """[W] its standard error, over replicates."""
    maps: Floats
    """[W, h, w] bits a latent cell, adding up to `bits`."""
    map_stderr: Floats
    """[W, h, w] standard error of each cell."""
    direct_bits: Floats
    """[W] direct estimate, signed: negative where the word makes the picture less likely to the model."""
    direct_stderr: Floats
    """[W] its standard error; there is no target for it."""
    timeline: Timeline
    """When in the denoising the words spoke."""
    prompt_bits: float | None
    """Orthogonal estimate for the whole prompt against the empty text, in bits; None where it was not asked for."""
    prompt_stderr: float | None
    """Its standard error."""
    prompt: str
    """The prompt as typed."""
    given: Given
    """What each word's bits are given: the `rest` of the prompt (CMI), or `nothing` (MI)."""
    curves: Curves | None = None
    """What the direct bits are the difference of; None in results that were stored without."""

    def interval(self, level: float = 0.95) -> tuple[Floats, Floats]:
        """Confidence limits (low, high), [W] bits each, of `bits`."""
        half = self.interval_factor(level) * self.stderr
        return self.bits - half, self.bits + half

    @property
    def contradicts(self) -> Bools:
        """[W] whether the word disagrees with the picture: it moves the prediction, but significantly the wrong way."""
        clearly_wrong: Bools = self.direct_bits < -self.interval_factor() * self.direct_stderr
        return clearly_wrong

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Attribution":
        """The result that `to_dict` stored."""
        curves = data.get("curves")
        arrays = ("bits", "stderr", "maps", "map_stderr", "direct_bits", "direct_stderr")
        return cls(
            **{
                **data,
                **{name: np.asarray(data[name], dtype=np.float64) for name in arrays},
                "words": tuple(data["words"]),
                "timeline": Timeline(*(np.asarray(part, np.float64) for part in data["timeline"].values())),
                "curves": curves and Curves(**{name: part and np.asarray(part) for name, part in curves.items()}),
            }
        )


class Progress(NamedTuple, Generic[Result]):
    """How far a measurement is, after a U-Net call."""

    n_evals: int
    """Latents that went through the U-Net so far."""
    max_evals: int
    """The budget; most runs end long before it."""
    n_replicates: int
    """Replicates finished so far."""
    rel_error: float
    """The result's `rel_error` so far; infinite until two replicates are finished."""
    partial: Result | None
    """The result as it stands, from the replicates finished so far; None until there are two."""
    expected_evals: int
    """U-Net latents at which the run is expected to stop, at the present spread; what remaining time is told from."""


class AttributionProgress(Progress[Attribution]):
    """How far an attribution is, after a U-Net call."""


def mean_and_stderr(replicates: Floats) -> tuple[Floats, Floats]:
    """Mean over the first axis, and its standard error from the spread."""
    return replicates.mean(0), replicates.std(0, ddof=1) / math.sqrt(len(replicates))


def t_quantile(p: float, df: int) -> float:
    """Quantile of Student's t with an integer number of degrees of freedom, for 0.5 <= p < 1, by bisection."""
    if not 0.5 <= p < 1 or df < 1:
        raise ValueError(f"t_quantile wants 0.5 <= p < 1 and df >= 1, not p = {p}, df = {df}.")
    low, high = 0.0, 1.0
    while t_cdf(high, df) < p:
        low, high = high, 2 * high
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if t_cdf(middle, df) < p else (low, middle)
    return high


def t_cdf(t: float, df: int) -> float:
    """P(T <= t) for t >= 0: the finite series of Abramowitz & Stegun, 26.7.3 and 26.7.4."""
    theta = math.atan2(t, math.sqrt(df))
    sin, cos = math.sin(theta), math.cos(theta)
    total, term = 0.0, cos if df % 2 else 1.0
    for j in range(2 + df % 2, df + 1, 2):
        total += term
        term *= cos * cos * (j - 1) / j
    inside = 2 / math.pi * (theta + sin * total) if df % 2 else sin * total
    return 0.5 + 0.5 * inside


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    if hasattr(value, "_asdict"):
        return {name: _plain(part) for name, part in value._asdict().items()}
    if isinstance(value, tuple):
        return [_plain(part) for part in value]
    return dict(value) if isinstance(value, Mapping) else value
