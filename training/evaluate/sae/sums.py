"""Sums over positions from which explained variance, PCA, cosine and L0 are computed in one pass."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from core.sae.autoencoder import SparseAutoencoder

Floats = npt.NDArray[np.float64]


@dataclass
class ReconstructionMoments:
    """Sums over positions, for means and PCA."""

    n: int = 0
    """Positions."""
    total: Floats = field(default_factory=lambda: np.zeros(0))
    """[d_in] sum of x."""
    outer: Floats = field(default_factory=lambda: np.zeros((0, 0)))
    """[d_in, d_in] sum of x x^T."""

    def add(self, x: Floats) -> None:
        """Add positions [n, d_in]."""
        if not self.n:
            self.total, self.outer = np.zeros(x.shape[1]), np.zeros((x.shape[1], x.shape[1]))
        self.n += len(x)
        self.total += x.sum(0)
        self.outer += x.T @ x

    def __add__(self, other: "ReconstructionMoments") -> "ReconstructionMoments":
        return (
            ReconstructionMoments(self.n + other.n, self.total + other.total, self.outer + other.outer)
            if self.n
            else other
        )

    def components(self, k: int) -> tuple[Floats, Floats]:
        """The mean [d_in], and the k directions of most variance [k, d_in]."""
        mean = self.total / self.n
        covariance = self.outer / self.n - np.outer(mean, mean)
        _, vectors = np.linalg.eigh(covariance)
        return mean, vectors[:, ::-1][:, :k].T


@dataclass
class ReconstructionSums:
    """Sums for one SAE at one slot, image by image."""

    errors: list[float] = field(default_factory=list)
    """Squared error over each image's positions."""
    pca_errors: list[float] = field(default_factory=list)
    """The same of PCA with k components."""
    sums: list[Floats] = field(default_factory=list)
    """[d_in] sum of each image's positions."""
    squares: list[float] = field(default_factory=list)
    """Sum of squares of each image's positions."""
    cosines: list[float] = field(default_factory=list)
    """Mean cosine between position and reconstruction, per image."""
    n_positions: int = 0
    """Positions of all images."""
    n_active: int = 0
    """Active latents, summed over all positions."""
    fired: Floats = field(default_factory=lambda: np.zeros(0))
    """[d_sae] positions at which each latent is active."""
    pooled_pca_errors: list[float] = field(default_factory=list)
    """Squared error over each image's positions, for PCA fitted on all steps together."""

    @classmethod
    def pooled(cls, tallies: "Sequence[ReconstructionSums]") -> "ReconstructionSums":
        """All steps of the same images together."""

        def add(parts: Iterable[Sequence[Any]]) -> list[Any]:
            return [sum(values[1:], start=values[0]) for values in zip(*parts, strict=True)]

        return cls(
            errors=add(t.errors for t in tallies),
            pca_errors=add(t.pooled_pca_errors for t in tallies),
            sums=add(t.sums for t in tallies),
            squares=add(t.squares for t in tallies),
            cosines=[total / len(tallies) for total in add(t.cosines for t in tallies)],
            n_positions=sum(t.n_positions for t in tallies),
            n_active=sum(t.n_active for t in tallies),
            fired=np.sum([t.fired for t in tallies], axis=0),
        )

    def explained(self, rows: npt.NDArray[np.int64] | None = None, pca: bool = False) -> float:
        """Explained variance over some images (all by default), at most 1."""
        chosen = np.arange(len(self.errors)) if rows is None else rows
        errors = np.array(self.pca_errors if pca else self.errors)[chosen].sum()
        n = self.n_positions / len(self.errors) * len(chosen)
        total = np.array(self.sums)[chosen].sum(0)
        variance = np.array(self.squares)[chosen].sum() - float(total @ total) / n
        return float(1 - errors / variance)


Basis = tuple[Floats, Floats]
"""A mean [d_in] and directions [k, d_in]."""


@torch.no_grad()
def tally(tally_: ReconstructionSums, sae: SparseAutoencoder, x: Tensor, basis: Basis, pooled: Basis) -> None:
    """Add one image's positions x [n, d_in]; `basis` is PCA at this step, `pooled` PCA over all steps."""
    code = sae.encode(x)
    rebuilt = sae.decode(code).double().numpy()
    flat = x.double().numpy()
    tally_.errors.append(float(((flat - rebuilt) ** 2).sum()))
    for errors, (mean, components) in ((tally_.pca_errors, basis), (tally_.pooled_pca_errors, pooled)):
        centred = flat - mean
        errors.append(float(((centred - centred @ components.T @ components) ** 2).sum()))
    tally_.sums.append(flat.sum(0))
    tally_.squares.append(float((flat**2).sum()))
    norms = np.linalg.norm(flat, axis=1) * np.linalg.norm(rebuilt, axis=1)
    tally_.cosines.append(float(((flat * rebuilt).sum(1) / np.maximum(norms, 1e-12)).mean()))
    active = (code.values > 0).flatten()
    if not len(tally_.fired):
        tally_.fired = np.zeros(sae.cfg.d_sae)
    tally_.fired += np.bincount(code.indices.flatten()[active].numpy(), minlength=sae.cfg.d_sae)
    tally_.n_positions += len(x)
    tally_.n_active += int(active.sum())
