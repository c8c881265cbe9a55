import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline

import core
from core.sae.collection import list_saes
from core.spec import BUILT_IN
from training.picturebook.models.autoencoder import AutoencoderConfig, build_autoencoder, psnr, reconstruct
from training.picturebook.models.judges import make_scenes, mean_iou, overlap
from training.picturebook.world.surprisal import write_surprisals
from training.pipeline import run as command
from training.pipeline.export import standardise, strip_paths
from training.pipeline.run import RECIPE, read_config

TINY = {
    "autoencoder": {"block_out_channels": [16, 16, 16, 16]},
    "autoencoder_loop": {"n_steps": 1, "batch_size": 2, "learning_rate": 0.001},
    "n_scenes": 64,
    "n_held_out": 32,
    "n_drawn": 1,
    "denoiser": {"block_out_channels": [16, 32], "text_width": 16, "text_layers": 1, "n_heads": [1, 1]},
    "text_loop": {"n_steps": 1, "batch_size": 2, "learning_rate": 0.001},
    "denoiser_loop": {"n_steps": 1, "batch_size": 2, "learning_rate": 0.001},
    "judges": {"hidden_sizes": [8, 8, 16, 16], "decoder_size": 16, "style_sizes": [8, 8]},
    "judges_loop": {"n_steps": 1, "batch_size": 2, "learning_rate": 0.001},
    "saes": {
        "times": ["all"],
        "stream": {"batch_size": 32, "images_per_buffer": 4, "batches_per_buffer": 1, "sampler_batch_size": 4},
        "training": {"n_steps": 2, "k": 2, "expansion": 2, "k_aux": 4, "n_calibration_batches": 1},
    },
    "labels": {"images": 4, "batch": 4, "permutations": 3, "shared_steps": 1, "gallery": 2, "gallery_side": 16},
}
STAGES = ["autoencoder", "latents", "text", "denoiser", "judges", "export", "saes", "labels"]


@pytest.fixture(scope="module", autouse=True)
def little_work() -> Iterator[None]:
    """Surprisals of a few captions, since those of the package take minutes, few scenes, and images of few steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "make_scenes", lambda number, n: make_scenes(number, n // 8))
        patch.setitem(BUILT_IN, "picturebook", replace(BUILT_IN["picturebook"], num_inference_steps=5))
        patch.setattr(command, "write_surprisals", partial(write_surprisals, n_captions=2000))
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model made by the real command, too small and too briefly for anything but its form."""
    folder = tmp_path_factory.mktemp("picturebook")
    (folder / "recipe.json").write_text(json.dumps(TINY))
    command.main(options(folder))
    return folder


def options(folder: Path, *more: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    paths = ["--recipe", f"{folder}/recipe.json", "--run-dir", f"{folder}/run", "--out", f"{folder}/out"]
    return parser.parse_args([*paths, *more, "--stages", *STAGES])


def test_the_command_makes_a_folder_that_the_engine_and_plain_diffusers_load(trained: Path) -> None:
    model = core.load_model(trained / "out" / "model")
    generation = model.generate("a cat on the grass", num_inference_steps=2)
    assert generation.image.size == (128, 128)
    pipeline = StableDiffusionPipeline.from_pretrained(trained / "out" / "model")
    assert {pipeline.unet.dtype, pipeline.vae.dtype, pipeline.text_encoder.dtype} == {torch.float32}
    image = pipeline("a cat on the grass", num_inference_steps=1, height=128, width=128).images[0]
    assert image.size == (128, 128)
    assert all(path.suffix != ".bin" for path in trained.rglob("*"))
    configs = [*(trained / "out").rglob("*config.json"), *(trained / "out").rglob("model_index.json")]
    assert len(configs) >= 10
    for path in configs:  # the autoencoder was loaded from the run's folder, whose name is nobody's business
        assert str(trained) not in path.read_text()
        assert "_name_or_path" not in path.read_text()


def test_the_model_comes_with_autoencoders_and_names_of_their_latents(trained: Path) -> None:
    root = trained / "out" / "saes"
    assert len(list_saes(root)) == 8
    for sae_id in list_saes(root):
        table = core.load_concepts(root, *sae_id)
        assert len(table) == core.load_sae(root, *sae_id).cfg.d_sae
        assert table.info.made_with["images"] == 4
    command.main(options(trained))  # what is done is found, not done again
    assert len(list((trained / "run" / "saes").iterdir())) == len(list((trained / "run" / "labels").iterdir())) == 1


def test_every_word_of_the_captions_is_known_to_the_loaded_model(trained: Path) -> None:
    from training.picturebook.world.captions import vocabulary

    model = core.load_model(trained / "out" / "model")
    assert not model.unknown_words(" ".join(vocabulary()))
    assert model.unknown_words("a zeppelin") == {"zeppelin": []}


@pytest.mark.slow
def test_a_warm_start_begins_from_the_exported_weights(trained: Path, tmp_path: Path) -> None:
    recipe = {**TINY, **{f"{name}_loop": {**TINY["judges_loop"], "n_steps": 0} for name in ("autoencoder", "denoiser")}}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    (tmp_path / "out").symlink_to(trained / "out")
    arguments = options(tmp_path, "--warm-start")
    arguments.stages = ["autoencoder", "latents", "denoiser"]
    command.main(arguments)
    from safetensors.torch import load_file

    kept = load_file(tmp_path / "run" / "denoiser" / "ema.safetensors")
    exported = load_file(trained / "out" / "model" / "unet" / "diffusion_pytorch_model.safetensors")
    for name, value in exported.items():
        assert torch.equal(kept[f"unet.{name}"], value.float())


def test_a_recipe_with_an_unknown_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text('{"denoiser": {"depth": 3}}')
    with pytest.raises(ValueError, match="depth"):
        read_config(tmp_path / "recipe.json")
    assert read_config(RECIPE).denoiser_loop.n_steps > 0


def test_standardising_changes_the_latents_and_no_picture() -> None:
    torch.manual_seed(0)
    autoencoder = build_autoencoder(AutoencoderConfig(block_out_channels=(16, 16, 16, 16))).eval()
    pixels = make_scenes(0, 8)["pixels"]
    with torch.no_grad():
        before, rebuilt = autoencoder.encode(pixels).latent_dist, reconstruct(autoencoder, pixels)
        standardise(autoencoder, before.mean)
        after = autoencoder.encode(pixels).latent_dist
    torch.testing.assert_close(after.mean.mean((0, 2, 3)), torch.zeros(8), atol=1e-4, rtol=0)
    torch.testing.assert_close(after.mean.std((0, 2, 3)), torch.ones(8), atol=1e-4, rtol=0)
    torch.testing.assert_close(
        after.std / before.std,
        after.mean.std((0, 2, 3))[None, :, None, None]
        / before.mean.std((0, 2, 3))[None, :, None, None].expand_as(after.std),
        atol=1e-4,
        rtol=1e-3,
    )
    torch.testing.assert_close(reconstruct(autoencoder, pixels), rebuilt, atol=1e-4, rtol=0)


def test_exported_configurations_name_no_folder(tmp_path: Path) -> None:
    build_autoencoder(AutoencoderConfig(block_out_channels=(16, 16, 16, 16))).save_pretrained(tmp_path / "vae")
    AutoencoderKL.from_pretrained(tmp_path / "vae").save_pretrained(tmp_path / "out" / "vae")
    config = tmp_path / "out" / "vae" / "config.json"
    before = json.loads(config.read_text())
    assert str(tmp_path) in config.read_text()  # diffusers notes where it was loaded from
    strip_paths(tmp_path / "out")
    assert json.loads(config.read_text()) == {key: v for key, v in before.items() if key != "_name_or_path"}
    config.write_text(json.dumps({"nested": {"cache": "/home/me", "act_fn": "silu"}, "sizes": [1, 2]}))
    strip_paths(tmp_path / "out")
    assert json.loads(config.read_text()) == {"nested": {"act_fn": "silu"}, "sizes": [1, 2]}


def test_figures_computed_by_hand() -> None:
    assert psnr(torch.zeros(1, 3, 2, 2), torch.full((1, 3, 2, 2), 0.2)) == pytest.approx(20.0)
    seen, true = torch.tensor([[0, 0, 1, 1]]), torch.tensor([[0, 1, 1, 1]])
    assert mean_iou(overlap(seen, true)) == pytest.approx((1 / 2 + 2 / 3) / 2)
