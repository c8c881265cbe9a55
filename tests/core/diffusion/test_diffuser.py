import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler
from PIL import Image

import core
from core.diffusion.diffuser import Diffuser
from core.diffusion.hookpoints import nearest_hookpoints
from core.diffusion.loading import load_model
from core.diffusion.sampling import Generation, Preview, ddim_step
from core.diffusion.text_encoder import TEXT
from core.errors import Cancelled, ModelError, PromptError, UnknownWordError
from tests.conftest import make_pipeline

PROMPT = "a cat on the grass"


@pytest.fixture
def untouched(model: Diffuser) -> Iterator[Diffuser]:
    """The model, which has to be free again when the test is done."""
    yield model
    assert not model._lock.is_held


def test_loading_finds_the_model_and_its_blocks(model: Diffuser) -> None:
    assert model.hookpoints == ("down_blocks.0.attentions.0", "mid_block.attentions.0", "up_blocks.1.attentions.0")
    assert model.latent_shape == (8, 16, 16)
    assert model.image_size == model.spec.image_size == 128
    assert model.device.type == "cpu"
    assert model.dtype == torch.float32


def test_a_model_of_the_wrong_kind_is_refused() -> None:
    pipeline = make_pipeline(prediction_type="sample")
    spec = core.ModelSpec("odd", "nowhere")
    with pytest.raises(ModelError, match="'sample'; only 'epsilon' and 'v_prediction'"):
        Diffuser(pipeline, spec)
    with pytest.raises(ModelError, match="should draw 512 pixels, its weights 128"):
        Diffuser(make_pipeline(), core.ModelSpec("odd", "nowhere", image_size=512))


def test_a_seed_gives_the_same_image_to_the_bit(untouched: Diffuser, model_folder: Path) -> None:
    first = untouched.generate(PROMPT, seed=3, num_inference_steps=4)
    untouched.encode_text(["a whale", "a dog", "the sea"])
    again = untouched.generate(PROMPT, seed=3, num_inference_steps=4)
    other = load_model(model_folder)
    other.encode_text(["", "a moon", PROMPT])  # what was encoded before, and with what, must not matter
    elsewhere = other.generate(PROMPT, seed=3, num_inference_steps=4, previews=False)
    assert torch.equal(first.latents, again.latents)
    assert torch.equal(first.latents, elsewhere.latents)
    assert first.image.tobytes() == again.image.tobytes() == elsewhere.image.tobytes()
    assert not torch.equal(first.latents, untouched.generate(PROMPT, seed=4, num_inference_steps=4).latents)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_plain_diffusers_generates_the_same_image(prediction_type: str) -> None:
    pipeline = make_pipeline(prediction_type=prediction_type)
    pipeline.set_progress_bar_config(disable=True)
    model = Diffuser(pipeline, core.ModelSpec("small", "nowhere"))
    ours = model.generate(PROMPT, seed=5, num_inference_steps=6, guidance_scale=3.0)
    noise = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(5))
    theirs = pipeline(PROMPT, latents=noise, num_inference_steps=6, guidance_scale=3.0).images[0]
    difference = np.abs(np.asarray(ours.image).astype(int) - np.asarray(theirs).astype(int))
    assert difference.max() <= 1


def test_the_sampler_is_ddim_whatever_the_folder_names() -> None:
    pipeline = make_pipeline()
    ddim = Diffuser(pipeline, core.ModelSpec("small", "nowhere"))
    pipeline.scheduler = PNDMScheduler.from_config(pipeline.scheduler.config)
    pndm = Diffuser(pipeline, core.ModelSpec("small", "nowhere"))
    calls = pndm.n_unet_calls
    pictures = [model.generate(PROMPT, num_inference_steps=5).latents for model in (ddim, pndm)]
    assert torch.equal(*pictures)
    assert pndm.n_unet_calls - calls == 5


def test_ddim_steps_agree_with_diffusers(model: Diffuser) -> None:
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=False, steps_offset=1,
    )  # fmt: skip
    scheduler.set_timesteps(7)
    ours = theirs = torch.randn(1, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    before, after = model.schedule.sampler_alphas(7)
    for step, timestep in enumerate(scheduler.timesteps):
        eps = torch.randn(ours.shape, generator=generator)
        out = scheduler.step(eps, timestep, theirs)
        theirs = out.prev_sample
        x0, ours = ddim_step(ours, eps, float(before[step]), float(after[step]))
        torch.testing.assert_close(x0, out.pred_original_sample, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_v_prediction_is_turned_into_noise() -> None:
    as_v = Diffuser(make_pipeline(prediction_type="v_prediction"), core.ModelSpec("v", "nowhere"))
    as_eps = Diffuser(make_pipeline(), core.ModelSpec("eps", "nowhere"))  # same weights: its output is v
    x = torch.randn(2, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    log_snr = torch.tensor([-1.0, 2.0])
    text = as_v.encode_text(["a cat", ""])
    v, eps = as_eps.predict_noise(x, log_snr, text), as_v.predict_noise(x, log_snr, text)
    abar = torch.sigmoid(log_snr)[:, None, None, None]
    torch.testing.assert_close(eps, abar.sqrt() * v + (1 - abar).sqrt() * x)


def test_noise_is_predicted_at_times_between_the_trained_ones(model: Diffuser) -> None:
    x = torch.randn(2, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    log_snrs = model.schedule.log_snrs
    a = torch.tensor([log_snrs[400], (log_snrs[400] + log_snrs[401]) / 2])
    text = model.encode_text(["a cat", "a dog"])
    with torch.no_grad():
        by_hand = model.unet(x, torch.tensor([400.0, 400.5]), encoder_hidden_states=text.tensors[TEXT]).sample
        snapped = model.unet(x, torch.tensor([400.0, 400.0]), encoder_hidden_states=text.tensors[TEXT]).sample
    torch.testing.assert_close(model.predict_noise(x, a, text), by_hand)
    assert not torch.allclose(by_hand[1], snapped[1])


def test_float32_is_float32_on_a_gpu_too(model: Diffuser) -> None:
    rounded: list[bool] = []
    hook = model.unet.register_forward_hook(lambda *_: rounded.append(torch.backends.cudnn.allow_tf32))
    before = torch.backends.cudnn.allow_tf32
    model.generate(PROMPT, num_inference_steps=1, previews=False)
    hook.remove()
    assert rounded == [False]
    assert torch.backends.cudnn.allow_tf32 is before is True


def test_every_distinct_text_is_encoded_once(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(model_folder)
    met: list[str] = []
    encode = model.text_encoder._encode_one
    monkeypatch.setattr(model.text_encoder, "_encode_one", lambda text: met.append(text) or encode(text))
    embeddings = model.text_embeddings(["a cat", "", "a cat"])
    model.encode_text(["", "a dog"])
    assert met == ["a cat", "", "a dog"]
    assert embeddings.shape == (3, 24, 32)
    assert torch.equal(embeddings[0], embeddings[2])
    with pytest.raises(PromptError, match="at most 22 words"):
        model.encode_text(["cat " * 23])


def test_images_are_encoded_and_decoded(model: Diffuser) -> None:
    image = Image.new("RGBA", (300, 200), (200, 30, 30, 128))
    latents = model.encode(image)
    assert latents.shape == (1, 8, 16, 16)
    assert torch.equal(latents, model.encode(image))  # the posterior's mean, not a sample
    out = model.decode(torch.cat([latents, latents]))
    assert [picture.size for picture in out] == [(128, 128)] * 2


def test_there_is_one_preview_per_step_and_last_the_image(untouched: Diffuser) -> None:
    items = list(untouched.generate_iter(PROMPT, num_inference_steps=5))
    previews, last = items[:-1], items[-1]
    assert isinstance(last, Generation)
    assert all(isinstance(item, Preview) for item in previews)
    assert [item.step for item in last.previews] == list(range(5))
    assert [item.stage for item in last.previews] == ["early", "early", "middle", "middle", "late"]
    assert last.previews[0].image is not None
    assert last.previews[0].image.size == last.image.size


def test_settings_are_checked_before_the_first_step(untouched: Diffuser) -> None:
    calls = untouched.n_unet_calls
    with pytest.raises(UnknownWordError, match="whale"):
        untouched.generate_iter("a whalle")
    with pytest.raises(ValueError, match="between 1 and 999"):
        untouched.generate_iter(PROMPT, num_inference_steps=1000)
    assert untouched.n_unet_calls == calls


def test_closing_stops_within_one_call_and_frees_the_model(untouched: Diffuser) -> None:
    run = untouched.generate_iter(PROMPT, num_inference_steps=20)
    next(run)
    next(run)
    calls = untouched.n_unet_calls
    assert untouched._lock.is_held
    run.close()
    assert not untouched._lock.is_held
    assert untouched.generate(PROMPT, num_inference_steps=2).image is not None
    assert untouched.n_unet_calls == calls + 2


def test_a_callback_can_cancel_and_a_broken_one_frees_the_model(untouched: Diffuser) -> None:
    calls = untouched.n_unet_calls
    with pytest.raises(Cancelled, match="after step 2 of 9"):
        untouched.generate(PROMPT, num_inference_steps=9, callback=lambda preview: preview.step < 1)
    assert untouched.n_unet_calls == calls + 2

    def fail(_: Preview) -> None:
        raise RuntimeError("the page is gone")

    with pytest.raises(RuntimeError, match="the page is gone"):
        untouched.generate(PROMPT, num_inference_steps=9, callback=fail)


def test_jobs_wait_for_each_other_and_may_move_between_threads(untouched: Diffuser) -> None:
    first = untouched.generate_iter(PROMPT, num_inference_steps=9)
    next(first)
    calls = untouched.n_unet_calls
    finished: list[Generation] = []
    second = threading.Thread(target=lambda: finished.append(untouched.generate(PROMPT, num_inference_steps=2)))
    second.start()
    time.sleep(0.1)
    assert untouched.n_unet_calls == calls  # the second job has not begun
    closer = threading.Thread(target=first.close)  # another thread than the one that took the lock
    closer.start()
    closer.join(10)
    second.join(10)
    assert len(finished) == 1
    assert untouched.n_unet_calls == calls + 2


def test_guidance_of_one_needs_no_empty_prompt(untouched: Diffuser) -> None:
    rows = untouched.n_unet_rows
    untouched.generate(PROMPT, num_inference_steps=3, guidance_scale=1.0, previews=False)
    assert untouched.n_unet_rows - rows == 3


def test_hookpoints_are_found_nearest_the_bottleneck(model: Diffuser) -> None:
    assert nearest_hookpoints(model.unet) == model.hookpoints
    modules = dict(model.unet.named_modules())
    assert all(name in modules for name in model.hookpoints)
    assert all(a != b for a, b in pairwise(model.hookpoints))


def test_a_batch_is_sampled_as_each_of_its_prompts_is_alone(model: Diffuser) -> None:
    prompts, seeds = ["a cat on the grass", "a ship in the sea"], [3, 4]
    *_, last = model.sample(prompts, seeds=seeds, num_inference_steps=3)
    assert last.step_context[:2] == (2, 3)
    assert last.step_context.branches == ("uncond", "cond")
    for prompt, seed, x in zip(prompts, seeds, last.x, strict=True):
        alone = model.generate(prompt, seed=seed, num_inference_steps=3, previews=False)
        torch.testing.assert_close(x[None].cpu(), alone.latents, atol=1e-4, rtol=1e-4)


def test_sampling_ends_at_the_requested_step_and_has_a_step_context_only_meanwhile(model: Diffuser) -> None:
    seen: list[object] = []
    hook = model.unet.register_forward_hook(lambda *_: seen.append(model.step_context))
    before = model.n_unet_calls
    states = list(model.sample([""], seeds=[0], num_inference_steps=5, guidance_scale=1.0, last_step=1))
    hook.remove()
    assert [state.step_context for state in states] == seen
    assert [state.step_context.t for state in states] == [1.0, 0.75]
    assert {state.step_context.branches for state in states} == {("cond",)}
    assert model.n_unet_calls - before == 2
    assert model.step_context is None


def test_sampling_goes_on_from_a_state_as_if_it_had_never_stopped(model: Diffuser) -> None:
    asked: dict[str, Any] = {"prompts": ["a cat", "a ship"], "seeds": [3, 4], "num_inference_steps": 4}
    whole = list(model.sample(**asked))
    before = model.n_unet_calls
    rest = list(model.sample(**asked, after=whole[1]))
    assert [state.step_context for state in rest] == [state.step_context for state in whole[2:]]
    assert model.n_unet_calls - before == 2
    assert torch.equal(rest[-1].x, whole[-1].x)
    for wrong in (
        asked | {"num_inference_steps": 5},
        asked | {"last_step": 1},
        asked | {"prompts": ["a"], "seeds": [3]},
    ):
        with pytest.raises(ValueError, match="cannot go on after step 1 of 4 with 2"):
            model.sample(**wrong, after=whole[1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"seeds": [0, 1]}, "one seed each"), ({"seeds": [0], "last_step": 50}, "between 0 and 49")],
)
def test_a_batch_that_cannot_be_sampled_says_why(model: Diffuser, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.sample(["a cat"], **settings)
