"""The sampler's step and its types: step contexts, states, previews and finished generations."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeVar

from PIL import Image
from torch import Tensor

NameT = TypeVar("NameT", bound=str)


class Preview(NamedTuple):
    """The image that the sampler predicts after one of its steps."""

    step: int
    """Sampler step, from 0."""
    n_steps: int
    """Sampler steps in all."""
    t: float
    """Normalised time of the step: 1.0 the first, 0.0 the last."""
    stage: str
    """`early`, `middle` or `late`."""
    image: Image.Image | None
    """The predicted clean image, RGB; None where previews were not requested."""


Branch = Literal["cond", "uncond"]
"""The conditional branch of classifier-free guidance, with the prompts, and the unconditional one, with empty texts."""


class StepContext(NamedTuple):
    """The step in which the sampler calls the noise predictor; hooks in the network read it."""

    step: int
    """Sampler step, from 0."""
    n_steps: int
    """Sampler steps in all."""
    t: float
    """Normalised time of the step: 1.0 the first, 0.0 the last."""
    branches: tuple[Branch, ...]
    """The branches of the batch, of equal size, in order."""


class SamplerState(NamedTuple):
    """A batch of latents after a sampler step."""

    step_context: StepContext
    """The step after which this is the state."""
    x: Tensor
    """[B, C, h, w] latents after the step."""
    x0: Tensor
    """[B, C, h, w] clean latents predicted in the step."""


@dataclass(frozen=True, eq=False)
class Generation:
    """A generated image with the settings that reproduce it."""

    image: Image.Image
    """The image, RGB, `image_size` pixels square."""
    latents: Tensor
    """The final latents [1, C, h, w] of the sampler, on the CPU."""
    prompt: str
    """The prompt as typed."""
    seed: int
    """Seed of the initial noise."""
    num_inference_steps: int
    """Sampler steps, one U-Net evaluation each."""
    guidance_scale: float
    """Scale of classifier-free guidance."""
    previews: tuple[Preview, ...]
    """One per step, first to last; empty where previews were not requested."""


def as_list(names: Iterable[NameT]) -> list[NameT]:
    """Names as a list; a single text is one name, never its letters."""
    return [names] if isinstance(names, str) else list(names)  # type: ignore[list-item]


def ddim_step(x: Tensor, eps: Tensor, abar: float, abar_after: float) -> tuple[Tensor, Tensor]:
    """The predicted clean latents, and the latents after one deterministic step (Song et al. 2021, eq. 12, eta 0)."""
    x0 = (x - (1 - abar) ** 0.5 * eps) / abar**0.5
    return x0, abar_after**0.5 * x0 + (1 - abar_after) ** 0.5 * eps
