"""All edits of one run at one hookpoint and branch: one encoding, and each edit on what the one before left."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from core.activations.hooks import ActivationKey
from core.edits.base import BaseEdit, EditContext, SelectedLatents
from core.edits.regions import RegionMask
from core.sae.autoencoder import Code, SparseAutoencoder


@dataclass(frozen=True, eq=False)
class EditAtSite:
    """One edit at one site, for some images of the batch."""

    edit: BaseEdit
    """The edit."""
    latents: SelectedLatents
    """The n latents that it acts on here."""
    columns: Tensor
    """[n] where they are among all latents that are edited at the site."""
    steps: range
    """Sampler steps of the edit."""
    rows: slice
    """The images."""
    region: RegionMask
    """Where in the images."""


class SiteEdits:
    """Maps the updates of one site to edited ones."""

    def __init__(self, sae: SparseAutoencoder, numbers: Tensor, edits: Sequence[EditAtSite]) -> None:
        """`numbers` [n] are all latents that some edit acts on."""
        self._sae, self._numbers, self.edits = sae, numbers, edits
        self._directions = sae.W_dec.detach()[numbers]

    @torch.no_grad()
    def __call__(self, key: ActivationKey, update: Tensor) -> Tensor | None:
        """The edited update [B, C, h, w]; None where no edit acts at this step."""
        edits = [one for one in self.edits if key.step in one.steps]
        if not edits:
            return None
        channels, grid = update.shape[1], (update.shape[2], update.shape[3])
        x = update.float().flatten(2).transpose(1, 2)  # [B, P, C]
        code = self._sae.encode(x.reshape(-1, channels).to(self._sae.b_dec.device))
        z = values_of(code, self._numbers, self._sae.cfg.d_sae).view(*x.shape[:2], -1)
        new_z, latents_changed = z.clone(), False
        for one in edits:
            context = EditContext(key, grid, one.latents, one.region.grid(*grid).to(z.device))
            change = one.edit.apply(x[one.rows].view(-1, *grid, channels), new_z[one.rows][..., one.columns], context)
            if change.z is not None:
                new_z[one.rows, :, one.columns] = change.z
                latents_changed = True
            if change.x is not None:
                x = x.clone()
                x[one.rows] = change.x.flatten(1, 2)
        if latents_changed:
            x = x + ((new_z - z) @ self._directions).to(x.device)
        return x.transpose(1, 2).reshape(update.shape)


def values_of(code: Code, numbers: Tensor, d_sae: int) -> Tensor:
    """[N, n] values of some latents in a code of N positions, 0 where they are not active."""
    dense = torch.zeros(len(code.values), d_sae, dtype=code.values.dtype, device=code.values.device)
    # Empty entries of a code have the index -1 and the value 0: added anywhere they change nothing.
    return dense.scatter_add_(1, code.indices.clamp_min(0), code.values)[:, numbers]
