"""Results of measurements of information. Imports no torch, so that stored results can be shown without it.

`Attribution` is here; the results of `decompose`, `rank_captions` and `likelihood` extend the same `Measurement`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import numpy as np

from core.arrays import Bools, Floats

Stopped = Literal["converged", "budget", "cancelled"]
Given = Literal["rest", "nothing"]
ResultT = TypeVar("ResultT")

STOPPING_FACTOR = 1.12
"""Widening of the intervals of a run that stopped because its error was small enough. Checking the error repeatedly
stops runs at moments when it is underestimated. Without this factor, 95 % intervals of normal replicates checked after
4, 6, 8, 12, ... 64 cover as few as 92.1 % (the worst over their spread); with it 94.4 to 97.1 %. Simulated beforehand,
so it depends on no result."""


class Timeline(NamedTuple):
    """Information by log-SNR: bits per unit of log-SNR in one bin per sampler step, noise first."""

    edges: Floats
    """[S + 1] log-SNR, rising. The bin of a step outside the integrated range has width 0."""
    bits: Floats
    """[W, S] bits per unit of log-SNR; times the widths of the bins, they add up to a word's bits."""
    stderr: Floats
    """[W, S] standard errors of `bits`."""


class Curves(NamedTuple):
    """Squared errors of the predicted noise without and with each word, in the timeline's bins.

    Summed over the latents, mean over a bin; 0 in a bin of width 0. Half the area between a word's two curves is its
    direct information, in nats (Guo, Shamai & Verdu 2005; Kong et al. 2024, arXiv 2310.07972).
    """

    without: Floats
    """[W, S] error under the condition alone: the rest of the prompt, or nothing."""
    without_stderr: Floats
    """[W, S] its standard error. Both curves share their noise, so their difference has a smaller error than either."""
    with_word: Floats
    """[W, S] error under the condition and the word."""
    with_word_stderr: Floats
    """[W, S] its standard error."""
    difference_stderr: Floats | None = None
    """[W, S] standard error of `without` minus `with_word`; None in results that were stored without it."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Measurement:
    """How an estimate of information was made; the base of all results."""

    n_evals: int
    """Latents through the U-Net, pilot included."""
    n_replicates: int
    """Independent replicates behind every mean and error; Student's t has one degree of freedom less."""
    stopped: Stopped
    """`converged`, `budget`, or `cancelled` (a partial result)."""
    rel_error: float
    """Relative error reached, of the worst estimate that the stopping rule checks."""
    seed: int
    """Seed of the noise."""
    settings: Mapping[str, Any]
    """Everything else needed to repeat the measurement; JSON-able."""

    def interval_factor(self, level: float = 0.95) -> float:
        """Half-width of a confidence interval, in standard errors of a total, a cell or a bin."""
        widened = STOPPING_FACTOR if self.stopped == "converged" else 1.0
        return widened * t_quantile((1 + level) / 2, self.n_replicates - 1)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form."""
        return {name: _plain(value) for name, value in vars(self).items()}


@dataclass(frozen=True, eq=False, kw_only=True)
class Attribution(Measurement):
    """Bits of information of each word about an image, in total, by cell and by log-SNR. All arrays are float64.

    `rel_error` is that of the worst word: standard error over max(its bits, a tenth of the largest word's).
    """

    words: tuple[str, ...]
    """The W words measured, lower case, in the order of the prompt."""
    bits: Floats
    """[W] orthogonal estimate of each word's information about the image, in bits; never negative."""
    stderr: Floats
    """[W] its standard error, over replicates."""
    maps: Floats
    """[W, h, w] bits per latent cell, adding up to `bits`."""
    map_stderr: Floats
    """[W, h, w] standard error of each cell."""
    direct_bits: Floats
    """[W] direct estimate; negative where the word makes the image less likely under the model."""
    direct_stderr: Floats
    """[W] its standard error; the stopping rule does not check it."""
    timeline: Timeline
    """The bits by log-SNR."""
    prompt_bits: float | None
    """Orthogonal estimate of the whole prompt against the empty text, in bits; None if it was not requested."""
    prompt_stderr: float | None
    """Its standard error."""
    prompt: str
    """The prompt as typed."""
    given: Given
    """The condition of each word's bits: the `rest` of the prompt (CMI), or `nothing` (MI)."""
    curves: Curves | None = None
    """Errors whose difference gives the direct bits; None in results that were stored without them."""

    def interval(self, level: float = 0.95) -> tuple[Floats, Floats]:
        """Confidence limits of `bits`: low and high, [W] each."""
        half = self.interval_factor(level) * self.stderr
        return self.bits - half, self.bits + half

    @property
    def contradicts(self) -> Bools:
        """[W] whether the word contradicts the image: its direct bits are significantly negative."""
        clearly_wrong: Bools = self.direct_bits < -self.interval_factor() * self.direct_stderr
        return clearly_wrong

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Attribution":
        """The result that `to_dict` made."""
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


class Progress(NamedTuple, Generic[ResultT]):
    """Progress of a measurement, after a U-Net call."""

    n_evals: int
    """Latents through the U-Net so far."""
    max_evals: int
    """The budget of latents; most runs end long before it."""
    n_replicates: int
    """Replicates finished so far."""
    rel_error: float
    """`rel_error` of the result so far; infinite until two replicates are finished."""
    partial: ResultT | None
    """The result from the replicates finished so far; None until there are two."""
    expected_evals: int
    """Latents at which the run is expected to stop, given the present error."""


class AttributionProgress(Progress[Attribution]):
    """Progress of an attribution, after a U-Net call."""


def mean_and_stderr(replicates: Floats) -> tuple[Floats, Floats]:
    """Mean over replicates (the first axis), and its standard error."""
    return replicates.mean(0), replicates.std(0, ddof=1) / math.sqrt(len(replicates))


def t_quantile(p: float, df: int) -> float:
    """Quantile of Student's t with an integer number of degrees of freedom, for 0.5 <= p < 1, by bisection."""
    if not 0.5 <= p < 1 or df < 1:
        raise ValueError(f"t_quantile needs 0.5 <= p < 1 and df >= 1, not p = {p}, df = {df}.")
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
