"""Errors of maps against a noisy reference, and the evaluations one method needs for the error of another.

Bootstrap intervals are computed here rather than by `scipy.stats.bootstrap`, which does not resample within strata.
"""

from typing import NamedTuple

import numpy as np

from core.arrays import Floats, Ints

Indices = Ints


class Interval(NamedTuple):
    """A figure with its 95 % bootstrap interval over prompts."""

    value: float
    """Estimate."""
    low: float
    """2.5th percentile of the resamples."""
    high: float
    """97.5th percentile of the resamples."""

    def __str__(self) -> str:
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"


def relative_errors(replicates: Floats, reference: Floats, n_together: int = 1) -> Floats:
    """[W] relative L2 error of each word's map: root mean square over runs of `n_together` replicates.

    replicates [R, W, h, w] and reference [R', W, h, w] are independent and unbiased. The ground truth is the mean of
    the reference; its variance, estimated from the spread of its replicates, inflates the squared distance and the
    squared length, and is subtracted from both. Replicates left over from the last full run are not used.

    The mean over runs is taken before the root: only the expectation of the squared error falls exactly as one over the
    number of samples, even for the few heavy-tailed samples of a short run.
    """
    n_runs = len(replicates) // n_together
    runs = replicates[: n_runs * n_together].reshape(n_runs, n_together, *replicates.shape[1:]).mean(1)
    truth = reference.mean(0)
    own = reference.var(0, ddof=1).sum((-2, -1)) / len(reference)
    distance = ((runs - truth) ** 2).sum((-2, -1)).mean(0) - own
    length = (truth**2).sum((-2, -1)) - own
    if (length <= 0).any():
        raise ValueError("The reference is pure noise: give it more replicates.")
    return np.asarray(np.sqrt(distance.clip(0) / length))


def equal_error_evals(n_evals: Floats, errors: Floats, error: float) -> float:
    """Mean evaluations per prompt with which a method would reach `error`.

    n_evals and errors [P] are what it spent and reached on each prompt; Monte Carlo errors fall as one over the square
    root of the evaluations.
    """
    return float(n_evals.mean() * (errors.mean() / error) ** 2)


def resamples(strata: Indices, n: int = 4000, seed: int = 0) -> Indices:
    """[n, P] indices of prompts, drawn with replacement within strata [P]."""
    rng = np.random.default_rng(seed)
    drawn = np.empty((n, len(strata)), np.int64)
    for stratum in np.unique(strata):
        members = np.flatnonzero(strata == stratum)
        drawn[:, members] = rng.choice(members, (n, len(members)))
    return drawn


def interval(value: float, resampled: Floats) -> Interval:
    """A figure with its percentile interval."""
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Interval(value, float(low), float(high))


def needed(n_evals: Floats, errors: Floats, ours: Floats, drawn: Indices) -> Interval:
    """Mean evaluations per prompt for the error of `ours`; all are [P] and resampled together."""
    value = equal_error_evals(n_evals, errors, float(ours.mean()))
    return interval(value, n_evals[drawn].mean(1) * (errors[drawn].mean(1) / ours[drawn].mean(1)) ** 2)


def times(n_evals: Floats, errors: Floats, ours_evals: Floats, ours: Floats, drawn: Indices) -> Interval:
    """Evaluations a method needs for the error of ours, over the evaluations of ours; all are [P]."""
    value = equal_error_evals(n_evals, errors, float(ours.mean())) / float(ours_evals.mean())
    squared = (errors[drawn].mean(1) / ours[drawn].mean(1)) ** 2
    return interval(value, n_evals[drawn].mean(1) * squared / ours_evals[drawn].mean(1))


def ratio(above: Floats, below: Floats, drawn: Indices) -> Interval:
    """Ratio of two means over the same prompts [P]."""
    return interval(float(above.mean() / below.mean()), above[drawn].mean(1) / below[drawn].mean(1))
