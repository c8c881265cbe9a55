"""Firing statistics of the latents of an SAE over a stream of images, as sums that can be merged.

Only active entries are processed. Each has a level: N_LEVELS - 1 minus the number of half-octaves between its value and
the largest value of its latent so far, at least 0. When a larger value comes, the levels shift and the lowest collects
the rest, so that they always fit the latent's scale, whatever the order of the images.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

N_LEVELS = 8
"""Number of thresholds of a latent: above 0, and at each of the seven upper levels."""
_BINS = 8
"""Bins of the histogram of values per octave."""
_OCTAVES = 16
"""Octaves on either side of 1 that the histogram covers."""


class Entries(NamedTuple):
    """The active entries of the codes of B images at one step."""

    latents: Tensor
    """[n] int64 index of the latent."""
    values: Tensor
    """[n] float32 value, above 0."""
    images: Tensor
    """[n] int64 index of the image."""
    positions: Tensor
    """[n] int64 index of the position, of h x w."""


class StepCodes(NamedTuple):
    """The codes of a batch at one step."""

    step: int
    """Index among the S steps that are read, from 0."""
    t: float
    """Normalised time of the step."""
    entries: Entries
    """The active entries."""


class Shape(NamedTuple):
    """Sizes of the statistics."""

    d_sae: int
    """Latents."""
    n_classes: int
    """Classes of the masks."""
    n_permutations: int
    """Pairings of images with the masks of others."""
    n_steps: int
    """Steps that are read of each image."""
    height: int
    """Rows of positions."""
    width: int
    """Columns of positions."""


class FiringStatistics:
    """Sums over images for the latents of one SAE. Every image belongs to one of two splits.

    Pairing 0 is that of images with their own masks, the others are permutations within a split.
    """

    def __init__(self, shape: Shape) -> None:
        latents, n_positions = shape.d_sae, shape.height * shape.width
        self.size = torch.tensor((shape.height, shape.width))
        """[2] rows and columns of positions."""
        self.top = torch.full((latents,), torch.iinfo(torch.int32).min // 2, dtype=torch.int32)
        """[d_sae] half-octave of the largest value: floor(2 log2(value))."""
        self.hits = torch.zeros((N_LEVELS, latents, 2, shape.n_permutations + 1, shape.n_classes), dtype=torch.int32)
        """[levels, d_sae, splits, pairings, K] cells active at the level and of the class."""
        self.area = torch.zeros((N_LEVELS, latents, 2), dtype=torch.int64)
        """[levels, d_sae, splits] cells active at the level."""
        self.cells = torch.zeros((2, shape.n_classes), dtype=torch.int64)
        """[splits, K] cells of each class."""
        self.n_cells = torch.zeros(2, dtype=torch.int64)
        """[splits] number of cells."""
        self.value_sum, self.time_sum = (torch.zeros(latents, dtype=torch.float64) for _ in range(2))
        """[d_sae] sums of the values, and of the values times t."""
        self.spread_sum = torch.zeros(latents, dtype=torch.float64)
        """[d_sae] sum of values times squared distances from the centre of activation in the image and step."""
        self.histogram = torch.zeros((latents, 2 * _OCTAVES * _BINS), dtype=torch.int64)
        """[d_sae, bins] number of active values by logarithm."""
        self.position_sum = torch.zeros((shape.n_steps, latents, n_positions), dtype=torch.float64)
        """[S, d_sae, positions] sums of the values."""
        self.square_sum = torch.zeros(latents, dtype=torch.float64)
        """[d_sae] sum of the squared values."""
        self.means = torch.zeros((0, latents))
        """[images, d_sae] mean value over the cells of an image, in the order of the images."""

    def add(self, codes_by_step: Sequence[StepCodes], labels: Tensor, splits: Tensor) -> None:
        """Add a batch of B images.

        Args:
            codes_by_step: Their codes, one item per step.
            labels: [pairings, B, positions] class of each position, -1 for none.
            splits: [B] 0 or 1.
        """
        n_images, n_positions = labels.shape[1:]
        totals = torch.zeros(n_images * len(self.top), dtype=torch.float64)
        for step_codes in codes_by_step:
            self._count(step_codes.entries, labels, splits)
            self._measure(step_codes)
            totals += self._spread(step_codes.entries, n_images)
            self.n_cells += n_positions * torch.bincount(splits, minlength=2)
            there = labels[0] >= 0
            flat = splits[:, None].expand_as(there)[there] * self.cells.shape[1] + labels[0][there]
            self.cells += torch.bincount(flat, minlength=self.cells.numel()).view(2, -1)
        means = totals.view(n_images, -1) / (len(codes_by_step) * n_positions)
        self.means = torch.cat([self.means, means.float()])

    def merge(self, other: "FiringStatistics") -> None:
        """Add the statistics of other images, which come after these."""
        tops = torch.maximum(self.top, other.top)
        self._raise(tops)
        other._raise(tops)  # which does not change what it means
        for name, value in self.tensors().items():
            if name not in ("size", "top", "means"):
                value += getattr(other, name)
        self.means = torch.cat([self.means, other.means])

    def tensors(self) -> dict[str, Tensor]:
        """All tensors, for a file."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "FiringStatistics":
        """The statistics with these `tensors`."""
        tally = cls.__new__(cls)
        vars(tally).update(tensors)
        return tally

    def quantile(self, share: float) -> Tensor:
        """[d_sae] quantile of a latent's active values, from the histogram; 0 if there are none."""
        below = self.histogram.cumsum(1).double()
        wanted = share * below[:, -1:]
        at = (below < wanted).sum(1, keepdim=True).clamp(max=self.histogram.shape[1] - 1)
        inside = self.histogram.gather(1, at).double()
        part = (wanted - (below.gather(1, at) - inside)) / inside.clamp(min=1)
        values = torch.exp2((at + part) / _BINS - _OCTAVES)
        return torch.where(below[:, -1] > 0, values[:, 0], 0)

    def threshold(self, level: Tensor) -> Tensor:
        """[d_sae] smallest value at a level [d_sae]; 0 for the lowest, which is open below."""
        lowest = torch.exp2((self.top.double() + level + 1 - N_LEVELS) / 2)
        return torch.where(level > 0, lowest, 0.0)

    def position_share(self) -> Tensor:
        """[d_sae] share of the variance within a step that the mean at each position explains; 0 without variance."""
        n_steps, _, n_positions = self.position_sum.shape
        n_images = float(self.n_cells.sum()) / (n_steps * n_positions)
        means = self.position_sum / n_images
        squared_means = (means.mean(2) ** 2).sum(0)
        total = self.square_sum / (n_images * n_positions) - squared_means
        between = (means**2).mean(2).sum(0) - squared_means
        return torch.where(total > 0, between / total.clamp(min=1e-30), 0).clamp(0, 1)

    def _count(self, entries: Entries, labels: Tensor, splits: Tensor) -> None:
        """Add intersections and areas by level."""
        octave = (2 * entries.values.log2()).floor().to(torch.int32)
        self._raise(self.top.scatter_reduce(0, entries.latents, octave, "amax"))
        level = (octave - self.top[entries.latents] + N_LEVELS - 1).clamp(min=0).long()
        row = (level * len(self.top) + entries.latents) * 2 + splits[entries.images]
        self.area.view(-1).index_add_(0, row, torch.ones_like(row))
        classes = labels[:, entries.images, entries.positions]
        pairing = torch.arange(len(labels))[:, None]
        flat = (row * len(labels) + pairing) * self.cells.shape[1] + classes
        flat = flat[classes >= 0]
        self.hits.view(-1).index_add_(0, flat, torch.ones(len(flat), dtype=torch.int32))

    def _measure(self, step_codes: StepCodes) -> None:
        """Add to the sums of values, times, squares and positions, and to the histogram."""
        latents, values, _, positions = step_codes.entries
        exact = values.double()
        self.value_sum.index_add_(0, latents, exact)
        self.time_sum.index_add_(0, latents, exact * step_codes.t)
        self.square_sum.index_add_(0, latents, exact**2)
        by_position = self.position_sum[step_codes.step]
        by_position.view(-1).index_add_(0, latents * by_position.shape[1] + positions, exact)
        n_bins = self.histogram.shape[1]
        bins = ((values.log2() + _OCTAVES) * _BINS).floor().long().clamp(0, n_bins - 1)
        self.histogram.view(-1).index_add_(0, latents * n_bins + bins, torch.ones_like(bins))

    def _spread(self, entries: Entries, n_images: int) -> Tensor:
        """Add squared distances from the centre of activation; returns the sums of values [B x d_sae]."""
        latents, values, images, positions = entries
        height, width = self.size.tolist()
        y = (positions // width + 0.5).double() / height
        x = (positions % width + 0.5).double() / width
        weighted = values.double() * torch.stack([torch.ones_like(y), y, x, y**2 + x**2])
        sums = torch.zeros((4, n_images * len(self.top)), dtype=torch.float64)
        sums.index_add_(1, images * len(self.top) + latents, weighted)
        total, down, across, squares = sums.unbind()
        scatter = squares - (down**2 + across**2) / total.clamp(min=1e-30)
        self.spread_sum += scatter.clamp(min=0).view(n_images, -1).sum(0)
        return sums[0]

    def _raise(self, tops: Tensor) -> None:
        """Shift the levels of each latent so that the top one is `tops`, which are no lower than before."""
        shift = (tops - self.top).clamp(max=N_LEVELS - 1)
        shift[self.area.sum((0, 2)) == 0] = 0
        for by in sorted(set(shift[shift > 0].tolist())):
            rows = (shift == by).nonzero()[:, 0]
            for counts in (self.hits, self.area):
                old = counts[:, rows]
                new = torch.zeros_like(old)
                new[: N_LEVELS - by] = old[by:]
                new[0] += old[:by].sum(0)
                counts[:, rows] = new
        self.top = tops
