from typing import Any

import numpy as np
import pytest
import torch

from core.diffusion.diffuser import Diffuser
from core.errors import Cancelled, PromptError, UnknownWordError, WordNotInPromptError
from core.information.counterfactual import (
    Inversion,
    InversionProgress,
    WordChange,
    change_word,
    change_word_iter,
    invert,
    redraw,
)
from tests.fakes.gaussian import GaussianWorld

PROMPT = "a cat on grass"
STEPS = 5


@pytest.fixture(scope="module")
def picture(model: Diffuser) -> torch.Tensor:
    """[1, C, h, w] what the sampler drew without guidance from the noise of seed 3."""
    return model.generate(PROMPT, seed=3, num_inference_steps=STEPS, guidance_scale=1, previews=False).latents


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_a_generated_image_is_inverted_to_its_noise_and_reconstructed(model: Diffuser, picture: torch.Tensor) -> None:
    noise = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(3))
    found = invert(model, picture, PROMPT, num_inference_steps=STEPS, n_fixed_point_iterations=15)
    assert distance(found.noise, noise[0]) < 1e-3
    assert distance(redraw(model, found, [PROMPT])[0], picture[0]) < 1e-3
    other = invert(model, picture, "a dog", num_inference_steps=STEPS, n_fixed_point_iterations=15)
    assert distance(other.noise, noise[0]) > 0.01


def test_every_iteration_makes_the_error_smaller(model: Diffuser, picture: torch.Tensor) -> None:
    errors = []
    for n_fixed_point_iterations in (1, 2, 4):
        found = invert(
            model, picture, PROMPT, num_inference_steps=STEPS, n_fixed_point_iterations=n_fixed_point_iterations
        )
        errors.append(distance(redraw(model, found, [PROMPT])[0], picture[0]))
    assert errors[1] < 0.6 * errors[0]
    assert errors[2] < 0.6 * errors[1]


def test_it_is_the_reverse_ode() -> None:
    """Of a Gaussian the flow is known: along each direction, distance from the mean over standard deviation stays."""
    world = GaussianWorld(["red", "cat"])
    x = world.draw_image(np.random.default_rng(1))
    n_steps = 500
    found = invert(world, x, "red", num_inference_steps=n_steps, n_fixed_point_iterations=3)
    known = world.known("red")
    first, last = world.schedule.sampler_alphas(n_steps)[0][0], world.schedule.sampler_alphas(n_steps)[1][-1]
    along = known.vectors.T @ (x.double().flatten().numpy() - np.sqrt(last) * known.mean)
    deviations = [np.sqrt(abar * known.values + 1 - abar) for abar in (last, first)]
    truth = np.sqrt(first) * known.mean + known.vectors @ (along * deviations[1] / deviations[0])
    assert distance(found.noise.double().flatten(), torch.from_numpy(truth)) < 0.02


def test_a_change_comes_from_the_word_alone(model: Diffuser, picture: torch.Tensor) -> None:
    rows = model.n_unet_rows
    found = change_word(model, picture, "A cat on grass", "Cat", num_inference_steps=STEPS, n_fixed_point_iterations=10)
    assert model.n_unet_rows - rows == found.n_evals == STEPS * 12
    assert (found.word, found.to, found.changed_prompt) == ("cat", None, "A on grass")
    assert found.reconstruction_error < 0.02 < found.relative_change
    assert found.change.shape == model.latent_shape[1:]
    before, after = redraw(
        model,
        invert(model, picture, "A cat on grass", num_inference_steps=STEPS, n_fixed_point_iterations=10),
        ["A cat on grass", "A on grass"],
    )
    np.testing.assert_allclose(found.change, (after - before).square().sum(0), rtol=1e-3, atol=1e-6)
    assert found.relative_change == pytest.approx(distance(after, before) * float(before.norm() / picture.norm()), 1e-3)
    # Pictures are of whole levels: rounding, which depends on the batch, moves a few by one.
    shown, decoded = (np.asarray(image, dtype=int) for image in (found.before, model.decode(before[None])[0]))
    assert np.abs(shown - decoded).max() <= 1
    assert not np.array_equal(np.asarray(found.before), np.asarray(found.after))


@pytest.mark.parametrize(
    ("prompt", "word", "to", "changed"),
    [
        ("a cat, a dog and a Cat", "cat", "whale", "a whale, a dog and a whale"),
        ("a cat", "cat", "red dog", "a red dog"),
        ("Cat", "cat", None, ""),
        ("a cat and a dog", "a", None, "cat and dog"),
    ],
)
def test_prompts_are_changed_at_every_occurrence(
    model: Diffuser, picture: torch.Tensor, prompt: str, word: str, to: str | None, changed: str
) -> None:
    found = change_word(model, picture, prompt, word, to, num_inference_steps=1, n_fixed_point_iterations=1)
    assert found.changed_prompt == changed


def test_progress_is_reported_and_closing_frees_the_model(model: Diffuser, picture: torch.Tensor) -> None:
    *progress, last = change_word_iter(model, picture, PROMPT, "cat", num_inference_steps=3, n_fixed_point_iterations=2)
    assert progress == [InversionProgress(n, 12) for n in (1, 2, 3, 4, 5, 6, 8, 10, 12)]
    assert isinstance(last, WordChange)
    job = change_word_iter(model, picture, PROMPT, "cat", num_inference_steps=3)
    next(job)
    assert model._lock.is_held
    calls = model.n_unet_calls
    job.close()
    assert not model._lock.is_held
    assert model.n_unet_calls == calls
    with pytest.raises(Cancelled, match="Stopped after 2 of 18"):
        change_word(
            model, picture, PROMPT, "cat", num_inference_steps=3, callback=lambda progress: progress.n_evals < 2
        )


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((PROMPT, "dog"), {}, WordNotInPromptError, "'dog' is not in the prompt"),
        ((PROMPT, "cat", "zebra"), {}, UnknownWordError, "zebra"),
        ((PROMPT, "cat", " CAT"), {}, PromptError, "stay what it is"),
        ((PROMPT, "cat", " "), {}, PromptError, "no word to put"),
        (("a zebra", "zebra"), {}, UnknownWordError, "zebra"),
        (("", "cat"), {}, PromptError, "no word"),
        ((PROMPT, "cat"), {"num_inference_steps": 0}, ValueError, "number of steps"),
        ((PROMPT, "cat"), {"n_fixed_point_iterations": 0}, ValueError, "at least one fixed-point"),
    ],
)
def test_wrong_arguments_fail_before_the_model_is_called(
    model: Diffuser,
    picture: torch.Tensor,
    arguments: tuple[str, ...],
    options: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        change_word_iter(model, picture, *arguments, **options)


def test_an_unknown_prompt_is_refused(model: Diffuser, picture: torch.Tensor) -> None:
    found = Inversion(picture[0], picture[0], PROMPT, 2)
    with pytest.raises(UnknownWordError):
        redraw(model, found, ["a zebra"])
    assert redraw(model, found, [""]).shape == picture.shape
