"""Regions of an image: named quarters and halves, or masks, reduced to any grid of positions."""

from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

RegionName = Literal["top-left", "top-right", "bottom-left", "bottom-right", "top", "bottom", "left", "right", "all"]
"""Quarters and halves of an image, and all of it."""
Region = str | Tensor | Image.Image | NDArray[Any]
"""One of `RegionName`, or a mask [H, W] of the image's size: an array, a tensor or an image; above 0 is inside."""
REGIONS: tuple[RegionName, ...] = get_args(RegionName)


class RegionMask:
    """The region of an edit, on any grid.

    Raises:
        ValueError: No such region, an empty one, or one that does not have the image's size.
    """

    def __init__(self, region: Region, size: int) -> None:
        """`size` is the image's side in pixels."""
        self._mask = _named_mask(region, size) if isinstance(region, str) else _mask(region, size)
        self._grids: dict[tuple[int, int], Tensor] = {}

    def grid(self, height: int, width: int) -> Tensor:
        """[height x width, 1] share of each cell that lies inside; a region smaller than a cell is not lost."""
        if (height, width) not in self._grids:
            shares = F.adaptive_avg_pool2d(self._mask[None], (height, width))
            self._grids[height, width] = shares.flatten()[:, None]
        return self._grids[height, width]


def _named_mask(name: str, size: int) -> Tensor:
    if name not in REGIONS:
        raise ValueError(f"A region is one of {', '.join(REGIONS)}, or a mask, not {name!r}.")
    mask, half = torch.ones(size, size), size // 2
    for side, outside in (
        ("top", (slice(half, None), slice(None))),
        ("bottom", (slice(None, half), slice(None))),
        ("left", (slice(None), slice(half, None))),
        ("right", (slice(None), slice(None, half))),
    ):
        if side in name.split("-"):
            mask[outside] = 0
    return mask


def _mask(region: Tensor | Image.Image | NDArray[Any], size: int) -> Tensor:
    if isinstance(region, Tensor):
        region = region.detach().cpu().numpy()
    elif isinstance(region, Image.Image):
        region = region.convert("L")
    mask = torch.from_numpy(np.asarray(region) > 0).float()
    if mask.shape != (size, size):
        raise ValueError(
            f"A region has the size of the image, {size} x {size}, not {' x '.join(map(str, mask.shape))}."
        )
    if not mask.any():
        raise ValueError("The region is empty: mark some part of the image.")
    return mask
