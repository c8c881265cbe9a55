"""IoU of masks on coarse grids with a caption's objects, and bootstrap intervals of means over images."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from core.arrays import Floats
from core.segmentation.grids import class_masks, majority, mask_iou

N_THRESHOLDS = 32
"""Thresholds tried, at evenly spaced quantiles of the scores."""


class Truth(NamedTuple):
    """Where M objects of each of N captions are in their images, on a grid."""

    masks: Tensor
    """[N, M, h, w] bool: the cells whose majority class is the object; empty where a caption has fewer objects."""
    pixels: Tensor
    """[N, M, h, w] pixels of the object in each cell."""
    cell_area: int
    """Pixels per cell."""

    @property
    def there(self) -> Tensor:
        """[N, M] whether there is anything to predict."""
        return self.masks.any(3).any(2)


def truth_of(counts: Tensor, targets: Tensor) -> Truth:
    """The masks of target classes [N, M], -1 for none, from the `cell_counts` of their images."""
    known = (targets >= 0)[..., None, None]
    index = targets.clamp_min(0)[..., None, None].expand(*targets.shape, *counts.shape[2:])
    masks = class_masks(majority(counts), targets)
    return Truth(masks, counts.gather(1, index) * known, int(counts[0, :, 0, 0].sum()))


def score_masks(scores: Tensor, threshold: float) -> Tensor:
    """Masks from scores [N, M, h, w]: a cell belongs to the object with the best score, if that is above a
    threshold."""
    return (scores == scores.amax(1, keepdim=True)) & (scores >= threshold) & scores.isfinite()


def grid_iou(masks: Tensor, truth: Truth) -> Tensor:
    """[N, M] intersection over union on the grid; NaN where there is nothing to predict."""
    return mask_iou(masks, truth.masks)


def pixel_iou(masks: Tensor, truth: Truth) -> Tensor:
    """[N, M] the same in pixels, with the masks enlarged to the image."""
    both = (masks * truth.pixels).sum((2, 3)).double()
    either = masks.sum((2, 3)) * truth.cell_area + truth.pixels.sum((2, 3)) - both
    return (both / either).masked_fill(~truth.there, torch.nan)


def best_threshold(scores: Tensor, truth: Truth) -> float:
    """The threshold at which `score_masks` has the highest mean IoU on the grid."""
    values = scores[scores.isfinite()].double().numpy()
    tried = np.unique(np.quantile(values, np.linspace(0, 1, N_THRESHOLDS + 1)[:-1]))
    means = [float(grid_iou(score_masks(scores, float(at)), truth).nanmean()) for at in tried]
    return float(tried[int(np.argmax(means))])


class Estimate(NamedTuple):
    """A figure with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})" if np.isfinite(self.value) else "none"


class Resampled(NamedTuple):
    """A mean with its bootstrap distribution over images.

    Not `scipy.stats.bootstrap`: draws must be kept and shared, so that differences and ratios of any two means over the
    same images, formed later, are paired; and a mean over objects is a ratio of sums over images.
    """

    value: float
    draws: Floats
    """[n] the mean in each resample; entry i of any two means over equally many images is of the same resample."""

    @property
    def estimate(self) -> Estimate:
        """The mean with its percentile interval."""
        return _estimate(self.value, self.draws)

    def minus(self, other: "Resampled") -> Estimate:
        """The difference of two means over the same images."""
        return _estimate(self.value - other.value, self.draws - other.draws)

    def over(self, other: "Resampled") -> Estimate:
        """The ratio of two means over the same images."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return _estimate(float(np.divide(self.value, other.value)), self.draws / other.draws)


def resampled(values: Floats, n_draws: int) -> Resampled:
    """The mean of values [images, M], NaNs left out. The resamples depend only on the sizes."""
    sums, counts = np.nansum(values, 1), np.isfinite(values).sum(1)
    rows = np.random.default_rng(0).integers(len(values), size=(n_draws, len(values)))
    with np.errstate(invalid="ignore"):
        return Resampled(float(sums.sum() / counts.sum()), sums[rows].sum(1) / counts[rows].sum(1))


def resampled_words(images: Sequence[Sequence[float]], n_draws: int) -> Resampled:
    """The mean over words of images with different numbers of words, resampled as by `resampled`."""
    width = max(1, *map(len, images))
    return resampled(np.array([[*words, *[np.nan] * (width - len(words))] for words in images]), n_draws)


def repeats(images: Sequence[int], n_images: int, n_draws: int) -> Floats:
    """[n, words] how often each word counts in the resamples of `resampled`; `images` has the image of each word."""
    rows = np.random.default_rng(0).integers(n_images, size=(n_draws, n_images))
    times = np.array([np.bincount(row, minlength=n_images) for row in rows])
    return np.asarray(times[:, list(images)], np.float64)


def weighted_pearson(x: Floats, y: Floats, weights: Floats) -> Floats:
    """[n] Pearson correlation of x and y [m] under each row of weights [n, m]; NaN where either is constant."""
    with np.errstate(divide="ignore", invalid="ignore"):
        proportion = weights / weights.sum(1, keepdims=True)
        apart_x, apart_y = x - (proportion @ x)[:, None], y - (proportion @ y)[:, None]
        both, of_x, of_y = ((proportion * product).sum(1) for product in (apart_x * apart_y, apart_x**2, apart_y**2))
        return np.asarray(both / np.sqrt(of_x * of_y))


def _estimate(value: float, draws: Floats) -> Estimate:
    finite = draws[np.isfinite(draws)]
    if not np.isfinite(value) or not len(finite):
        return Estimate(np.nan, np.nan, np.nan)
    low, high = np.quantile(finite, (0.025, 0.975))
    return Estimate(value, float(low), float(high))
