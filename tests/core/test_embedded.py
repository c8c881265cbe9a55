"""The committed picturebook: its form, its size, and that it draws what it is asked for."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from transformers import ResNetForImageClassification, SegformerForSemanticSegmentation

import core
from core.diffuser import Diffuser
from training.picturebook.autoencoder import psnr, reconstruct, to_pixels
from training.picturebook.judges import make_scenes, mean_iou, overlap, segment_logits
from training.picturebook.run import PACKAGE, RECIPE, read_config
from training.picturebook.world import LABELS, PLACES, STYLES


@pytest.fixture(scope="module")
def model() -> Diffuser:
    return core.load_model("picturebook")


@pytest.fixture(scope="module")
def segmenter() -> SegformerForSemanticSegmentation:
    return SegformerForSemanticSegmentation.from_pretrained(PACKAGE / "segmenter").eval()


@pytest.fixture(scope="module")
def style_classifier() -> ResNetForImageClassification:
    return ResNetForImageClassification.from_pretrained(PACKAGE / "style_classifier").eval()


def megabytes(*folders: str) -> float:
    return sum(path.stat().st_size for folder in folders for path in (PACKAGE / folder).rglob("*")) / 1e6


def test_weights_are_small_and_are_what_the_committed_recipe_makes() -> None:
    assert megabytes("model") <= 32
    assert megabytes("segmenter", "style_classifier") <= 8
    made_with = json.loads((PACKAGE / "training.json").read_text())
    assert made_with == json.loads(json.dumps(dataclasses.asdict(read_config(RECIPE))))
    assert not [path for path in PACKAGE.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl")]


def test_plain_diffusers_loads_it_and_draws_with_it(model: Diffuser) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained("core/picturebook/model")
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    image = pipeline("a whale in the sea", num_inference_steps=25, guidance_scale=4.0, generator=generator).images[0]
    assert image.size == (128, 128)
    ours = model.generate("a whale in the sea", seed=0, num_inference_steps=25, guidance_scale=4.0, previews=False)
    difference = to_pixels(np.asarray(image)) - to_pixels(np.asarray(ours.image))
    assert difference.abs().mean() < 0.01


def test_the_autoencoder_keeps_held_out_scenes(model: Diffuser) -> None:
    pixels = make_scenes(0, 16, "test")["pixels"]
    assert psnr(pixels, reconstruct(model._vae, pixels)) > 25


def test_the_judges_know_held_out_scenes(
    segmenter: SegformerForSemanticSegmentation, style_classifier: ResNetForImageClassification
) -> None:
    batch = make_scenes(1, 64, "test")
    with torch.no_grad():
        seen = segment_logits(segmenter, batch["pixels"], 128).argmax(1)
        styles = style_classifier(batch["pixels"]).logits.argmax(-1)
    assert mean_iou(overlap(seen, batch["labels"])) > 0.2  # one of 38 labels everywhere: 0.003
    assert (styles == batch["styles"]).double().mean() > 0.9


def test_places_and_styles_come_out_right(
    model: Diffuser,
    segmenter: SegformerForSemanticSegmentation,
    style_classifier: ResNetForImageClassification,
) -> None:
    places = styles = 0
    for index, place in enumerate(PLACES):
        style = STYLES[1 + index % (len(STYLES) - 1)]
        prompt = f"a {style} picture of a cat {place.preposition} the {place.name}"
        image = model.generate(prompt, seed=index, previews=False).image
        pixels = to_pixels(np.asarray(image))[None]
        with torch.no_grad():
            seen = segment_logits(segmenter, pixels, 128).argmax(1).flatten()
            styles += STYLES[int(style_classifier(pixels).logits.argmax())] == style
        of_places = torch.bincount(seen, minlength=len(LABELS))[-len(PLACES) :]
        places += int(of_places.argmax()) == index
    # By chance one of eight places and 1.3 of eight styles would be right.
    assert places >= 6
    assert styles >= 6


def test_the_embedded_folder_has_nothing_else() -> None:
    known = {"model", "segmenter", "style_classifier", "examples", "training.json"}
    assert {path.name for path in Path(PACKAGE).iterdir()} <= known
