"""Label maps on coarse grids: reduced by majority, turned into masks of a caption's things, and scored against them."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Floats = npt.NDArray[np.float64]

N_THRESHOLDS = 32
"""Thresholds that are tried, at evenly spread quantiles of the scores."""


def cell_counts(labels: Tensor, n_classes: int, height: int, width: int) -> Tensor:
    """Pixels of each class in each cell, [N, n_classes + 1, height, width], the last of no class (-1).

    Raises:
        ValueError: The label maps [N, H, W] do not divide into so many cells.
    """
    n, rows, columns = labels.shape
    if rows % height or columns % width:
        raise ValueError(f"Pictures of {rows} x {columns} pixels do not divide into {height} x {width} cells.")
    known = torch.where(labels < 0, n_classes, labels)
    cells = known.view(n, height, rows // height, width, columns // width).transpose(2, 3).reshape(n, height, width, -1)
    counts = torch.zeros(n, height, width, n_classes + 1)
    counts.scatter_add_(3, cells, torch.ones(()).expand(cells.shape))
    return counts.movedim(3, 1)


def majority(counts: Tensor) -> Tensor:
    """[N, h, w] class of most pixels in each cell of `cell_counts`; -1 where that is none."""
    best = counts.argmax(1)
    return torch.where(best == counts.shape[1] - 1, -1, best)


class Truth(NamedTuple):
    """Where M things of each of N captions are in their pictures, on a grid."""

    masks: Tensor
    """[N, M, h, w] bool: the cells whose majority the thing is; none where a caption has fewer things."""
    pixels: Tensor
    """[N, M, h, w] pixels of the thing in each cell."""
    cell_area: int
    """Pixels of a cell."""

    @property
    def there(self) -> Tensor:
        """[N, M] whether there is anything to foretell."""
        return self.masks.any(3).any(2)


def truth_of(counts: Tensor, targets: Tensor) -> Truth:
    """The truth of targets [N, M], classes or -1 for nothing, from the `cell_counts` of their pictures."""
    known = (targets >= 0)[..., None, None]
    index = targets.clamp_min(0)[..., None, None].expand(*targets.shape, *counts.shape[2:])
    masks = class_masks(majority(counts), targets)
    return Truth(masks, counts.gather(1, index) * known, int(counts[0, :, 0, 0].sum()))


def class_masks(labels: Tensor, targets: Tensor) -> Tensor:
    """[N, M, h, w] where label maps [N, h, w] show the targets [N, M]; nowhere where a target is -1."""
    return (labels[:, None] == targets[..., None, None]) & (targets >= 0)[..., None, None]


def score_masks(scores: Tensor, threshold: float) -> Tensor:
    """Masks of a caption's things from their scores [N, M, h, w]: a cell is the best one's, if above a threshold."""
    return (scores == scores.amax(1, keepdim=True)) & (scores >= threshold) & scores.isfinite()


def grid_iou(masks: Tensor, truth: Truth) -> Tensor:
    """[N, M] intersection over union on the grid; not a number where there is nothing to foretell."""
    both, either = ((masks & truth.masks), (masks | truth.masks))
    ious = both.sum((2, 3)).double() / either.sum((2, 3))
    return ious.masked_fill(~truth.there, torch.nan)


def pixel_iou(masks: Tensor, truth: Truth) -> Tensor:
    """The same of the masks enlarged to the picture, in pixels."""
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
    """A figure with its interval."""

    value: float
    low: float
    high: float
    """95 % interval."""

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})" if np.isfinite(self.value) else "none"


class Resampled(NamedTuple):
    """A mean over the things of pictures, and over those of pictures drawn anew with replacement."""

    value: float
    draws: Floats
    """[n] the same of each draw. Those of two means over the same pictures belong together."""

    @property
    def estimate(self) -> Estimate:
        """The mean with its interval."""
        return _estimate(self.value, self.draws)

    def less(self, other: "Resampled") -> Estimate:
        """The difference of two means over the same pictures."""
        return _estimate(self.value - other.value, self.draws - other.draws)

    def share_of(self, other: "Resampled") -> Estimate:
        """The ratio of two means over the same pictures."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return _estimate(float(np.divide(self.value, other.value)), self.draws / other.draws)


def resampled(ious: Floats, n_draws: int) -> Resampled:
    """The mean of ious [pictures, M], whatever is not a number left out. The draws depend on the sizes alone."""
    sums, counts = np.nansum(ious, 1), np.isfinite(ious).sum(1)
    rows = np.random.default_rng(0).integers(len(ious), size=(n_draws, len(ious)))
    with np.errstate(invalid="ignore"):
        return Resampled(float(sums.sum() / counts.sum()), sums[rows].sum(1) / counts[rows].sum(1))


def _estimate(value: float, draws: Floats) -> Estimate:
    finite = draws[np.isfinite(draws)]
    if not np.isfinite(value) or not len(finite):
        return Estimate(np.nan, np.nan, np.nan)
    low, high = np.quantile(finite, (0.025, 0.975))
    return Estimate(value, float(low), float(high))
