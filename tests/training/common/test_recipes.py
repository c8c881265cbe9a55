"""The committed recipes: they can be read, and are what they say."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from core.spec import BUILT_IN
from core.ui.backend.dictionary import QUICK, QUICK_MINUTES, QUICK_PICTURES, first_lines, no_concepts_html
from training.benchmark.full_size import components
from training.common.recipe import read_recipe
from training.common.report import ROOT
from training.labels.command import STYLES
from training.labels.labeller import LabelConfig
from training.picturebook.models.autoencoder import CropSource
from training.picturebook.models.painting import WORDINGS
from training.pipeline.recipe import RECIPE, PicturebookConfig
from training.sae.command import SaeRecipe

FOLDER = ROOT / "training" / "recipes"
README = (FOLDER / "README.md").read_text()
POSITIONS = dict(zip(BUILT_IN["sd-v1-4"].hookpoints, (256, 64, 256), strict=True))
QUICK_RECIPE = FOLDER / "sd_v1_4_quick.json"
SAES = sorted(FOLDER.glob("*saes*.json")) + sorted(FOLDER.glob("*published*.json"))


@pytest.mark.parametrize("path", [*SAES, QUICK_RECIPE], ids=lambda path: path.stem)
def test_a_recipe_is_read_and_told_of(path: Path) -> None:
    recipe = read_recipe(SaeRecipe, path)
    assert recipe.stream.batch_size % recipe.stream.images_per_buffer == 0
    assert recipe.training.n_steps % recipe.stream.batches_per_buffer == 0  # no round is made for a part of it
    assert path.name in README or f"..._{path.stem.split('_')[-1]}.json" in README


FULL = [path for path in SAES if path.stem.startswith("sd_")]


@pytest.mark.parametrize("path", FULL, ids=lambda path: path.stem)
def test_full_size_is_that_of_the_paper(path: Path) -> None:
    recipe = read_recipe(SaeRecipe, path)
    stream, training = recipe.stream, recipe.training
    assert (
        training.n_steps // stream.batches_per_buffer * stream.images_per_buffer == 200_192
    )  # the next multiple of 256
    assert (stream.batch_size, training.expansion, training.k_aux, training.aux_weight) == (4096, 4, 256, 1 / 32)
    assert set(recipe.times) >= {1.0, 0.5, 0.0}
    an_image = stream.batch_size // stream.images_per_buffer * stream.batches_per_buffer
    available = {POSITIONS[name] for name in recipe.hookpoints or POSITIONS}
    assert an_image <= min(available)
    if "published" in path.stem:
        assert available == {an_image}  # every position once
        assert training.learning_rate == 1e-4
        assert training.k == int(path.stem.rpartition("k")[2])
        assert recipe.times == (1.0, 0.5, 0.0)


def test_the_arithmetic_of_the_estimates() -> None:
    with torch.device("meta"):
        modules = components()
        x = torch.zeros(1, 4, 64, 64)
        with FlopCounterMode(display=False) as unet:
            modules["unet"](x, torch.zeros(1), encoder_hidden_states=torch.zeros(1, 77, 768))
        with FlopCounterMode(display=False) as decoder:
            modules["vae"].decode(x)  # type: ignore[operator]
    a_latent, an_image = unet.get_total_flops() / 1e12, decoder.get_total_flops() / 1e12
    assert f"latent is {a_latent:.3f} TFLOP, decoding an image {an_image:.2f}" in README
    rate = 0.4 * 989
    assert f"{1000 * a_latent / rate:.1f} ms per evaluation" in README
    evals = 200_192 * 50 * 2
    assert f"{evals / 1e6:.1f} million | {evals * a_latent / rate / 3600:.1f} |" in README
    assert f"{4 * evals / 1e6:.1f} million | {4 * evals * a_latent / rate / 3600:.0f} |" in README
    labels = (40_000 * 100 * a_latent + 40_000 * an_image) / rate / 3600
    assert f"4.0 million | {labels:.1f} |" in README
    weights = 2 * 1280 * 5120 + 1280 + 5120
    assert f"{16 * weights / 1e9:.2f} ({weights / 1e6:.1f} million" in README


def test_the_first_hour_is_what_it_is_said_to_take() -> None:
    assert ROOT / QUICK == QUICK_RECIPE
    recipe = read_recipe(SaeRecipe, QUICK_RECIPE)
    stream, training = recipe.stream, recipe.training
    assert (recipe.model, recipe.hookpoints, recipe.times) == ("sd-v1-4", ("mid_block.attentions.0",), ("all",))
    an_image = stream.batch_size // stream.images_per_buffer * stream.batches_per_buffer
    n_steps = BUILT_IN["sd-v1-4"].num_inference_steps
    assert an_image / (64 * n_steps) == pytest.approx(0.64)
    assert f"{training.n_steps:,} steps of {stream.batch_size:,} positions" in README
    assert stream.sampler_batch_size * 2 == 32  # latents of the call that was measured

    a_latent = 0.106 / 32
    assert f"{1000 * a_latent:.1f} ms per latent" in README
    assert recipe.n_images == training.n_steps // stream.batches_per_buffer * stream.images_per_buffer == 2048
    train = recipe.n_images * n_steps * 2
    config = LabelConfig()
    read = config.shared_steps * 2 * 2  # each of these steps once more with the word and once without
    effects = len(STYLES) * config.effect_images * (2 * n_steps + read)
    label = (QUICK_PICTURES + config.gallery) * n_steps * 2 + effects
    for evals, name in ((train, "train: 2,048"), (label, f"label: {QUICK_PICTURES}"), (train + label, "together")):
        row = next(line for line in README.splitlines() if line.startswith(f"| {name}"))
        assert row.endswith(f"| {evals:,} | {evals * a_latent / 60:.1f} |")
    assert round((train + label) * a_latent / 60) == QUICK_MINUTES
    assert f"{QUICK_MINUTES} minutes on an H200" in no_concepts_html("sd-v1-4")
    hours = (train + label) * a_latent / 3600
    cards = re.findall(r"^\| ([\w ,]+) \| (\d+) \| ([\d.]+) \|$", README, re.MULTILINE)
    assert len(cards) == 5
    for card, rate, said in cards:
        assert f"{hours * 989 / int(rate):.1f}" == said, card

    pool = 2 * an_image * stream.images_per_buffer * 1280 * 2 / 1e9
    assert f"activations {pool:.2f}" in README
    assert f"the measured call {4.1 * 2**30 / 1e9:.1f}, two SAEs 0.42" in README
    assert f"Training takes {4.1 * 2**30 / 1e9 + 0.42 + pool:.1f} GB" in README


def test_the_three_lines_are_everywhere_the_same() -> None:
    lines = "\n".join(first_lines("sd-v1-4"))
    for text in (README, (ROOT / "README.md").read_text()):
        assert f"```bash\n{lines}\n```" in text
    assert f">{lines}</pre>" in no_concepts_html("sd-v1-4")


def test_accelerate_reads_its_configuration_and_every_process_has_pictures() -> None:
    config_args = pytest.importorskip("accelerate.commands.config.config_args")
    config = config_args.load_config_from_file(str(FOLDER / "accelerate_nodes.yaml"))
    assert (config.num_machines, config.num_processes, config.mixed_precision) == (2, 16, "bf16")
    for path in (*SAES, QUICK_RECIPE):
        assert read_recipe(SaeRecipe, path).stream.images_per_buffer % config.num_processes == 0


def test_the_job_asks_for_what_the_command_line_knows(tmp_path: Path) -> None:
    hf = tmp_path / "hf"
    hf.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n')
    hf.chmod(0o755)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "REPOSITORY": "https://x/y.git", "BUCKET": "me/runs"}
    asked = subprocess.run([FOLDER / "hf_job.sh"], env=env, capture_output=True, text=True, check=True).stdout
    assert "--recipe training/recipes/sd_v1_4_saes.json --run-dir /kept/sd_v1_4_saes/run" in asked
    assert "hf://buckets/me/runs:/kept" in asked
    before_image = asked.partition("python:3.12")[0]
    real = shutil.which("hf")
    assert real is not None
    known = subprocess.run([real, "jobs", "run", "--help"], capture_output=True, text=True, env=None).stdout
    for option in re.findall(r"^--[a-z]+$", before_image, re.MULTILINE):
        assert f"{option} " in known or f"{option}\n" in known, option
    assert "h200" in known
    refused = subprocess.run([FOLDER / "hf_job.sh"], env={"PATH": env["PATH"]}, capture_output=True, text=True)
    assert refused.returncode


def test_the_recipe_for_a_gpu_is_that_of_its_description() -> None:
    recipe = read_recipe(PicturebookConfig, FOLDER / "picturebook_gpu.json")
    loops = [recipe.autoencoder_loop, recipe.text_loop, recipe.denoiser_loop, recipe.judges_loop]
    rows = [line for line in README.splitlines() if "batches of" in line and line.startswith("| ")]
    shown = [re.findall(r"([\d,]+) batches of ([\d,]+)", row)[0] for row in rows]
    assert shown == [(f"{loop.n_steps:,}", f"{loop.batch_size:,}") for loop in loops]
    assert f"{recipe.n_scenes:,} with {WORDINGS} texts each" in README
    assert recipe.denoiser_loop.compile
    # By the end of its training the autoencoder has seen every scene.
    assert CropSource.FIRST + recipe.autoencoder_loop.n_steps * CropSource.PER_BATCH > recipe.n_scenes
    default = read_recipe(PicturebookConfig, RECIPE)
    for name in ("autoencoder", "denoiser", "judges", "dropout"):
        assert getattr(recipe, name) == getattr(default, name)
    assert CropSource.FIRST + default.autoencoder_loop.n_steps * CropSource.PER_BATCH > default.n_scenes
