"""A folder's own sampling settings: latents are those of plain diffusers with DDIM on the same folder."""

import logging
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

import core
from core.diffusion.diffuser import Diffuser
from core.diffusion.loading import load_model
from core.diffusion.schedule import NoiseSchedule
from core.errors import ModelError
from tests.conftest import make_pipeline

PROMPT = "a cat on the grass"
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
DDIM = BETAS | {"clip_sample": False}


def pipeline_with(name: str, **settings: Any) -> StableDiffusionPipeline:
    pipeline = make_pipeline()
    pipeline.scheduler = getattr(diffusers, name)(**settings)
    return pipeline


@pytest.mark.parametrize(
    ("name", "settings", "n_steps", "guidance_scale"),
    [
        ("DDIMScheduler", DDIM | {"set_alpha_to_one": False, "steps_offset": 1}, 3, 7.5),
        ("DDIMScheduler", DDIM | {"steps_offset": 0}, 3, 7.5),
        ("DDIMScheduler", DDIM | {"timestep_spacing": "linspace"}, 4, 1.0),
        ("DDIMScheduler", DDIM | {"timestep_spacing": "trailing", "prediction_type": "v_prediction"}, 3, 7.5),
        (
            "DDIMScheduler",
            DDIM | {"timestep_spacing": "trailing", "prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
            3,
            7.5,
        ),
        ("EulerDiscreteScheduler", BETAS | {"timestep_spacing": "trailing"}, 1, 0.0),  # as SD-Turbo
        ("EulerDiscreteScheduler", BETAS | {"prediction_type": "v_prediction"}, 3, 0.5),
        ("PNDMScheduler", BETAS | {"skip_prk_steps": True, "steps_offset": 1}, 3, 7.5),
    ],
)
def test_latents_are_those_of_diffusers(
    tmp_path: Path, name: str, settings: dict[str, Any], n_steps: int, guidance_scale: float
) -> None:
    pipeline_with(name, **settings).save_pretrained(tmp_path, safe_serialization=True)
    model = load_model(tmp_path, device="cpu")
    ours = model.generate(
        PROMPT, seed=3, num_inference_steps=n_steps, guidance_scale=guidance_scale, previews=False
    ).latents
    theirs = StableDiffusionPipeline.from_pretrained(tmp_path, safety_checker=None)
    theirs.scheduler = DDIMScheduler.from_config(theirs.scheduler.config, clip_sample=False)
    theirs.set_progress_bar_config(disable=True)
    noise = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(3))
    expected = theirs(
        PROMPT, latents=noise, num_inference_steps=n_steps, guidance_scale=guidance_scale, output_type="latent"
    ).images
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("n_steps", [1, 3, 7, 50, 999])
def test_timesteps_are_those_of_diffusers(spacing: str, n_steps: int) -> None:
    theirs = DDIMScheduler(timestep_spacing=spacing, steps_offset=1)
    theirs.set_timesteps(n_steps)
    schedule = NoiseSchedule.from_scheduler(theirs.alphas_cumprod.numpy(), theirs.config)
    assert schedule.sampler_timesteps(n_steps).tolist() == theirs.timesteps.tolist()


def test_a_sampler_that_is_not_kept_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pipeline_with("EulerAncestralDiscreteScheduler", **BETAS, timestep_spacing="trailing").save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        model = load_model(tmp_path, device="cpu")
    assert "EulerAncestralDiscreteScheduler, is not used: DDIM" in caplog.text
    assert "trailing" in model.notes[0]
    assert Diffuser(make_pipeline(), core.ModelSpec("ddim", "nowhere")).notes == ()
    thresholded = pipeline_with("DDIMScheduler", **DDIM, thresholding=True)
    assert "thresholding" in Diffuser(thresholded, core.ModelSpec("ddim", "nowhere")).notes[0]


@pytest.mark.parametrize(
    ("name", "settings", "told"),
    [
        ("DDIMScheduler", {"timestep_spacing": "karras"}, "leading, trailing, linspace, not 'karras'"),
        ("DDIMScheduler", {"prediction_type": "sample"}, "predicts 'sample'"),
        ("DDIMScheduler", {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True}, "pure noise.*v_prediction"),
        ("FlowMatchEulerDiscreteScheduler", {}, "only DDPM-type models"),
    ],
)
def test_a_schedule_that_cannot_be_kept_is_refused(name: str, settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ModelError, match=told):
        Diffuser(pipeline_with(name, **settings), core.ModelSpec("odd", "nowhere"))


@pytest.mark.parametrize("scale", [0, 0.5, 1, -3])
def test_no_scale_up_to_one_is_guidance(model: Diffuser, scale: float) -> None:
    plain, scaled = (
        model.generate(PROMPT, num_inference_steps=2, guidance_scale=value, previews=False).latents
        for value in (1, scale)
    )
    assert torch.equal(plain, scaled)
    calls = model.n_unet_rows
    model.generate(PROMPT, num_inference_steps=2, guidance_scale=scale, previews=False)
    assert model.n_unet_rows - calls == 2


def test_a_scale_that_is_no_number_is_refused(model: Diffuser) -> None:
    with pytest.raises(ValueError, match=r"guidance scale is a number such as 7\.5, not nan"):
        model.generate(PROMPT, guidance_scale=float("nan"))


def test_one_thing_is_taken_where_several_are_meant(model: Diffuser, model_folder: Path) -> None:
    block = "mid_block.attentions.0"
    assert load_model(model_folder, hookpoints=block).hookpoints == (block,)
    (one,) = model.sample(PROMPT, seeds=5, num_inference_steps=1)
    (listed,) = model.sample([PROMPT], seeds=[5], num_inference_steps=1)
    assert torch.equal(one.x, listed.x)
    assert model.text_embeddings("a cat").shape[0] == 1
    for seeds in ([None], [2**64], [-1], ["7"]):
        with pytest.raises(ValueError, match="A seed is a whole number"):
            model.sample([PROMPT], seeds=seeds)
    with pytest.raises(ValueError, match="A seed is a whole number"):
        model.generate(PROMPT, seed=7.5)


def test_embeddings_are_those_of_diffusers(model: Diffuser, model_folder: Path) -> None:
    theirs = StableDiffusionPipeline.from_pretrained(model_folder, safety_checker=None)
    wanted = theirs.encode_prompt(PROMPT, "cpu", 1, False)[0]
    assert float((model.encode_text(PROMPT) - wanted).abs().max()) < 1e-5
