"""Example images: one gallery for all SAEs of a collection, selected so that every latent has some."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from core.arrays import Floats, Ints
from core.concepts.io import Examples
from training.labels.tally import StepCodes

N_EXAMPLES = 8
"""Examples of each latent."""
_N_WANTED = 24
"""Candidate images of each latent, those of highest mean."""


def select_gallery(means: Sequence[Tensor], size: int) -> list[int]:
    """Indices of at most `size` images that together show as many latents as possible, ascending.

    Greedy: images are added one by one. Each latent votes for the images where it is strongest; its votes count less
    the more of them are selected already, and more if it has few candidates.

    Args:
        means: For each SAE, [N, d_sae] mean value of each latent in each image.
        size: Number of images to select.
    """
    wanted, weight = _wanted(means)
    n_images = len(means[0])
    have = np.zeros(len(wanted))
    chosen: list[int] = []
    left = np.ones(n_images, dtype=bool)
    while len(chosen) < min(size, n_images):
        votes = weight / (1 + have[:, None]) ** 2
        score = np.bincount(wanted.ravel(), votes.ravel(), minlength=n_images)
        best = int(np.where(left, score, -1).argmax())
        chosen.append(best)
        left[best] = False
        have += ((wanted == best) & (weight > 0)).any(1)
    return sorted(chosen)


def _wanted(means: Sequence[Tensor]) -> tuple[Ints, Floats]:
    """[latents, candidates] candidate images of the latents that fire, and their weights; 0 where one does not fire."""
    images, weights = [], []
    for of_sae in means:
        values, rows = of_sae.topk(min(_N_WANTED, len(of_sae)), dim=0)
        fires = (values > 0).T
        alive = fires.any(1)
        images.append(rows.T[alive].numpy())
        weights.append((fires.double() / fires.sum(1, keepdim=True).clamp(min=1))[alive].numpy())
    return np.concatenate(images), np.concatenate(weights)


class ExampleKeeper:
    """Keeps the strongest images of each latent of one SAE."""

    def __init__(self, d_sae: int, height: int, width: int) -> None:
        self._size = (height, width)
        self._peaks = torch.zeros(d_sae, N_EXAMPLES)
        self._images = torch.full((d_sae, N_EXAMPLES), -1, dtype=torch.int16)
        self._maps = torch.zeros((d_sae, N_EXAMPLES, height * width), dtype=torch.uint8)

    def add(self, numbers: Sequence[int], codes_by_step: Sequence[StepCodes]) -> None:
        """Add a batch of images by their numbers in the gallery, with their codes."""
        for row, number in enumerate(numbers):
            grid = torch.zeros(self._maps.shape[0] * self._maps.shape[2])
            for _, _, (latents, values, images, positions) in codes_by_step:
                own = images == row
                cells = latents[own] * self._maps.shape[2] + positions[own]
                grid.scatter_reduce_(0, cells, values[own], "amax")
            self._take(number, grid.view(self._maps.shape[0], -1))

    def examples(self) -> Examples:
        """The examples so far."""
        return Examples(self._images, self._maps.view(*self._maps.shape[:2], *self._size), self._peaks)

    def _take(self, number: int, grids: Tensor) -> None:
        """Keep the maps [d_sae, positions] of an image that are among the strongest."""
        peaks = grids.amax(1)
        latents = (peaks > self._peaks[:, -1]).nonzero()[:, 0]
        grids, peaks = grids[latents], peaks[latents]
        both = torch.cat([self._peaks[latents], peaks[:, None]], 1)
        order = both.sort(dim=1, descending=True, stable=True).indices[:, :N_EXAMPLES]
        maps = (grids * (255 / peaks[:, None])).round().to(torch.uint8)
        images = torch.full((len(latents), 1), number, dtype=torch.int16)

        def best(old: Tensor, new: Tensor) -> Tensor:
            both = torch.cat([old[latents], new], 1)
            return both[torch.arange(len(latents))[:, None], order]

        self._maps[latents] = best(self._maps, maps[:, None])
        self._images[latents] = best(self._images, images)
        self._peaks[latents] = best(self._peaks, peaks[:, None])
