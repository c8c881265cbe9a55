"""Proportions of successes with confidence intervals, and how figures are written with their intervals."""

import math
from collections.abc import Iterable
from statistics import NormalDist
from typing import NamedTuple

from scipy.stats import binomtest  # type: ignore[import-untyped]

Z = NormalDist().inv_cdf(0.975)
"""Half-width of a 95 % interval of a normal distribution, in standard deviations."""


class Proportion(NamedTuple):
    """A proportion of trials that succeeded."""

    n_right: int
    n: int

    @property
    def value(self) -> float:
        """Between 0 and 1; NaN without trials."""
        return self.n_right / self.n if self.n else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval (Wilson 1927), which is sound near 0 and 1 too."""
        if not self.n:
            return (0.0, 1.0)
        low, high = binomtest(self.n_right, self.n).proportion_ci(0.95, method="wilson")
        return (float(low), float(high))

    def __str__(self) -> str:
        low, high = self.interval
        return f"{100 * self.value:.1f} % ({100 * low:.0f} to {100 * high:.0f})" if self.n else "none"


def proportion(outcomes: Iterable[bool]) -> Proportion:
    """The proportion of successes in a list of outcomes."""
    listed = [bool(outcome) for outcome in outcomes]
    return Proportion(sum(listed), len(listed))


def with_interval(figure: tuple[float, float, float], form: str = ".2f") -> str:
    """A figure with the ends of its interval, each in a format such as `.2f`: `0.50 (0.40 to 0.60)`."""
    value, low, high = (format(number, form) for number in figure)
    return f"{value} ({low} to {high})"
