"""The sampler on a noise predictor with a closed form, and the conditions that it hands over."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from core.diffusion.loading import load_model
from core.diffusion.predictor import Conditions
from core.diffusion.sampler import DdimSampler, SamplingRun
from core.diffusion.sampling import SamplerState
from core.diffusion.schedule import NoiseSchedule
from tests.fakes.gaussian import GaussianWorld

PROMPT = "red cat"


@pytest.fixture
def world() -> GaussianWorld:
    return GaussianWorld(["red", "cat"], seed=1)


def a_run(**changes: Any) -> SamplingRun:
    settings: dict[str, Any] = {
        "prompts": (PROMPT, "cat"), "seeds": (3, 4), "num_inference_steps": 5, "guidance_scale": 1.0, "last_step": 4,
    }  # fmt: skip
    return SamplingRun(**settings | changes)


def states(world: GaussianWorld, run: SamplingRun) -> list[SamplerState]:
    return list(DdimSampler(world).run(run, world.encode_text(run.texts)))


def flow(world: GaussianWorld, text: str, noise: Tensor, n_steps: int) -> Tensor:
    """Where the probability flow of N(mean, cov) takes noise: each eigendirection is scaled by its marginal's ratio."""
    known = world.known(text)
    before, after = world.schedule.sampler_alphas(n_steps)
    first, last = before[0], after[-1]
    z = known.vectors.T @ (noise.double().flatten().numpy() - np.sqrt(first) * known.mean)
    z = z * np.sqrt((last * known.values + 1 - last) / (first * known.values + 1 - first))
    return torch.from_numpy(np.sqrt(last) * known.mean + known.vectors @ z).float().reshape(noise.shape)


def test_it_follows_the_probability_flow_of_a_closed_form_model(world: GaussianWorld) -> None:
    errors = []
    for n_steps in (50, 250):
        run = a_run(num_inference_steps=n_steps, last_step=n_steps - 1)
        last = states(world, run)[-1]
        for row, (prompt, seed) in enumerate(zip(run.prompts, run.seeds, strict=True)):
            noise = torch.randn(1, *world.latent_shape, generator=torch.Generator().manual_seed(seed))[0]
            exact = flow(world, prompt, noise, n_steps)
            errors.append(float((last.x[row] - exact).norm() / exact.norm()))
    assert max(errors[2:]) < 0.02
    assert max(errors[2:]) < min(errors[:2]) / 2  # of first order in the step


def test_guidance_is_between_the_empty_text_and_the_prompt(world: GaussianWorld) -> None:
    first = {"last_step": 0}
    uncond = states(world, a_run(prompts=("", ""), **first))[0].x0
    cond = states(world, a_run(**first))[0].x0
    guided = states(world, a_run(guidance_scale=3.0, **first))[0]
    torch.testing.assert_close(guided.x0, uncond + 3 * (cond - uncond), rtol=1e-4, atol=1e-4)
    assert guided.step_context.branches == ("uncond", "cond")
    assert a_run(guidance_scale=3.0).texts == ("", "", PROMPT, "cat")
    assert a_run().texts == (PROMPT, "cat")


def test_it_goes_on_after_a_state_as_if_it_had_not_stopped(world: GaussianWorld) -> None:
    whole = states(world, a_run())
    rest = states(world, a_run(after=whole[1]))
    assert [state.step_context.step for state in rest] == [2, 3, 4]
    assert torch.equal(rest[-1].x, whole[-1].x)


def test_a_run_is_checked_when_it_is_made(world: GaussianWorld) -> None:
    whole = states(world, a_run())
    for changes, message in [
        ({"seeds": (1,)}, "one seed each"),
        ({"last_step": 5}, "between 0 and 4, not 5"),
        ({"after": whole[4]}, "cannot go on after step 4 of 5"),
        ({"after": whole[1], "prompts": ("cat",), "seeds": (1,)}, "with 1 prompts cannot go on .* with 2"),
        ({"after": whole[1], "num_inference_steps": 6}, "of 6 steps .* step 1 of 5"),
    ]:
        with pytest.raises(ValueError, match=message):
            a_run(**changes)


def test_timesteps_are_exact_on_the_trained_grid() -> None:
    """The sampler speaks in log-SNR; images depend to the bit on the network being called at whole timesteps."""
    for schedule in (
        NoiseSchedule.stable_diffusion(),
        NoiseSchedule.from_alphas_cumprod(np.cos(np.linspace(0.01, 1.57, 1000)) ** 2),
    ):
        log_snrs = torch.from_numpy(schedule.log_snrs)
        assert (schedule.timestep_at(log_snrs.numpy()) == np.arange(1000)).all()
        through_float = [float(torch.full((1,), float(a), dtype=torch.float64)[0]) for a in schedule.log_snrs]
        assert (schedule.timestep_at(through_float) == np.arange(1000)).all()


def test_conditions_select_repeat_and_join_rows() -> None:
    text, mask = torch.arange(6.0).reshape(3, 2), torch.tensor([True, False, True])
    conditions = Conditions({"text": text, "mask": mask})
    assert len(conditions) == 3
    assert torch.equal(conditions[1:].tensors["text"], text[1:])
    for rows in ([2, 0, 2], torch.tensor([2, 0, 2])):
        assert torch.equal(conditions[rows].tensors["text"], text[[2, 0, 2]])
        assert conditions[rows].tensors["mask"].tolist() == [True, True, True]
    assert torch.equal(conditions.repeat(2).tensors["text"], torch.cat([text, text]))
    joined = Conditions.cat([conditions[:1], conditions])
    assert joined.tensors["text"][:, 0].tolist() == [0, 0, 2, 4]
    assert joined.tensors["mask"].tolist() == [True, True, False, True]


def test_a_narrow_model_generates_and_encodes_while_it_predicts_in_float32(model_folder: Path) -> None:
    model = load_model(model_folder, device="cpu", dtype="bfloat16")
    with model.in_float32():
        assert model.dtype == torch.float32
        wide = model.generate("a cat", num_inference_steps=2)
        assert wide.previews[0].image is not None
        assert model.encode(wide.image).dtype == torch.float32
    narrow = model.generate("a cat", num_inference_steps=2)
    assert model.dtype == torch.bfloat16
    assert not torch.equal(wide.latents, narrow.latents)
    torch.testing.assert_close(wide.latents, narrow.latents, atol=0.2, rtol=0.1)
