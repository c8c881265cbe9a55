"""Batches of generated images, with the SAE codes of their denoising and the label maps of the results."""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from core.activations.hooks import ActivationKey, record
from core.diffusion.diffuser import Diffuser
from core.diffusion.schedule import step_at, step_times
from core.sae.autoencoder import SaeId, SparseAutoencoder, output_hookpoints
from core.segmentation.semantic import Segmenter
from training.labels.tally import Entries, StepCodes

Size = tuple[int, int]
"""Rows and columns of positions."""


class Batch(NamedTuple):
    """B images that were generated together."""

    images: list[Image.Image]
    """The final images."""
    codes_by_step: dict[SaeId, list[StepCodes]]
    """Codes of each SAE, one item for each of its steps, in order."""
    sizes: dict[str, Size]
    """Grid of each hookpoint."""


def steps_of(sae_id: SaeId, n_steps: int, n_each: int) -> list[int]:
    """The steps, of `n_steps`, at which an SAE is read: `n_each`, evenly spread, for one that is for all times."""
    if sae_id.t == "all":
        return sorted({round(step) for step in np.linspace(0, n_steps - 1, n_each)})
    return [step_at(sae_id.t, n_steps)]


def sample_and_encode(
    model: Diffuser,
    saes: Mapping[SaeId, SparseAutoencoder],
    steps: Mapping[SaeId, Sequence[int]],
    prompts: Sequence[str],
    seeds: Sequence[int],
) -> Batch:
    """Generate images and encode the updates of their denoising on the fly.

    As many images are generated together as the model's memory has room for; results differ by rounding alone.

    Args:
        model: The model; its default number of steps and guidance scale are used.
        saes: The SAEs, on the model's device. Codes are returned on the CPU.
        steps: The sampler steps at which each SAE is read.
        prompts: One prompt per image.
        seeds: Seed of each image's noise.
    """
    parts = model.in_parts(
        len(prompts), lambda some: _sample(model, saes, steps, list(prompts[some]), list(seeds[some]))
    )
    return parts[0] if len(parts) == 1 else _concatenated(parts)


def _sample(
    model: Diffuser,
    saes: Mapping[SaeId, SparseAutoencoder],
    steps: Mapping[SaeId, Sequence[int]],
    prompts: list[str],
    seeds: list[int],
) -> Batch:
    times = step_times(model.spec.num_inference_steps)
    codes_by_step: dict[SaeId, list[StepCodes]] = {sae_id: [] for sae_id in saes}
    sizes: dict[str, Size] = {}

    def encode(key: ActivationKey, update: Tensor) -> None:
        sizes[key.hookpoint] = (update.shape[2], update.shape[3])
        rows = update.flatten(2).transpose(1, 2).float()
        for sae_id, sae in saes.items():
            for which, step in enumerate(steps[sae_id]):
                if (sae_id.hookpoint, sae_id.branch, step) == key:
                    codes_by_step[sae_id].append(StepCodes(which, float(times[step]), active_entries(sae, rows)))

    with record(
        model,
        {sae_id.hookpoint for sae_id in saes},
        branches={sae_id.branch for sae_id in saes},
        steps={step for own in steps.values() for step in own},
        sink=encode,
        outputs=output_hookpoints(saes),
    ):
        *_, last = model.sample(prompts, seeds=seeds)
    return Batch(model.decode(last.x), codes_by_step, sizes)


def _concatenated(parts: Sequence[Batch]) -> Batch:
    """Several batches as one, in order."""
    starts = [0, *accumulate(len(part.images) for part in parts)]
    return Batch(
        [image for part in parts for image in part.images],
        {
            sae_id: [
                _concatenated_codes(of_step, starts)
                for of_step in zip(*(part.codes_by_step[sae_id] for part in parts), strict=True)
            ]
            for sae_id in parts[0].codes_by_step
        },
        parts[0].sizes,
    )


def _concatenated_codes(parts: Sequence[StepCodes], starts: Sequence[int]) -> StepCodes:
    """The codes of several batches at one step as one; `starts` are the numbers of their first images."""
    entries = [
        part.entries._replace(images=part.entries.images + start) for part, start in zip(parts, starts, strict=False)
    ]
    return parts[0]._replace(entries=Entries(*(torch.cat(column) for column in zip(*entries, strict=True))))


def active_entries(sae: SparseAutoencoder, x: Tensor) -> Entries:
    """The active entries of the codes of updates x [B, positions, d_in]."""
    code = sae.encode(x.flatten(0, 1))
    active = code.values > 0
    rows = active.nonzero()[:, 0]
    entries = (code.indices[active], code.values[active], rows // x.shape[1], rows % x.shape[1])
    return Entries(*(part.cpu() for part in entries))


def label_maps(segmenter: Segmenter, images: Sequence[Image.Image]) -> Tensor:
    """[B, H, W] class of each pixel, on the CPU; -1 for none."""
    return segmenter.segment(images).label_map().cpu()


def class_areas(labels: Tensor, n_classes: int) -> Tensor:
    """[B, K] share of the image that each class covers, from label maps [B, H, W]."""
    return torch.stack([torch.bincount(one[one >= 0], minlength=n_classes) / one.numel() for one in labels])
