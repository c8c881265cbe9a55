"""Shares of successes with confidence intervals, and how a figure is shown with its interval."""

import math
from collections.abc import Iterable
from typing import NamedTuple

Z = 1.959964
"""Of a 95 % interval."""


class Proportion(NamedTuple):
    """A share of trials that succeeded."""

    n_right: int
    n: int

    @property
    def value(self) -> float:
        """Between 0 and 1; not a number without trials."""
        return self.n_right / self.n if self.n else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval (Wilson 1927), which is sound near 0 and 1 too."""
        if not self.n:
            return (0.0, 1.0)
        spread = Z / (1 + Z**2 / self.n)
        middle = (self.value + Z**2 / (2 * self.n)) / (1 + Z**2 / self.n)
        half = spread * math.sqrt(self.value * (1 - self.value) / self.n + Z**2 / (4 * self.n**2))
        return (max(0.0, middle - half), min(1.0, middle + half))

    def __str__(self) -> str:
        low, high = self.interval
        return f"{100 * self.value:.1f} % ({100 * low:.0f} to {100 * high:.0f})" if self.n else "none"


def proportion(outcomes: Iterable[bool]) -> Proportion:
    """Of a list of successes and failures."""
    listed = [bool(outcome) for outcome in outcomes]
    return Proportion(sum(listed), len(listed))


def with_interval(figure: tuple[float, float, float], form: str = ".2f") -> str:
    """A figure with the low and the high end of its interval, each in a form such as `.2f`."""
    value, low, high = (format(number, form) for number in figure)
    return f"{value} ({low} to {high})"
