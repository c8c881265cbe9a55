"""Values that are no numbers: found in weights when a model is loaded, and in what it computes.

Half precision overflows beyond 65,504. Where that is the reason, the part concerned computes in float32 instead.
"""

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from core.errors import NotFiniteError
from core.pipeline_folder import WEIGHTS

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

log = logging.getLogger(__name__)

NAMES = {"unet": "The U-Net", "vae": "The autoencoder", "text_encoder": "The text encoder"}
"""Names of a pipeline's components in messages."""

SAMPLER = "The sampler"
"""What gave latents to decode, in messages."""


def check_finite(values: Tensor, part: str, dtype: torch.dtype) -> None:
    """Raise a `NotFiniteError` if what a part has computed in `dtype` is not finite. Synchronises with the device."""
    if not values.isfinite().all():
        raise NotFiniteError(part, dtype)


def name_of(dtype: torch.dtype) -> str:
    """Name of a dtype, such as `float16`."""
    return str(dtype).removeprefix("torch.")


def finite_pipeline(
    name: str, dtype: torch.dtype, read: "Callable[[torch.dtype], StableDiffusionPipeline]"
) -> "StableDiffusionPipeline":
    """A pipeline in `dtype`, as `read` loads it, except for components whose weights only float32 can hold.

    Weights that are not finite in float32 either are a warning in the log: what they compute is an error later.
    """
    pipeline = read(dtype)
    bad = _not_finite(pipeline)
    if bad and dtype != torch.float32:
        wide = read(torch.float32)
        for component, weight in bad.items():
            log.warning(
                "%s: %s is not finite in %s: %s stays in float32",
                *(name, weight, name_of(dtype), NAMES[component].lower().replace("u-net", "U-Net")),
            )
            setattr(pipeline, component, getattr(wide, component))
        bad = _not_finite(pipeline)
    for component, weight in bad.items():
        log.warning("%s: %s has weights that are not finite, such as %s", name, NAMES[component], weight)
    return pipeline


def _not_finite(pipeline: "StableDiffusionPipeline") -> dict[str, str]:
    """The components with weights that are not finite, and the first of these."""
    found = {}
    for component in WEIGHTS:
        for name, weight in getattr(pipeline, component).named_parameters():
            # A sum takes one pass over memory, and is not finite if a value is not.
            if weight.device.type != "meta" and not weight.detach().sum(dtype=torch.float32).isfinite():
                found[component] = f"{component}.{name}"
                break
    return found
