"""The committed picturebook: its form, its size, and that it draws what it is asked for."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

import core
from core.concepts.io import KINDS, file_sha256
from core.diffusion.diffuser import Diffuser
from core.sae.autoencoder import SaeId
from core.sae.collection import list_saes
from core.sae.io import CONFIG, WEIGHTS
from training.evaluate.common.judges import Judges, draw, load_judges, look
from training.evaluate.common.scenes import held_out_scenes
from training.evaluate.picturebook import (
    QUESTIONS,
    PicturebookBench,
    PicturebookSettings,
    bits,
    outcomes,
)
from training.hub.cards import MANIFEST
from training.picturebook.models.autoencoder import psnr, reconstruct, to_pixels
from training.picturebook.models.judges import make_scenes, mean_iou, overlap
from training.picturebook.world.scenes import caption_of, paint
from training.pipeline.run import JUDGES, PACKAGE, RECIPE, read_config


@pytest.fixture(scope="module")
def model() -> Diffuser:
    return core.load_model("picturebook")


@pytest.fixture(scope="module")
def judges() -> Judges:
    return load_judges(PACKAGE)


def megabytes(*folders: str) -> float:
    return sum(path.stat().st_size for folder in folders for path in (PACKAGE / folder).rglob("*")) / 1e6


def assert_agrees(stated: object, recipe: object) -> None:
    """Everything stated of the weights is in the recipe; settings that are younger than the weights are not stated."""
    if isinstance(stated, dict) and isinstance(recipe, dict):
        for key, value in stated.items():
            assert_agrees(value, recipe[key])
    else:
        assert stated == recipe


def test_weights_are_small_and_are_what_the_committed_recipe_makes() -> None:
    assert megabytes("model") <= 32
    assert megabytes(*JUDGES) <= 8
    made_with = json.loads((PACKAGE / "training.json").read_text())
    assert_agrees(made_with, json.loads(json.dumps(dataclasses.asdict(read_config(RECIPE)))))
    assert not [path for path in PACKAGE.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl")]


def test_plain_diffusers_loads_it_and_draws_with_it(model: Diffuser) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained("core/picturebook/model")
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    image = pipeline("a whale in the sea", num_inference_steps=4, guidance_scale=4.0, generator=generator).images[0]
    assert image.size == (128, 128)
    ours = model.generate("a whale in the sea", seed=0, num_inference_steps=4, guidance_scale=4.0, previews=False)
    difference = to_pixels(np.asarray(image)) - to_pixels(np.asarray(ours.image))
    assert difference.abs().mean() < 0.01


def test_the_autoencoder_keeps_held_out_scenes(model: Diffuser) -> None:
    pixels = make_scenes(0, 4, "test")["pixels"]
    assert psnr(pixels, reconstruct(model.codec._vae, pixels)) > 25


def test_the_judges_know_held_out_scenes(judges: Judges) -> None:
    paintings = [paint(scene) for scene in held_out_scenes(12)]
    images = [Image.fromarray(painting.image) for painting in paintings]
    labels = torch.from_numpy(np.stack([painting.labels for painting in paintings])).long()
    assert len(judges.segmenters) == 2
    for segmenter in judges.segmenters.values():
        assert mean_iou(overlap(segmenter.segment(images).label_map(), labels)) > 0.7  # one label everywhere: 0.003


@pytest.mark.slow
def test_held_out_captions_are_drawn_right(model: Diffuser, judges: Judges) -> None:
    captions = [caption_of(scene) for scene in held_out_scenes(48)]
    sights = look(judges, list(draw(model, [caption.text for caption in captions], range(48))))
    least = {"one object present": 0.5, "background correct": 0.9, "style correct": 0.9}
    for question in QUESTIONS:
        if question.name in least:
            for seen in sights.values():
                right = outcomes(question, captions, seen)
                assert np.mean(right) >= least[question.name], question.name


@pytest.mark.slow
def test_bits_of_words_stand_beside_their_ceiling(model: Diffuser, judges: Judges) -> None:
    table = bits(PicturebookBench(model, judges, PicturebookSettings(n_bits=2)))
    assert {"object"} <= {row["word"] for row in table.rows}
    for row in table.rows:
        direct, ceiling = (float(str(row[name]).split(" ")[0]) for name in ("direct", "ceiling"))
        assert 0 < ceiling < 10
        assert direct < 100


def test_autoencoders_come_with_it_small_and_good() -> None:
    """What the manifest says is what `evaluate sae` measured on held-out pictures of these very weights."""
    told = [json.loads(line) for line in (PACKAGE / "saes" / MANIFEST).read_text().splitlines()]
    lines = [line for line in told if line["path"] != "gallery"]
    hookpoints = core.load_model("picturebook").hookpoints
    every = [SaeId(hookpoint, branch, "all").path for hookpoint in hookpoints for branch in ("cond", "uncond")]
    assert [line["path"] for line in lines] == every
    weights = [PACKAGE / "saes" / path / WEIGHTS for path in every]
    assert sum(path.stat().st_size for path in weights) <= 10e6
    assert [file_sha256(path) for path in weights] == [line["sha256"] for line in lines]
    for line, path in zip(lines, weights, strict=True):
        assert {value.dtype for value in load_file(path).values()} == {torch.float16}
        assert line["k"] <= 0.06 * line["d_in"]  # so that a code means something
        metrics = line["metrics"]
        assert metrics["dead_share"] < 0.05
        assert metrics["n_positions"] >= 10_000
        assert metrics["explained_variance_low"] > metrics["explained_variance_of_pca"]
        if line["path"].startswith("mid_block"):
            assert metrics["explained_variance"] >= 0.75


def test_tables_and_galleries_come_with_it_and_are_small() -> None:
    saes = PACKAGE / "saes"
    files = [path for path in saes.rglob("*") if path.is_file() and path.name not in (WEIGHTS, CONFIG, MANIFEST)]
    assert sum(path.stat().st_size for path in files) <= 6e6
    for sae_id in list_saes(saes):
        table = core.load_concepts("picturebook", *sae_id)  # which refuses a table of other weights
        assert table.info.made_with["permutations"] >= 20
        assert set(table.frame["kind"]) <= set(KINDS)
        named = table.frame[table.frame["label"] != ""]
        assert len(named) > 0.25 * len(table)
        by_mask = named[named["kind"].isin(["object", "background"])]
        assert (by_mask["held_out_iou"] > by_mask["chance_iou"]).all()
        number = int(named["latent"].iloc[0])
        assert table[number].gallery[0].image.size == (128, 128)


def test_the_embedded_folder_has_nothing_else() -> None:
    known = {"model", *JUDGES, "examples", "saes", "training.json"}
    known |= {"surprisals.json", "ceilings.json", "excess.json", "words.json"}
    assert {path.name for path in Path(PACKAGE).iterdir()} <= known
