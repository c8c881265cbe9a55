"""Pictures drawn in batches, with what SAEs make of them on the way and which classes are where at the end."""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from core.activations.hooks import ActivationKey, record
from core.diffusion.diffuser import Diffuser
from core.diffusion.schedule import step_times
from core.sae.autoencoder import SaeId, SparseAutoencoder
from core.segmentation.semantic import Segmenter
from training.labels.tally import Entries, StepCodes

Size = tuple[int, int]
"""Positions down and across."""


class Batch(NamedTuple):
    """B pictures drawn together."""

    images: list[Image.Image]
    """As they ended."""
    codes_by_step: dict[SaeId, list[StepCodes]]
    """Codes of each SAE, a moment for each of its steps in order."""
    sizes: dict[str, Size]
    """Of each hookpoint's update."""


def draw(
    model: Diffuser,
    saes: Mapping[SaeId, SparseAutoencoder],
    steps: Mapping[SaeId, Sequence[int]],
    prompts: Sequence[str],
    seeds: Sequence[int],
) -> Batch:
    """Draw pictures and encode their updates as they come; SAEs are on the model's device, the codes on the CPU.

    As many pictures at once as the model's memory has room for: what comes of them differs by rounding alone.

    Args:
        model: The model; its own number of steps and guidance.
        saes: The SAEs.
        steps: The sampler steps at which each reads.
        prompts: A prompt a picture.
        seeds: Seed of each picture's noise.
    """
    parts = model.in_parts(len(prompts), lambda some: _draw(model, saes, steps, list(prompts[some]), list(seeds[some])))
    return parts[0] if len(parts) == 1 else _together(parts)


def _draw(
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
    ):
        *_, last = model.sample(prompts, seeds=seeds)
    return Batch(model.decode(last.x), codes_by_step, sizes)


def _together(parts: Sequence[Batch]) -> Batch:
    """One batch of several whose pictures follow each other."""
    starts = [0, *accumulate(len(part.images) for part in parts)]
    return Batch(
        [image for part in parts for image in part.images],
        {
            sae_id: [
                _moment(of_step, starts)
                for of_step in zip(*(part.codes_by_step[sae_id] for part in parts), strict=True)
            ]
            for sae_id in parts[0].codes_by_step
        },
        parts[0].sizes,
    )


def _moment(parts: Sequence[StepCodes], starts: Sequence[int]) -> StepCodes:
    """One moment of the same moment of several batches, the first picture of each being that of its start."""
    entries = [
        part.entries._replace(images=part.entries.images + start) for part, start in zip(parts, starts, strict=False)
    ]
    return parts[0]._replace(entries=Entries(*(torch.cat(column) for column in zip(*entries, strict=True))))


def active_entries(sae: SparseAutoencoder, x: Tensor) -> Entries:
    """What is active in the codes of positions x [B, positions, d_in]."""
    code = sae.encode(x.flatten(0, 1))
    active = code.values > 0
    rows = active.nonzero()[:, 0]
    entries = (code.indices[active], code.values[active], rows // x.shape[1], rows % x.shape[1])
    return Entries(*(part.cpu() for part in entries))


def label_maps(segmenter: Segmenter, images: Sequence[Image.Image]) -> Tensor:
    """[B, H, W] class of each pixel, on the CPU; -1 where there is none."""
    return segmenter.segment(images).label_map().cpu()


def class_areas(labels: Tensor, n_classes: int) -> Tensor:
    """[B, K] share of each picture that each class covers, from label maps [B, H, W]."""
    return torch.stack([torch.bincount(one[one >= 0], minlength=n_classes) / one.numel() for one in labels])
