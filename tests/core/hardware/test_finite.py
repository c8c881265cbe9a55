"""Values that are no numbers: found wherever they enter, and avoided by float32 where half precision overflows."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

import core
from core.activations.hooks import ActivationKey
from core.concepts.trace import CodeTracer, SaeSite
from core.diffusion.diffuser import Diffuser
from core.diffusion.loading import load_model
from core.errors import ImageError, NotFiniteError
from core.information.measuring import relative_errors
from core.sae.autoencoder import SaeConfig, SparseAutoencoder
from tests.conftest import make_pipeline

PROMPT = "a cat on the sea"


def saved(folder: Path, change: Callable[[StableDiffusionPipeline], Any]) -> Path:
    pipeline = make_pipeline()
    with torch.no_grad():
        change(pipeline)
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


def red() -> Image.Image:
    return Image.new("RGB", (64, 64), (200, 30, 30))


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with one NaN among the weights of its U-Net."""

    def change(pipeline: StableDiffusionPipeline) -> None:
        pipeline.unet.conv_out.weight[0, 0, 0, 0] = float("nan")

    return saved(tmp_path_factory.mktemp("damaged"), change)


def test_a_damaged_weight_is_named_and_gives_no_result(damaged: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        model = load_model(damaged, device="cpu")
    assert "The U-Net has weights that are not finite, such as unet.conv_out.weight" in caplog.text
    attempts: dict[str, Callable[[], Any]] = {
        "attribute": lambda: core.attribute(model, red(), PROMPT, max_evals=600),
        "rank_captions": lambda: core.rank_captions(model, red(), [PROMPT, "a dog"], max_evals=600),
        "likelihood": lambda: core.likelihood(model, red(), PROMPT, max_evals=600),
        "decompose": lambda: core.decompose(model, red(), PROMPT, "cat", "sea", max_evals=600),
        "generate": lambda: model.generate(PROMPT, num_inference_steps=2),
        "generate without previews": lambda: model.generate(PROMPT, num_inference_steps=2, previews=False),
        "sample": lambda: list(model.sample([PROMPT], seeds=[0], num_inference_steps=2)),
    }
    for attempt in attempts.values():  # one after another: an error frees the model
        with pytest.raises(NotFiniteError, match=r"not finite .*, computed in float32\. .*download"):
            attempt()


def test_an_autoencoder_that_overflows_in_float16_computes_in_float32(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = saved(tmp_path, lambda pipeline: pipeline.vae.decoder.conv_in.weight.mul_(2e5))
    plain, narrow = load_model(folder, device="cpu"), load_model(folder, device="cpu", dtype="float16")
    latents = torch.randn(2, *plain.latent_shape, generator=torch.Generator().manual_seed(0))
    with caplog.at_level(logging.WARNING):
        images = narrow.decode(latents)
        again = narrow.decode(latents[:1])
    assert [record.getMessage() for record in caplog.records] == [
        "the autoencoder's values are not finite in float16: it computes in float32 from now on"
    ]
    expected = [np.asarray(image).astype(int) for image in plain.decode(latents)]
    for image, of in zip([*images, *again], [*expected, expected[0]], strict=True):
        assert np.abs(np.asarray(image).astype(int) - of).max() <= 2
    assert narrow.dtype == torch.float16


def test_an_encoder_that_overflows_in_float16_computes_in_float32(tmp_path: Path) -> None:
    folder = saved(tmp_path, lambda pipeline: pipeline.vae.encoder.conv_in.weight.mul_(5e5))
    plain, narrow = load_model(folder, device="cpu"), load_model(folder, device="cpu", dtype="float16")
    torch.testing.assert_close(narrow.encode(red()), plain.encode(red()), atol=5e-3, rtol=5e-2)


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose U-Net exceeds the range of float16; its norms make that good in float32."""
    return saved(tmp_path_factory.mktemp("overflowing"), lambda pipeline: pipeline.unet.conv_in.weight.mul_(3e5))


def test_a_unet_that_overflows_in_float16_draws_in_float32(overflowing: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain, narrow = load_model(overflowing, device="cpu"), load_model(overflowing, device="cpu", dtype="float16")
    expected = plain.generate(PROMPT, seed=3, num_inference_steps=2)
    for previews in (True, False):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            drawn = narrow.generate(PROMPT, seed=3, num_inference_steps=2, previews=previews)
        assert ["again in float32" in record.getMessage() for record in caplog.records] == [True]
        torch.testing.assert_close(drawn.latents, expected.latents, atol=2e-2, rtol=2e-2)
        assert len(drawn.previews) == (2 if previews else 0)
    assert narrow.dtype == torch.float16
    with pytest.raises(NotFiniteError, match=r"The U-Net .* computed in float16.*dtype=\"float32\""):
        list(narrow.sample([PROMPT], seeds=[0], num_inference_steps=2))


def test_bits_of_a_unet_that_overflows_come_from_float32(overflowing: Path) -> None:
    plain, narrow = load_model(overflowing, device="cpu"), load_model(overflowing, device="cpu", dtype="float16")
    latents = plain.encode(red())
    expected = core.attribute(plain, latents, "a cat", max_evals=300, seed=1)
    found = core.attribute(narrow, latents, "a cat", max_evals=300, seed=1)
    # What overflows counts as nothing, and the corrections in float32 tell all of it.
    assert "float32" in str(found.settings["dtype"])
    assert np.isfinite(found.bits).all()
    both = np.hypot(found.stderr, expected.stderr)
    assert (np.abs(found.bits - expected.bits) < 4 * both).all()


def test_weights_that_only_float32_can_hold_stay_in_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = saved(tmp_path, lambda pipeline: pipeline.vae.decoder.conv_in.weight.mul_(2e8))
    with caplog.at_level(logging.WARNING):
        model = load_model(folder, device="cpu", dtype="float16")
    assert "vae.decoder.conv_in.weight is not finite in float16: the autoencoder stays in float32" in caplog.text
    assert model.dtype == torch.float16
    assert np.asarray(model.decode(torch.ones(1, *model.latent_shape))[0]).max() > 0


def test_a_text_encoder_that_overflows_computes_in_float32(tmp_path: Path) -> None:
    def change(pipeline: StableDiffusionPipeline) -> None:
        weights = dict(pipeline.text_encoder.named_parameters())
        next(value for name, value in weights.items() if name.endswith("layers.0.mlp.fc2.weight")).mul_(1e6)

    folder = saved(tmp_path, change)
    plain, narrow = load_model(folder, device="cpu"), load_model(folder, device="cpu", dtype="float16")
    torch.testing.assert_close(
        narrow.text_embeddings([PROMPT]).float(), plain.text_embeddings([PROMPT]), atol=2e-2, rtol=2e-2
    )


def test_codes_of_values_that_are_no_numbers_are_an_error(model: Diffuser) -> None:
    site = SaeSite(model.hookpoints[0], "cond")
    tracer = CodeTracer(model, {site: SparseAutoencoder(SaeConfig(16, 64, 3))})
    with pytest.raises(NotFiniteError, match=model.hookpoints[0]):
        tracer.see(ActivationKey(*site, 0), torch.full((1, 16, 4, 4), float("nan")))


def test_latents_that_are_no_numbers_are_refused(model: Diffuser) -> None:
    latents = torch.zeros(1, *model.latent_shape)
    latents[0, 0, 0, 0] = float("inf")
    with pytest.raises(ImageError, match="not finite"):
        core.attribute(model, latents, PROMPT)


def test_what_is_no_number_is_never_small_enough() -> None:
    bits, stderr = np.array([1.0, np.nan, 2.0, 0.0]), np.array([0.1, 0.1, np.nan, 0.0])
    assert relative_errors(bits, stderr).tolist()[1:3] == [np.inf, np.inf]
    assert relative_errors(np.zeros(2), np.zeros(2)).tolist() == [0, 0]
