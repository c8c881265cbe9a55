"""From a model without concepts to a page with them, by the three lines that the page shows."""

import json
import logging
import shlex
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from core.artifacts import find_model
from core.folders import cache_folder, collections_folder
from core.sae.collection import INDEX
from core.sae.trained import find_trained
from core.segmentation.open_vocabulary import load_open_segmenter
from core.spec import ModelSpec
from core.ui.backend.dictionary import QUICK, first_lines
from core.ui.backend.jobs import generate, predict_layout
from core.ui.backend.runtime import Runtime
from core.ui.concepts.tab import concepts_html
from core.ui.layout.tab import layout_html
from core.ui.look.scene import Scene
from tests.core.segmentation.test_open_vocabulary import a_clipseg, saved
from training.__main__ import main
from training.common.report import ROOT
from training.labels import command as labels

PROMPTS = "a cat on the moon\na red house in the snow\na small whale in the sea\na photo of a tree\n"
SMALL = {
    "stream": {"batch_size": 64, "images_per_buffer": 4, "batches_per_buffer": 8, "sampler_batch_size": 4},
    "training": {
        "n_steps": 16,
        "k": 4,
        "expansion": 2,
        "n_calibration_batches": 2,
        "sync_every": 4,
        "n_warmup": 4,
        "k_aux": 8,
    },
}
"""What of the recipe is made small."""
FEW = "--images 4 --batch 4 --permutations 3 --gallery 2 --effect-images 2 --device cpu"

Command = Callable[[str], None]


@pytest.fixture
def lines(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, Command, tuple[str, str, str]]:
    """A model's folder, what runs a line, and the page's three lines for it, with a small copy of the recipe."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    # The 50 steps of a model that says nothing else are many for images that nobody looks at.
    defaults = tuple(12 if value == 50 else value for value in ModelSpec.__init__.__defaults__ or ())
    monkeypatch.setattr(ModelSpec.__init__, "__defaults__", defaults)
    model = tmp_path / "a model"
    shutil.copytree(model_folder, model)
    recipe = json.loads((ROOT / QUICK).read_text())
    (tmp_path / "prompts.txt").write_text(PROMPTS)
    for part, values in SMALL.items():
        recipe[part] |= values
    recipe["prompts"] = str(tmp_path / "prompts.txt")
    small = tmp_path / Path(QUICK).name
    small.write_text(json.dumps(recipe))
    clipseg = saved(a_clipseg(), tmp_path / "clipseg")
    monkeypatch.setattr(labels, "load_open_segmenter", partial(load_open_segmenter, clipseg=clipseg))
    train, label, page = (line.replace(QUICK, str(small)) for line in first_lines(str(model)))

    def run(line: str) -> None:
        python, _, _, *arguments = shlex.split(line)
        assert python == "python"
        monkeypatch.setattr(sys, "argv", ["training", *arguments])
        main()

    return model, run, (train, f"{label} {FEW}", page)


def opened(line: str, saes: str | None = None) -> Runtime:
    """The page's runtime, as `app.py` makes it."""
    python, app, option, name = shlex.split(line)
    assert (python, app, option) == ("python", "app.py", "--model")
    runtime = Runtime(name, device="cpu", saes=saes)
    runtime._load()
    assert runtime.error is None
    return runtime


def test_the_three_lines_end_in_a_page_with_concepts(
    lines: tuple[Path, Command, tuple[str, str, str]], caplog: pytest.LogCaptureFixture
) -> None:
    model, run, (train, label, page) = lines
    caplog.set_level(logging.INFO)
    assert opened(page).dictionary is None

    run(train)
    spec = find_model(model)
    root = collections_folder(spec) / Path(QUICK).stem
    assert (root / INDEX).is_file()
    assert not any(path.is_relative_to(root) for path in cache_folder("saes").rglob("*"))  # checkpoints are elsewhere
    caplog.clear()
    assert opened(page).dictionary is None
    assert f"{root} is skipped: its concepts have no labels yet" in caplog.text

    run(label)
    caplog.clear()
    runtime = opened(page)
    dictionary = runtime.dictionary
    assert dictionary is not None
    assert dictionary.source == str(root)
    assert [str(place) for place in dictionary.tables] == [
        f"mid_block.attentions.0 ({branch})" for branch in ("cond", "uncond")
    ]
    told = [record.message for record in caplog.records if str(root) in record.message]
    assert told == [f"concepts: those trained on this computer, in {root}; choose others with `--saes`"]
    table = next(iter(dictionary.tables.values()))
    assert table.info.made_with["segmenter"] == "clipseg"
    assert table.info.made_with["first_prompt"] == 8  # two buffers of four went into the training
    assert "photo" in table.info.effect_words
    assert {"sky", "person", "whale"} <= set(table.class_names)
    assert any(table[number].gallery for number in range(len(table)))

    # The tabs read a picture with the one block that there is.
    *_, item = generate(runtime, None, "a cat on the moon", 0, 4, 3.0)
    assert isinstance(item, Scene)
    kept = runtime.cached_trace(item.key)
    assert kept is not None
    assert [str(place) for place in kept.sites()] == [
        "mid_block.attentions.0 (uncond)",
        "mid_block.attentions.0 (cond)",
    ]
    assert "mid_block.attentions.0|cond" in concepts_html(runtime, item, kept)
    assert 'data-steps="4"' in layout_html(runtime, item, kept)
    *_, layout = predict_layout(runtime, None, "a cat on the moon", 0)
    assert layout.labels.shape == (8, 8)

    # Where another collection is asked for, this one does not stand in for it.
    assert opened(page, saes=str(model)).dictionary is None

    # Neither one that is being labelled anew, nor one of other weights.
    index = json.loads((root / INDEX).read_text())
    (root / INDEX).write_text(json.dumps({**index, "labelled": False}))
    assert find_trained(spec) == []
    (root / INDEX).write_text(json.dumps(index))
    assert find_trained(spec) == [root]
    weights = next((model / "unet").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    assert find_trained(spec) == []
