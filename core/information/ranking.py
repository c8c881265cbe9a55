"""The result of `rank_captions`, and its computation from replicates. Imports no torch."""

import math
from dataclasses import dataclass

import numpy as np

from core.arrays import Floats
from core.information.results import Measurement, mean_and_stderr, t_cdf, t_quantile

REPEATED_CHECKS_FACTOR = 1.3
"""Factor on the errors of differences before they become probabilities, because a run is checked repeatedly and ends as
soon as its order seems certain. Simulated beforehand, for normal replicates checked after 8, 12, 16, 24, 32, 48 and 64:
a run with certainty 95 % ends on the wrong one of two captions in at most 7 % of cases, however small their difference
(without the factor in 16 %), and in 1 % where the error of a replicate is twice the difference."""
UNKNOWN = 1e9
"""The relative error of a difference of zero; JSON has no infinity."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Ranking(Measurement):
    """Captions by how well they describe an image. All arrays are float64, in the order in which captions were given.

    `rel_error` is the largest relative error of the difference between neighbours in the order.
    """

    captions: tuple[str, ...]
    """The N captions as given."""
    bits: Floats
    """[N] direct bits over the empty text, or over the captions' mean where the empty text was not evaluated."""
    stderr: Floats
    """[N] its standard error. All captions share their noise, so differences have smaller errors."""
    ahead: Floats
    """[N, N] direct bits of the row's caption minus those of the column's."""
    ahead_stderr: Floats
    """[N, N] standard error of the difference."""
    orthogonal_bits: Floats | None
    """[N] orthogonal bits over the empty text, by which Kong et al. 2024 rank captions: how much a caption changes the
    prediction, for better or worse. None where the empty text was not evaluated."""
    orthogonal_stderr: Floats | None
    """[N] its standard error."""

    @property
    def order(self) -> tuple[int, ...]:
        """Indices of the captions, best first, by direct bits."""
        return _largest_first(self.bits)

    @property
    def orthogonal_order(self) -> tuple[int, ...] | None:
        """Indices of the captions, best first, by orthogonal bits (Kong et al. 2024)."""
        return None if self.orthogonal_bits is None else _largest_first(self.orthogonal_bits)

    @property
    def p_ahead(self) -> Floats:
        """[N, N] probability that the row's caption describes the image better than the column's; 0.5 if unknown."""
        n = len(self.captions)
        return np.array([[self._p(i, j) for j in range(n)] for i in range(n)])

    @property
    def p_best(self) -> float:
        """Lower bound of the probability that the first of `order` is the best of all."""
        first, *others = self.order
        return _all_hold([self._p(first, other) for other in others])

    @property
    def p_order(self) -> float:
        """Lower bound of the probability that all of `order` is right."""
        return _all_hold([self._p(*pair) for pair in zip(self.order, self.order[1:], strict=False)])

    def _p(self, i: int, j: int) -> float:
        bits, stderr = float(self.ahead[i, j]), REPEATED_CHECKS_FACTOR * float(self.ahead_stderr[i, j])
        if bits == 0:
            return 0.5
        above = t_cdf(abs(bits) / stderr, self.n_replicates - 1) if stderr > 0 else 1.0
        return above if bits > 0 else 1 - above


def differences(direct: Floats) -> tuple[Floats, Floats]:
    """[N, N] differences between the bits of captions, and their standard errors, from replicates [R, N]."""
    return mean_and_stderr(direct[:, :, None] - direct[:, None, :])


def closest(bits: Floats, ahead: Floats, ahead_stderr: Floats) -> float:
    """The largest relative error of the difference between neighbours in the order by bits."""
    order = _largest_first(bits)
    pairs = np.array(order[:-1]), np.array(order[1:])
    difference, error = np.abs(ahead[pairs]), ahead_stderr[pairs]
    return float(np.divide(error, difference, out=np.full_like(difference, UNKNOWN), where=difference > 0).max())


def wanted_error(certainty: float, n_captions: int, n_replicates: int) -> float:
    """The relative error of neighbours' differences at which an order of captions has a probability of `certainty`.

    The error probability is shared out equally between the pairs of neighbours (Bonferroni).
    """
    p_error = (1 - certainty) / (n_captions - 1)
    return 1 / (REPEATED_CHECKS_FACTOR * t_quantile(1 - p_error, n_replicates - 1))


def _largest_first(bits: Floats) -> tuple[int, ...]:
    return tuple(np.argsort(-bits, kind="stable").tolist())


def _all_hold(probabilities: list[float]) -> float:
    """Lower bound of the probability that all of several events hold, however dependent they are (Bonferroni)."""
    return max(0.0, 1 - math.fsum(1 - p for p in probabilities))
