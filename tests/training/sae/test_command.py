import argparse
import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import core
from core.artifacts import MANIFEST, find_model
from core.diffusion.diffuser import Diffuser
from core.errors import ModelError
from core.sae.autoencoder import SaeId
from core.sae.collection import list_saes
from training.common.recipe import read_recipe
from training.sae.command import RECIPE, SaeRecipe, add_arguments, main

PROMPTS = "a cat on the moon\na red house in the snow\na small whale in the sea\na dog and a tree\n"


def arguments(tmp_path: Path, model_folder: Path, **changes: object) -> argparse.Namespace:
    (tmp_path / "prompts.txt").write_text(PROMPTS)
    recipe = {
        "model": str(model_folder),
        "prompts": str(tmp_path / "prompts.txt"),
        "hookpoints": ["mid_block.attentions.0"],
        "branches": ["cond"],
        "times": ["all", 1.0],
        "stream": {"batch_size": 32, "images_per_buffer": 4, "batches_per_buffer": 2, "num_inference_steps": 3},
        "training": {"n_steps": 4, "k": 2, "n_calibration_batches": 1, "sync_every": 2, "expansion": 2},
        **changes,
    }
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    options = {"recipe": tmp_path / "recipe.json", "run-dir": tmp_path / "run", "out": tmp_path / "saes"}
    return parser.parse_args([text for name, value in options.items() for text in (f"--{name}", str(value))])


def test_prompts_become_saes_that_read_the_models_updates(tmp_path: Path, model: Diffuser, model_folder: Path) -> None:
    (tmp_path / "saes").mkdir()
    (tmp_path / "saes" / MANIFEST).write_text('{"path": "of the SAEs that were here before"}')
    main(arguments(tmp_path, model_folder))
    assert not (tmp_path / "saes" / MANIFEST).exists()
    ids = [SaeId("mid_block.attentions.0", "cond", t) for t in ("all", 1.0)]
    assert list_saes(tmp_path / "saes") == ids
    sae = core.load_sae(tmp_path / "saes", *ids[1])
    assert (sae.cfg.d_in, sae.cfg.d_sae, sae.cfg.k) == (32, 64, 2)
    assert sae.metadata["n_samples"] == 4 * 32
    assert 0 < sae.metadata["training_figures"]["fvu"] < 10
    assert sae.metadata["commit"]
    stored = load_file(tmp_path / "saes" / ids[1].path / "sae_weights.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float16}
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    assert sae.decode(sae.encode(x)).shape == (5, 32)
    assert model.hookpoints  # the fixture made the folder
    index = json.loads((tmp_path / "saes" / "config.json").read_text())
    assert index["recipe"]["stream"]["batch_size"] == 32


def test_another_stream_is_another_recipe(tmp_path: Path, model_folder: Path) -> None:
    main(arguments(tmp_path, model_folder))
    stream = {"batch_size": 32, "images_per_buffer": 4, "batches_per_buffer": 2, "num_inference_steps": 3, "seed": 1}
    with pytest.raises(ValueError, match=r"another recipe: stream\.seed was 0, now 1"):
        main(arguments(tmp_path, model_folder, stream=stream))
    changed = arguments(tmp_path, model_folder)
    (tmp_path / "prompts.txt").write_text(PROMPTS + "a cake\n")
    with pytest.raises(ValueError, match="prompts_digest"):
        main(changed)


def test_a_hookpoint_that_is_not_there_is_answered_with_those_that_are(tmp_path: Path, model_folder: Path) -> None:
    with pytest.raises(ModelError, match=r"mid_block\.attentions\.0"):
        main(arguments(tmp_path, model_folder, hookpoints=["mid_block.attentoins.0"]))


def test_the_committed_recipes_are_recipes(tmp_path: Path) -> None:
    for path in sorted(RECIPE.parent.glob("*_saes.json")):
        recipe = read_recipe(SaeRecipe, path)
        assert recipe.stream.batch_size % recipe.stream.images_per_buffer == 0
    paper = read_recipe(SaeRecipe, RECIPE.parent / "sd_v1_4_saes.json")
    model = find_model(paper.model)
    assert len(model.hookpoints) * len(paper.branches) * len(paper.times) == 24
    # Every one of the middle block's 8 x 8 positions at a time, once, of 200,000 pictures.
    assert paper.stream.batches_per_buffer * paper.stream.batch_size == 64 * paper.stream.images_per_buffer
    assert 200_000 <= paper.training.n_steps * paper.stream.batch_size / 64 < 201_000
    embedded = read_recipe(SaeRecipe, RECIPE)
    unet = json.loads((Path(core.__file__).parent / "picturebook" / "model" / "unet" / "config.json").read_text())
    narrow, wide = unet["block_out_channels"]
    widths = dict(zip(core.load_model("picturebook").hookpoints, (narrow, wide, wide, wide), strict=True))
    for hookpoint, d_in in widths.items():  # so that a code means something
        assert embedded.training.k_by_hookpoint.get(hookpoint, embedded.training.k) <= 0.06 * d_in
    (tmp_path / "wrong.json").write_text(json.dumps({"training": {**asdict(embedded.training), "steps": 3}}))
    with pytest.raises(ValueError, match=r"wrong.json: training: \['steps'\] is not among"):
        read_recipe(SaeRecipe, tmp_path / "wrong.json")
    (tmp_path / "wrong.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read as a recipe"):
        read_recipe(SaeRecipe, tmp_path / "wrong.json")
