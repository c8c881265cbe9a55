"""How an edited image differs from the unedited one, and how far edited concepts leave the range seen in data."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from core.activations.hooks import ActivationKey, record
from core.concepts.trace import SaeSite
from core.edits.base import BaseEdit, window_of
from core.edits.editor import Editor
from core.edits.regions import RegionMask
from core.edits.site import values_of
from core.sae.autoencoder import output_hookpoints

CELL = 8
"""Side in pixels of the cells whose means count as low spatial frequency: what one latent position covers."""


def frequencies(difference: Tensor, where: Tensor) -> tuple[float, float]:
    """Root mean squares over the mask `where` [H, W] of a difference [3, H, W]: low frequencies (means of cells), and
    the rest.
    """
    low = F.interpolate(F.avg_pool2d(difference[None], CELL), scale_factor=CELL, mode="nearest")[0]
    coarse, fine = (float(part[:, where].square().mean().sqrt()) for part in (low, difference - low))
    return coarse, fine


def layout_iou(new: Tensor, old: Tensor, where: Tensor, min_area: int = 1) -> float:
    """Mean intersection over union of two label maps [H, W] over the classes of the old one, within the mask `where`.

    Classes of fewer than `min_area` pixels are left out; NaN where none is left.
    """
    ious = []
    for label in sorted(set(old[where].tolist())):
        a, b = (new == label) & where, (old == label) & where
        if label >= 0 and int(b.sum()) >= min_area:
            ious.append(float((a & b).sum() / (a | b).sum()))
    return float(np.mean(ious)) if ious else float("nan")


class OutOfRange(NamedTuple):
    """How the values of edited concepts compare with those in data."""

    share: float
    """Share of the active values above the concept's 99th percentile in data, which is 0.01 in data; NaN where none is
    active."""
    times: float
    """The largest value in units of its concept's 99th percentile; 0 where none is active."""


class _Watched(NamedTuple):
    """An edit at one site."""

    row: int
    site: SaeSite
    numbers: Tensor
    """[n] edited latents."""
    p99: Tensor
    """[n] their 99th percentiles."""
    steps: range
    inside: RegionMask


class OutOfRangeMeter:
    """Measures how strong edited concepts become, at the sites, steps and regions of their edits.

    Enter `context` after the edits, in one run of the sampler with a list of edits for each image of the batch.
    """

    def __init__(self, editor: Editor, edits: Sequence[Sequence[BaseEdit]], n_steps: int) -> None:
        model = editor.model
        self._saes = editor.saes
        self._watched = [
            _watched(editor, row, one, site, numbers, n_steps)
            for row, of_row in enumerate(edits)
            for one in of_row
            if one.strength
            for site, numbers in editor.concepts(one).items()
        ]
        self._n_active, self._n_above = [0] * len(edits), [0] * len(edits)
        self._times = [0.0] * len(edits)
        self.context = record(
            model,
            dict.fromkeys(one.site.hookpoint for one in self._watched) or None,
            steps={step for one in self._watched for step in one.steps} or None,
            sink=self._see,
            outputs=output_hookpoints(self._saes),
        )
        """The recording, for the `contexts` of the run."""

    def out_of_range(self, row: int) -> OutOfRange:
        """What was measured for one image of the batch."""
        n = self._n_active[row]
        return OutOfRange(self._n_above[row] / n if n else float("nan"), self._times[row])

    def _see(self, key: ActivationKey, update: Tensor) -> None:
        for one in self._watched:
            if one.site != (key.hookpoint, key.branch) or key.step not in one.steps:
                continue
            sae = self._saes[one.site]
            x = update[one.row].flatten(1).T.to(sae.b_dec.device, torch.float32)
            inside = one.inside.grid(*update.shape[2:]).flatten().to(x.device) > 0
            z = values_of(sae.encode(x[inside]), one.numbers, sae.cfg.d_sae)
            shares = (z / one.p99)[z > 0]
            self._n_active[one.row] += shares.numel()
            self._n_above[one.row] += int((shares > 1).sum())
            self._times[one.row] = max(self._times[one.row], float(shares.max()) if shares.numel() else 0.0)


def _watched(editor: Editor, row: int, one: BaseEdit, site: SaeSite, numbers: Sequence[int], n_steps: int) -> _Watched:
    device = editor.saes[site].b_dec.device
    p99 = torch.tensor(editor.table(site).frame["p99"].to_numpy()[list(numbers)], dtype=torch.float32, device=device)
    return _Watched(
        row,
        site,
        torch.tensor(numbers, device=device),
        p99.clamp_min(1e-9),
        window_of(one, n_steps, editor.model.spec.stages),
        RegionMask(one.active_region, editor.model.image_size),
    )
