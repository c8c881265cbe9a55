"""Label maps on coarse grids: majority vote, masks of classes, and intersection over union."""

import torch
from torch import Tensor


def cell_counts(labels: Tensor, n_classes: int, height: int, width: int) -> Tensor:
    """Pixels of each class in each cell, [N, n_classes + 1, height, width], with "no class" (-1) last.

    Raises:
        ValueError: The label maps [N, H, W] do not divide into height x width cells.
    """
    n, rows, columns = labels.shape
    if rows % height or columns % width:
        raise ValueError(f"Images of {rows} x {columns} pixels do not divide into {height} x {width} cells.")
    known = torch.where(labels < 0, n_classes, labels)
    cells = known.view(n, height, rows // height, width, columns // width).transpose(2, 3).reshape(n, height, width, -1)
    counts = torch.zeros(n, height, width, n_classes + 1)
    counts.scatter_add_(3, cells, torch.ones(()).expand(cells.shape))
    return counts.movedim(3, 1)


def majority(counts: Tensor) -> Tensor:
    """[N, h, w] most frequent class in each cell of `cell_counts`; -1 where that is "no class"."""
    best = counts.argmax(1)
    return torch.where(best == counts.shape[1] - 1, -1, best)


def class_masks(labels: Tensor, targets: Tensor) -> Tensor:
    """[N, M, h, w] masks of the classes `targets` [N, M] in label maps [N, h, w]; empty for a target of -1."""
    return (labels[:, None] == targets[..., None, None]) & (targets >= 0)[..., None, None]


def mask_iou(masks: Tensor, truth: Tensor) -> Tensor:
    """[N, M] intersection over union of masks [N, M, h, w]; NaN where the truth is empty."""
    both, either = masks & truth, masks | truth
    ious = both.sum((2, 3)).double() / either.sum((2, 3))
    return ious.masked_fill(~truth.any(3).any(2), torch.nan)
