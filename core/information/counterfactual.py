"""The noise behind a picture, by the sampler run backwards, and what the picture becomes from it under other words.

Without guidance a DDIM step is a deterministic map, x' = r x + b eps(x): one step of an ordinary differential equation
(Song et al. 2021, arXiv 2010.02502). Backwards, x = (x' - b eps(x)) / r is solved by guessing again and again: from the
first guess, x' itself, comes the usual DDIM inversion, and each further one makes the error several times smaller. So
the steps are the sampler's own, and generation from the noise leads back to the picture.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from core.diffusion.diffuser import Diffuser
from core.diffusion.sampling import ddim_step
from core.diffusion.text import delete_words, replace_word, split_words
from core.errors import Cancelled, PromptError
from core.information.attribution import choose_words
from core.information.estimator import NoisePredictor
from core.information.measuring import check_text, default_steps, latents_of

if TYPE_CHECKING:
    from core.diffusion.sampling import Generation
    from core.information.measuring import ImageLike

Told = TypeVar("Told")
Result = TypeVar("Result")

N_FIXED_POINT_ITERATIONS = 4
"""U-Net evaluations for each step backwards. On `picturebook` in 25 steps, 1, 2, 3, 4 leave 7.5, 2, 1 and 0.7 % of the
latents' length as error after the way back; 100 evaluations in 100 steps of one guess leave 2 %."""


@dataclass(frozen=True, eq=False)
class Inversion:
    """A picture's noise under a prompt, and what came of it."""

    noise: Tensor
    """[C, h, w] float32, on the model's device: what the sampler would have begun with."""
    latents: Tensor
    """[C, h, w] the picture's own latents."""
    prompt: str
    """The prompt under which the sampler ran backwards; may be empty."""
    num_inference_steps: int
    """Steps backwards, and forwards again."""


@dataclass(frozen=True, eq=False)
class WordChange:
    """A picture drawn again from its own noise, with its prompt and with a word of it changed."""

    word: str
    """The word, lower case."""
    to: str | None
    """What stood in its place; None: it was left out."""
    prompt: str
    """The prompt as typed."""
    changed_prompt: str
    """The prompt with the word changed; possibly empty."""
    before: Image.Image
    """The picture as it comes back from its noise."""
    after: Image.Image
    """The picture from the same noise under the changed prompt."""
    change: NDArray[np.float64]
    """[h, w] squared difference of the two pictures' latents, summed over channels."""
    relative_change: float
    """Its root over the length of the picture's own latents."""
    reconstruction_error: float
    """Distance of the latents that came back from the picture's own, over their length: a relative change of this size
    means nothing."""
    n_evals: int
    """Latents that went through the U-Net."""


class InversionProgress(NamedTuple):
    """How far the work is, after a U-Net call."""

    n_evals: int
    """Latents that went through the U-Net so far."""
    max_evals: int
    """Those of all the work."""


def invert(
    model: NoisePredictor,
    image: "ImageLike | Generation",
    prompt: str,
    *,
    num_inference_steps: int | None = None,
    n_fixed_point_iterations: int = N_FIXED_POINT_ITERATIONS,
) -> Inversion:
    """The noise from which the sampler, without guidance, draws `image` under `prompt`.

    Args:
        model: A `Diffuser`.
        image: A PIL picture, the path of one, a `Generation`, or latents [1, C, h, w].
        prompt: What the picture shows; may be empty.
        num_inference_steps: Of the sampler; the model's own by default.
        n_fixed_point_iterations: Evaluations a step.

    Raises:
        PromptError: A prompt that the model cannot take.
        ValueError: Steps that the sampler does not have, no guess.
    """
    n_steps = _check(model, prompt, num_inference_steps, n_fixed_point_iterations)
    with model.busy():
        return _end_of(_invert(model, latents_of(model, image), prompt, n_steps, n_fixed_point_iterations, _untold))


def redraw(model: NoisePredictor, inversion: Inversion, prompts: Sequence[str]) -> Tensor:
    """[N, C, h, w] latents of the pictures that the sampler, without guidance, draws from one noise under each prompt.

    Raises:
        PromptError: A prompt that the model cannot take; the empty one it can.
    """
    for prompt in prompts:
        _check(model, prompt, inversion.num_inference_steps)
    with model.busy():
        return _end_of(_redraw(model, inversion, prompts, _untold))


def change_word(
    model: Diffuser,
    image: "ImageLike | Generation",
    prompt: str,
    word: str,
    to: str | None = None,
    *,
    num_inference_steps: int | None = None,
    n_fixed_point_iterations: int = N_FIXED_POINT_ITERATIONS,
    callback: Callable[[InversionProgress], bool | None] | None = None,
) -> WordChange:
    """What a picture would be if a word of its prompt were not there, or were another: its noise stays the same.

    Args:
        model: A `Diffuser`.
        image: A PIL picture, the path of one, a `Generation`, or latents [1, C, h, w]. Whatever guidance drew it, none
            is used here, so that the change is the prompt's own doing.
        prompt: What the picture shows.
        word: A word of the prompt; every occurrence of it is changed.
        to: What to put in its place; None leaves it out.
        num_inference_steps: Of the sampler; the model's own by default.
        n_fixed_point_iterations: Evaluations for each step backwards.
        callback: Sees the progress after every U-Net call; if it returns False, `Cancelled` is raised.

    Raises:
        PromptError: A word that the prompt does not have, or a prompt, before or after, that the model cannot take.
        ValueError: Steps that the sampler does not have, no guess.
    """
    run = change_word_iter(
        model,
        image,
        prompt,
        word,
        to,
        num_inference_steps=num_inference_steps,
        n_fixed_point_iterations=n_fixed_point_iterations,
    )
    for event in run:
        if isinstance(event, WordChange):
            return event
        if callback is not None and callback(event) is False:
            run.close()
            raise Cancelled(f"Stopped after {event.n_evals} of {event.max_evals} U-Net evaluations.")
    raise AssertionError("change_word_iter ends with a WordChange")


def change_word_iter(
    model: Diffuser,
    image: "ImageLike | Generation",
    prompt: str,
    word: str,
    to: str | None = None,
    *,
    num_inference_steps: int | None = None,
    n_fixed_point_iterations: int = N_FIXED_POINT_ITERATIONS,
) -> Generator[InversionProgress | WordChange, None, None]:
    """`change_word`, with an `InversionProgress` after every U-Net call, and last the `WordChange`.

    Words and settings are checked here, before the first `next()`. Closing the generator stops the work within one
    U-Net call and frees the model.
    """
    n_steps = _check(model, prompt, num_inference_steps, n_fixed_point_iterations)
    (word,) = choose_words(prompt, [word])
    changed = delete_words(prompt, [word]) if to is None else _swapped(prompt, word, to)
    _check(model, changed, n_steps)
    return _change(model, image, prompt, changed, word, to, n_steps, n_fixed_point_iterations)


def _change(
    model: Diffuser,
    image: "ImageLike | Generation",
    prompt: str,
    changed: str,
    word: str,
    to: str | None,
    n_steps: int,
    n_fixed_point_iterations: int,
) -> Generator[InversionProgress | WordChange, None, None]:
    with model.busy():
        first = model.n_unet_rows

        def told() -> InversionProgress:
            return InversionProgress(model.n_unet_rows - first, n_steps * (n_fixed_point_iterations + 2))

        own = latents_of(model, image)
        inversion = yield from _invert(model, own, prompt, n_steps, n_fixed_point_iterations, told)
        drawn = yield from _redraw(model, inversion, [prompt, changed], told)
        before, after = model.decode(drawn)
        change = (drawn[1] - drawn[0]).double().square().sum(0).cpu().numpy()
        length = float(own.norm())
        yield WordChange(
            word=word,
            to=to,
            prompt=prompt,
            changed_prompt=changed,
            before=before,
            after=after,
            change=change,
            relative_change=float(np.sqrt(change.sum())) / length,
            reconstruction_error=float((drawn[0] - own).norm()) / length,
            n_evals=told().n_evals,
        )


def _invert(
    model: NoisePredictor,
    latents: Tensor,
    prompt: str,
    n_steps: int,
    n_fixed_point_iterations: int,
    told: Callable[[], Told],
) -> Generator[Told, None, Inversion]:
    """From latents [C, h, w] back to their noise, yielding after every U-Net call."""
    embedding = model.encode_text([prompt])
    log_snrs = torch.from_numpy(model.schedule.sampler_log_snrs(n_steps))
    alphas, alphas_after = model.schedule.sampler_alphas(n_steps)
    x = latents[None]
    for step in reversed(range(n_steps)):
        r = float((alphas_after[step] / alphas[step]) ** 0.5)
        b = float((1 - alphas_after[step]) ** 0.5 - r * (1 - alphas[step]) ** 0.5)
        after = x
        for _ in range(n_fixed_point_iterations):
            x = (after - b * model.predict_noise(x, log_snrs[[step]], embedding)) / r
            yield told()
    return Inversion(x[0], latents, prompt, n_steps)


def _redraw(
    model: NoisePredictor, inversion: Inversion, prompts: Sequence[str], told: Callable[[], Told]
) -> Generator[Told, None, Tensor]:
    """From noise to the pictures' latents [N, C, h, w], yielding after every U-Net call."""
    n_steps = inversion.num_inference_steps
    embeddings = model.encode_text(prompts)
    log_snrs = torch.from_numpy(model.schedule.sampler_log_snrs(n_steps))
    alphas, alphas_after = model.schedule.sampler_alphas(n_steps)
    x = inversion.noise.repeat(len(prompts), 1, 1, 1)
    for step in range(n_steps):
        eps = model.predict_noise(x, log_snrs[[step]].repeat(len(prompts)), embeddings)
        _, x = ddim_step(x, eps, float(alphas[step]), float(alphas_after[step]))
        yield told()
    return x


def _untold() -> None:
    pass


def _end_of(job: Generator[None, None, Result]) -> Result:
    """What a generator returns."""
    while True:
        try:
            next(job)
        except StopIteration as end:
            result: Result = end.value
            return result


def _check(
    model: NoisePredictor, prompt: str, n_steps: int | None, n_fixed_point_iterations: int = N_FIXED_POINT_ITERATIONS
) -> int:
    """The number of steps, if it and the rest can be used."""
    if prompt:
        check_text(model, prompt)
    if n_fixed_point_iterations < 1:
        raise ValueError(f"A step backwards needs at least one guess, not {n_fixed_point_iterations}.")
    n_steps = default_steps(model) if n_steps is None else n_steps
    model.schedule.sampler_timesteps(n_steps)
    return n_steps


def _swapped(prompt: str, word: str, to: str) -> str:
    """The prompt with a word replaced, if it is replaced by words that are others."""
    to = to.strip()
    if not split_words(to):
        raise PromptError(f"{to!r} is no word to put in the place of {word!r}; leave `to` out to delete it.")
    if to.lower() == word:
        raise PromptError(f"{word!r} would stay what it is; give another word.")
    return replace_word(prompt, word, to)
