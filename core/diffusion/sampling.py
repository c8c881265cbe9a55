"""What the sampler hands over: previews, a finished generation, and the moments in between."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from PIL import Image
from torch import Tensor


class Preview(NamedTuple):
    """What the sampler expects the picture to become, after one of its steps."""

    step: int
    """Sampler step, from 0."""
    n_steps: int
    """Sampler steps in all."""
    t: float
    """Normalised time of the step: 1.0 the first, 0.0 the last."""
    stage: str
    """`early`, `middle` or `late`."""
    image: Image.Image | None
    """The predicted clean picture, RGB; None where previews were not asked for."""


Branch = Literal["cond", "uncond"]
"""The half of a guided batch that has the prompts, and the half that has the empty text."""


class StepContext(NamedTuple):
    """What the sampler is doing while it calls the U-Net: whatever is hooked into the U-Net reads it from here."""

    step: int
    """Sampler step, from 0."""
    n_steps: int
    """Sampler steps in all."""
    t: float
    """Normalised time of the step: 1.0 the first, 0.0 the last."""
    branches: tuple[Branch, ...]
    """The equal parts of the call's batch, in order."""


class SamplerState(NamedTuple):
    """A batch of latents after a sampler step."""

    step_context: StepContext
    """The step."""
    x: Tensor
    """[B, C, h, w] latents after the step."""
    x0: Tensor
    """[B, C, h, w] the clean latents that the step predicts."""


@dataclass(frozen=True, eq=False)
class Generation:
    """A generated picture and all that it takes to make it again."""

    image: Image.Image
    """The picture, RGB, `image_size` pixels square."""
    latents: Tensor
    """Its latents [1, C, h, w] as the sampler left them, on the CPU."""
    prompt: str
    """The prompt as typed."""
    seed: int
    """Seed of the initial noise."""
    num_inference_steps: int
    """Sampler steps, one U-Net evaluation each."""
    guidance_scale: float
    """Scale of classifier-free guidance."""
    previews: tuple[Preview, ...]
    """One a step, first to last; empty where previews were not asked for."""


def ddim_step(x: Tensor, eps: Tensor, abar: float, abar_after: float) -> tuple[Tensor, Tensor]:
    """The predicted clean latents, and the latents one deterministic step on (Song et al. 2021, eq. 12, eta 0)."""
    x0 = (x - (1 - abar) ** 0.5 * eps) / abar**0.5
    return x0, abar_after**0.5 * x0 + (1 - abar_after) ** 0.5 * eps
