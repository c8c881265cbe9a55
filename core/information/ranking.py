"""What `rank_captions` returns, and the arithmetic from replicates to it. Numbers only: imports no torch."""

import math
from dataclasses import dataclass

import numpy as np

from core.arrays import Floats
from core.information.results import Measurement, mean_and_stderr, t_cdf, t_quantile

LOOKS_FACTOR = 1.3
"""Errors of differences are taken this much larger before they become probabilities, because a run is looked at again
and again and ends when an order looks certain. Simulated beforehand, for normal replicates looked at after 8, 12, 16,
24, 32, 48 and 64: a run that may end at 95 % ends on the wrong one of two captions in at most 7 % of cases, however
little lies between them (without it in 16 %), and in 1 % where a replicate's error is twice what lies between."""
UNKNOWN = 1e9
"""The relative error of a difference that is zero; JSON has no infinity."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Ranking(Measurement):
    """Captions by how well they tell a picture. All arrays are float64, in the order in which the captions were given.

    `rel_error` is that of the closest neighbours in the order: the error of their difference over the difference.
    """

    captions: tuple[str, ...]
    """The N captions as given."""
    bits: Floats
    """[N] direct bits over the empty text, or over the captions' mean where the empty text was not evaluated."""
    stderr: Floats
    """[N] its standard error. Captions share their noise: how far apart two of them are is known better than either."""
    ahead: Floats
    """[N, N] direct bits by which the caption of the row tells the picture better than that of the column."""
    ahead_stderr: Floats
    """[N, N] its standard error, over replicates of the difference."""
    orthogonal_bits: Floats | None
    """[N] orthogonal bits over the empty text, by which captions were ranked as published (Kong et al. 2024). Largest
    of what changes the prediction most, right or wrong. None where the empty text was not evaluated."""
    orthogonal_stderr: Floats | None
    """[N] its standard error."""

    @property
    def order(self) -> tuple[int, ...]:
        """Indices of the captions, best first, by direct bits."""
        return _largest_first(self.bits)

    @property
    def orthogonal_order(self) -> tuple[int, ...] | None:
        """The same by the published rule."""
        return None if self.orthogonal_bits is None else _largest_first(self.orthogonal_bits)

    @property
    def p_ahead(self) -> Floats:
        """[N, N] probability that the row's caption does tell the picture better than the column's: 0.5 is no idea."""
        n = len(self.captions)
        return np.array([[self._p(i, j) for j in range(n)] for i in range(n)])

    @property
    def p_best(self) -> float:
        """Probability, at least, that the first of `order` is the best of all."""
        first, *others = self.order
        return _all_hold([self._p(first, other) for other in others])

    @property
    def p_order(self) -> float:
        """Probability, at least, that `order` is right from end to end."""
        return _all_hold([self._p(*pair) for pair in zip(self.order, self.order[1:], strict=False)])

    def _p(self, i: int, j: int) -> float:
        bits, stderr = float(self.ahead[i, j]), LOOKS_FACTOR * float(self.ahead_stderr[i, j])
        if bits == 0:
            return 0.5
        above = t_cdf(abs(bits) / stderr, self.n_replicates - 1) if stderr > 0 else 1.0
        return above if bits > 0 else 1 - above


def differences(direct: Floats) -> tuple[Floats, Floats]:
    """[N, N] by how much each caption's bits exceed each other's, and the errors, from replicates [R, N]."""
    return mean_and_stderr(direct[:, :, None] - direct[:, None, :])


def closest(bits: Floats, ahead: Floats, ahead_stderr: Floats) -> float:
    """The largest relative error of the differences between neighbours in the order of their bits."""
    order = _largest_first(bits)
    pairs = np.array(order[:-1]), np.array(order[1:])
    apart, error = np.abs(ahead[pairs]), ahead_stderr[pairs]
    return float(np.divide(error, apart, out=np.full_like(apart, UNKNOWN), where=apart > 0).max())


def wanted_error(certainty: float, n_captions: int, n_replicates: int) -> float:
    """The relative error of all neighbours' differences at which an order is as certain as that.

    The doubt is shared out equally between the neighbours.
    """
    doubt = (1 - certainty) / (n_captions - 1)
    return 1 / (LOOKS_FACTOR * t_quantile(1 - doubt, n_replicates - 1))


def _largest_first(bits: Floats) -> tuple[int, ...]:
    return tuple(np.argsort(-bits, kind="stable").tolist())


def _all_hold(probabilities: list[float]) -> float:
    """The least probability that several things hold at once, however they depend on each other (Bonferroni)."""
    return max(0.0, 1 - math.fsum(1 - p for p in probabilities))
