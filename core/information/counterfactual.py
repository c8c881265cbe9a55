"""`change_word`: the image that the same noise gives under a prompt with one word left out or replaced.

Without guidance a DDIM step is a deterministic map x' = r x + b eps(x), one step of an ordinary differential equation
(Song et al. 2021, arXiv 2010.02502). Its inverse x = (x' - b eps(x)) / r is found by fixed-point iteration from x = x'
(Pan et al. 2023, arXiv 2309.04907): the first iteration is the usual DDIM inversion, and each further one reduces the
error several times. The steps are the sampler's own, so that sampling from the noise leads back to the image.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from core.arrays import Floats
from core.diffusion.diffuser import Diffuser
from core.diffusion.predictor import PromptedModel
from core.diffusion.sampling import ddim_step
from core.diffusion.text import delete_words, plain, replace_word
from core.errors import Cancelled, PromptError
from core.information.attribution import choose_words
from core.information.measuring import check_text, default_steps, latents_of
from core.job import Callback, Job, finished

if TYPE_CHECKING:
    from core.diffusion.sampling import Generation
    from core.information.measuring import ImageLike

ProgressT = TypeVar("ProgressT")

N_FIXED_POINT_ITERATIONS = 4
"""U-Net evaluations per inverted step. On `picturebook` in 25 steps, 1, 2, 3 and 4 leave a reconstruction error of 7.5,
2, 1 and 0.7 % of the latents' length; 100 evaluations in 100 steps of one iteration leave 2 %."""


@dataclass(frozen=True, eq=False)
class Inversion:
    """The noise that the sampler turns into an image under a prompt."""

    noise: Tensor
    """[C, h, w] float32, on the model's device."""
    latents: Tensor
    """[C, h, w] latents of the image that was inverted."""
    prompt: str
    """The prompt of the inversion; may be empty."""
    num_inference_steps: int
    """Steps of the inversion, and of sampling from the noise."""


@dataclass(frozen=True, eq=False)
class WordChange:
    """An image sampled again from its inverted noise, with its prompt and with a word of it changed."""

    word: str
    """The word, lower case."""
    to: str | None
    """Its replacement; None: it was left out."""
    prompt: str
    """The prompt as typed."""
    changed_prompt: str
    """The prompt with the word changed; may be empty."""
    before: Image.Image
    """The image from its noise under `prompt`."""
    after: Image.Image
    """The image from the same noise under `changed_prompt`."""
    change: Floats
    """[h, w] squared difference of the latents of both, summed over channels."""
    relative_change: float
    """Distance of the latents of both, relative to the length of the original latents."""
    reconstruction_error: float
    """Distance of the latents of `before` from the original ones, over their length: a relative change of this size is
    not significant."""
    n_evals: int
    """Latents that went through the U-Net."""


class InversionProgress(NamedTuple):
    """Progress of `change_word`, after a U-Net call."""

    n_evals: int
    """Latents that went through the U-Net so far."""
    max_evals: int
    """Latents in all."""


def invert(
    model: PromptedModel,
    image: "ImageLike | Generation",
    prompt: str,
    *,
    num_inference_steps: int | None = None,
    n_fixed_point_iterations: int = N_FIXED_POINT_ITERATIONS,
) -> Inversion:
    """The noise from which the sampler, without guidance, makes `image` under `prompt`.

    Args:
        model: A `Diffuser`.
        image: A PIL image, the path of one, a `Generation`, or latents [1, C, h, w].
        prompt: A description of the image; may be empty.
        num_inference_steps: Sampler steps; by default the model's.
        n_fixed_point_iterations: U-Net evaluations per step.

    Raises:
        PromptError: The model cannot read the prompt.
        ValueError: A number of steps that the sampler does not have; no iteration.
    """
    n_steps = _check(model, prompt, num_inference_steps, n_fixed_point_iterations)
    with model.busy():
        latents = latents_of(model, image)
        return Job(_invert(model, latents, prompt, n_steps, n_fixed_point_iterations, _no_progress)).result()


def redraw(model: PromptedModel, inversion: Inversion, prompts: Sequence[str]) -> Tensor:
    """[N, C, h, w] latents that the sampler, without guidance, makes from one noise under each of N prompts.

    Raises:
        PromptError: The model cannot read a prompt; the empty one it can.
    """
    for prompt in prompts:
        _check(model, prompt, inversion.num_inference_steps)
    with model.busy():
        return Job(_redraw(model, inversion, prompts, _no_progress)).result()


def change_word_iter(
    model: Diffuser,
    image: "ImageLike | Generation",
    prompt: str,
    word: str,
    to: str | None = None,
    *,
    num_inference_steps: int | None = None,
    n_fixed_point_iterations: int = N_FIXED_POINT_ITERATIONS,
    callback: Callback[InversionProgress] | None = None,
) -> Job[InversionProgress, WordChange]:
    """Sample an image again from its own noise, with a word of its prompt left out or replaced.

    `change_word` returns the result; `change_word_iter` a `Job`, which yields progress after every U-Net call.
    Arguments are checked before the job starts.

    Args:
        model: A `Diffuser`.
        image: A PIL image, the path of one, a `Generation`, or latents [1, C, h, w]. No guidance is used, whatever the
            image was generated with, so that all change comes from the prompt.
        prompt: A description of the image.
        word: A word of the prompt; every occurrence of it is changed.
        to: Its replacement, of one word or several; None leaves the word out.
        num_inference_steps: Sampler steps; by default the model's.
        n_fixed_point_iterations: U-Net evaluations per inverted step.
        callback: Called after every U-Net call. If it returns False, `Cancelled` is raised.

    Raises:
        PromptError: The prompt lacks the word, or the model cannot read the prompt before or after the change.
        ValueError: A number of steps that the sampler does not have; no iteration.
    """
    n_steps = _check(model, prompt, num_inference_steps, n_fixed_point_iterations)
    (word,) = choose_words(prompt, [word])
    changed = delete_words(prompt, [word]) if to is None else _replaced(prompt, word, to)
    _check(model, changed, n_steps)
    work = _change(model, image, (prompt, changed), (word, to), n_steps, n_fixed_point_iterations)
    return Job(work, callback, _cancel)


change_word = finished(change_word_iter)


def _cancel(progress: InversionProgress) -> WordChange:
    raise Cancelled(f"Stopped after {progress.n_evals} of {progress.max_evals} U-Net evaluations.")


def _change(
    model: Diffuser,
    image: "ImageLike | Generation",
    prompts: tuple[str, str],
    words: tuple[str, str | None],
    n_steps: int,
    n_fixed_point_iterations: int,
) -> Generator[InversionProgress, None, WordChange]:
    with model.busy():
        first = model.n_unet_rows

        def progress() -> InversionProgress:
            return InversionProgress(model.n_unet_rows - first, n_steps * (n_fixed_point_iterations + 2))

        original = latents_of(model, image)
        inversion = yield from _invert(model, original, prompts[0], n_steps, n_fixed_point_iterations, progress)
        redrawn = yield from _redraw(model, inversion, prompts, progress)
        before, after = model.decode(redrawn)
        change = (redrawn[1] - redrawn[0]).double().square().sum(0).cpu().numpy()
        length = float(original.norm())
        return WordChange(
            word=words[0],
            to=words[1],
            prompt=prompts[0],
            changed_prompt=prompts[1],
            before=before,
            after=after,
            change=change,
            relative_change=float(np.sqrt(change.sum())) / length,
            reconstruction_error=float((redrawn[0] - original).norm()) / length,
            n_evals=progress().n_evals,
        )


def _invert(
    model: PromptedModel,
    latents: Tensor,
    prompt: str,
    n_steps: int,
    n_fixed_point_iterations: int,
    progress: Callable[[], ProgressT],
) -> Generator[ProgressT, None, Inversion]:
    """From latents [C, h, w] to their noise, yielding after every U-Net call."""
    conditions = model.encode_text([prompt])
    log_snrs = torch.from_numpy(model.schedule.sampler_log_snrs(n_steps))
    alphas, alphas_after = model.schedule.sampler_alphas(n_steps)
    x = latents[None]
    for step in reversed(range(n_steps)):
        r = float((alphas_after[step] / alphas[step]) ** 0.5)
        b = float((1 - alphas_after[step]) ** 0.5 - r * (1 - alphas[step]) ** 0.5)
        after = x
        for _ in range(n_fixed_point_iterations):
            x = (after - b * model.predict_noise(x, log_snrs[[step]], conditions)) / r
            yield progress()
    return Inversion(x[0], latents, prompt, n_steps)


def _redraw(
    model: PromptedModel, inversion: Inversion, prompts: Sequence[str], progress: Callable[[], ProgressT]
) -> Generator[ProgressT, None, Tensor]:
    """From noise to latents [N, C, h, w], yielding after every U-Net call."""
    n_steps = inversion.num_inference_steps
    conditions = model.encode_text(prompts)
    log_snrs = torch.from_numpy(model.schedule.sampler_log_snrs(n_steps))
    alphas, alphas_after = model.schedule.sampler_alphas(n_steps)
    x = inversion.noise.repeat(len(prompts), 1, 1, 1)
    for step in range(n_steps):
        eps = model.predict_noise(x, log_snrs[[step]].repeat(len(prompts)), conditions)
        _, x = ddim_step(x, eps, float(alphas[step]), float(alphas_after[step]))
        yield progress()
    return x


def _no_progress() -> None:
    pass


def _check(
    model: PromptedModel, prompt: str, n_steps: int | None, n_fixed_point_iterations: int = N_FIXED_POINT_ITERATIONS
) -> int:
    """The number of steps, after a check of it and of the other arguments."""
    if prompt:
        check_text(model, prompt)
    if n_fixed_point_iterations < 1:
        raise ValueError(f"Inverting a step takes at least one fixed-point iteration, not {n_fixed_point_iterations}.")
    n_steps = default_steps(model) if n_steps is None else n_steps
    model.schedule.sampler_timesteps(n_steps)
    return n_steps


def _replaced(prompt: str, word: str, to: str) -> str:
    """The prompt with a word replaced, if the replacement is a different word."""
    to = to.strip()
    if not plain(to):
        raise PromptError(f"{to!r} is no word to put in the place of {word!r}; leave `to` out to delete it.")
    if plain(to) == word:
        raise PromptError(f"{word!r} would stay what it is; give another word.")
    return replace_word(prompt, word, to)
