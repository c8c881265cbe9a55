"""Two precisions in one estimate, which has the expectation of the wide one and nearly the price of the narrow one.

Information comes from differences of predictions, in which the rounding of half precision does not cancel. Multilevel
Monte Carlo (Giles 2015, Acta Numerica 24) keeps both: all noise samples are evaluated in half precision, and one of
every k, picked at random, in float32 as well. With integrands h and f, and weights w,

    Q = sum over all of w h + k * sum over the picked of w (f - h)

has the expectation of sum w f whatever h is. Every replicate is such a Q, so the spread of replicates is the error of
both levels together, and nothing that is computed from replicates knows of precisions. Picking adds the variance
(k - 1) A, with A = E sum w^2 (f - h)^2. Costs c_h, c_f of an evaluation and the variance V of a replicate are measured,
and k is the power of two with the smallest (c_h + c_f / k) (1 + (k - 1) A / V), unless that is more than c_f: then all
is computed in float32.
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
import torch

from core.arrays import Bools, Floats, Ints
from core.diffusion.predictor import NoisePredictor

TRIAL = 2
"""Replicates that are first evaluated in both precisions, all samples. They count as float32."""
MAX_EVERY = 32
"""Largest k."""
WORTHWHILE = 0.9
"""A half precision that takes more than this share of float32's time is not tried again on a model."""
FLOOR = 0.1
"""Values below this share of the largest one are measured to within rel_error of that share, not of themselves."""

_BFLOAT16_UNITS = ("avx512_bf16", "amx_bf16")
"""Instructions without which a CPU computes in bfloat16 by converting to float32 and back, which is slower."""
_PICK = 1
"""Tells the key of the pick from that of the draw."""
_measured: "WeakKeyDictionary[NoisePredictor, Costs]" = WeakKeyDictionary()


ResultT = TypeVar("ResultT")


class Costs(NamedTuple):
    """Seconds that an evaluation takes."""

    narrow: float
    wide: float


class Levels(NamedTuple):
    """The two precisions that a model can compute in."""

    narrow: torch.dtype
    wide: torch.dtype


def levels_of(model: NoisePredictor) -> Levels | None:
    """The model's half precision and float32; None if it has no second precision, or the device no units for it."""
    if not hasattr(model, "computing_in"):
        return None
    dtype: torch.dtype = getattr(model, "dtype", torch.float32)
    narrow = half_precision(model.device) if dtype == torch.float32 else dtype
    return None if narrow is None else Levels(narrow, torch.float32)


def half_precision(device: torch.device) -> torch.dtype | None:
    """The half precision in which a model in float32 may compute faster; None where the device has no units for it.

    On a GPU there is none: large models are loaded in half precision there, and who asks for float32 may have reasons.
    """
    if device.type != "cpu":
        return None
    # Older versions of torch do not tell; float32 alone is right, if not fastest.
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return torch.bfloat16 if any(capabilities.get(name) for name in _BFLOAT16_UNITS) else None


def timed(device: torch.device, compute: Callable[[], ResultT]) -> tuple[ResultT, float]:
    """A result, and the seconds that the device took for it. Waits for a GPU."""
    _wait(device)
    started = time.perf_counter()
    result = compute()
    _wait(device)
    return result, time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def pick(n: int, every: int, key: tuple[int, ...]) -> Bools:
    """[n] which samples of a replicate to evaluate in both precisions: each with probability 1 / `every`.

    Evenly spaced from a random start; where `every` is more than n, none in most replicates.
    """
    start = int(np.random.default_rng(np.random.SeedSequence((*key, _PICK))).integers(every))
    return np.asarray(np.arange(n) % every == start)


def best_every(costs: Costs, added: Floats, variance: Floats, limit: int) -> int:
    """The k with the least cost for the same error, at most `limit`; 1 stands for float32 alone.

    Args:
        costs: Of an evaluation in either precision.
        added: [Q] A: what each k - 1 adds to the variance of Q figures.
        variance: [Q] V: the variance of a replicate of these figures.
        limit: Largest k.
    """
    ratio = np.divide(added, variance, out=np.where(added > 0, np.inf, 0.0), where=variance > 0).max(initial=0.0)
    prices = {1: costs.wide}
    every = 2
    while every <= min(limit, MAX_EVERY):
        prices[every] = (costs.narrow + costs.wide / every) * (1 + (every - 1) * ratio)
        every *= 2
    return min(prices, key=prices.__getitem__)


class Split:
    """How often an estimate uses float32: `every` is decided anew from all that has been measured so far."""

    every: int
    """k: one of this many samples is evaluated in both precisions; 1: all samples in float32 alone."""

    def __init__(self, model: NoisePredictor, levels: Levels, every: int | None, n_figures: int) -> None:
        """Decide for `n_figures` figures; with a given `every`, nothing is left to decide.

        Otherwise it is decided after a trial, and again after each block of replicates.
        """
        self.levels, self._model, self._fixed = levels, model, every
        known = _measured.get(model)
        if every is None and known is not None and known.narrow > WORTHWHILE * known.wide:
            self._fixed = 1
        self.every = self._fixed or 1
        self.both = self._fixed != 1
        """Whether the next block of replicates is evaluated in half precision, too."""
        self.used = self.both
        """Whether any was."""
        self._seconds = dict.fromkeys(levels, np.inf)
        self._squares, self._n = np.zeros(n_figures), np.zeros(n_figures)

    def until(self, start: int, stop: int) -> int:
        """Where a block that starts with replicate `start` ends, `stop` at most: the trial is a block of its own."""
        return min(TRIAL, stop) if self._fixed is None and start < TRIAL else stop

    def took(self, dtype: torch.dtype, seconds: float) -> None:
        """Record the seconds of an evaluation. The least counts: others had to wait, or were a first call."""
        self._seconds[dtype] = min(self._seconds[dtype], seconds)

    def differed(self, which: Ints, squares: Floats, n_points: int) -> None:
        """Record w^2 (f - h)^2 [m, q] of m picked samples of some of the figures, in replicates of `n_points`."""
        self._squares[which] += n_points * squares.sum(0)
        self._n[which] += len(squares)

    def decide(self, *figures: Floats) -> None:
        """Choose `every` for the next block, from all replicates [R, P] of each kind of figure."""
        costs = Costs(*(self._seconds[level] for level in self.levels))
        if np.isfinite(costs).all():
            _measured[self._model] = costs
        if self._fixed is not None or len(figures[0]) < TRIAL:
            return
        spread = [values.var(0, ddof=1) for values in figures]
        # What is small beside the largest word is measured against that.
        variance = np.concatenate([np.maximum(each, FLOOR**2 * each.max(initial=0.0)) for each in spread])
        # With few replicates, variances are known too roughly for a k that leaves few samples in float32.
        self.every = best_every(costs, self._squares / self._n, variance, 2 * len(figures[0]))
        self.both = self.every > 1

    def settings(self, correction: Floats, bits: Floats) -> dict[str, Any]:
        """What a result says of its precision, JSON-able.

        `dtype` names the precisions that were used; `rounding` is the largest share of a comparison's orthogonal bits
        that the half precision added before it was corrected; `exact_every` is k of the last block.
        """
        used = self.levels if self.used else self.levels[1:]
        share = np.divide(np.abs(correction), bits, out=np.zeros_like(bits), where=bits > 0).max(initial=0.0)
        dtype = " and ".join(str(level).removeprefix("torch.") for level in used)
        return {"dtype": dtype, "rounding": float(share), "exact_every": self.every}
