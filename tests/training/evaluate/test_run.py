import argparse
import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from core.diffusion.diffuser import Diffuser
from training.common import sources
from training.common.report import Table
from training.evaluate import run
from training.evaluate.common.judges import MIN_AREA, ImageReading, measure
from training.evaluate.common.proportions import Proportion, proportion
from training.evaluate.common.scenes import held_out_scenes
from training.evaluate.common.store import CODE, cached, fingerprint
from training.evaluate.layout.evaluation import LayoutSettings
from training.evaluate.picturebook import (
    QUESTIONS,
    QUICK,
    PicturebookSettings,
    Question,
    kinds_of,
    outcomes,
    swapped,
)
from training.picturebook.world.captions import RELATIONS, Caption
from training.picturebook.world.scenes import Scene, caption_of, paint
from training.picturebook.world.world import BACKGROUNDS, LABELS, OBJECT_INDEX, OBJECTS
from training.pipeline.card import N_SAMPLES, read_curve, write_card
from training.pipeline.run import RECIPE, read_config

SIDE = 128
GRASS = LABELS.index("grass")


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return held_out_scenes(150)


def truth(scene: Scene) -> ImageReading:
    """What a perfect judge sees."""
    return ImageReading(*measure(torch.from_numpy(paint(scene).labels).long()), scene.story.style)


def reading(**boxes: tuple[int, int, int]) -> ImageReading:
    """What a judge sees in squares (x, y, side) on grass."""
    labels = torch.full((SIDE, SIDE), GRASS)
    for object_name, (x, y, side) in boxes.items():
        labels[y : y + side, x : x + side] = OBJECT_INDEX[object_name]
    return ImageReading(*measure(labels), "plain")


def test_the_interval_of_a_proportion_is_wilsons() -> None:
    # By hand for 8 of 10: centre (0.8 + z^2 / 20) / (1 + z^2 / 10), half-width from the same score equation.
    low, high = Proportion(8, 10).interval
    for limit in (low, high):
        assert abs(0.8 - limit) == pytest.approx(1.959964 * math.sqrt(limit * (1 - limit) / 10))
    assert Proportion(10, 10).interval[1] == pytest.approx(1)
    assert Proportion(0, 10).interval[0] == pytest.approx(0)
    assert proportion([True, False, True]) == (2, 3)
    assert str(Proportion(0, 0)) == "none"


def test_a_reading_by_hand() -> None:
    seen = reading(cat=(16, 32, 20))
    assert seen.areas[OBJECT_INDEX["cat"]] == 400
    assert seen.find("cat") == (25.5, 41.5)
    assert seen.background == "grass"
    assert seen.find("dog") is None
    assert reading(cat=(0, 0, math.isqrt(MIN_AREA - 1))).find("cat") is None


def test_a_homonym_is_either_of_its_objects() -> None:
    assert reading(bat=(0, 0, 30)).find("bat") is not None
    assert reading(club=(64, 0, 30)).find("bat") == (78.5, 14.5)


def test_a_relation_holds_one_way_only() -> None:
    seen = reading(cat=(0, 40, 30), dog=(80, 50, 30))
    held = [relation for relation in RELATIONS if seen.relation_holds(relation, "cat", "dog")]
    assert held == ["left"]
    assert not any(seen.relation_holds(relation, "cat", "pig") for relation in RELATIONS)
    assert reading(sun=(50, 0, 30), boat=(40, 80, 40)).relation_holds("above", "sun", "boat")


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda question: question.name)
def test_a_perfect_judge_confirms_the_scene_and_not_another(question: Question, scenes: list[Scene]) -> None:
    captions = [caption_of(scene) for scene in scenes]
    readings = [truth(scene) for scene in scenes]
    right = outcomes(question, captions, readings)
    assert len(right) > 5
    assert np.mean(right) == 1
    shifted = outcomes(question, captions, readings[1:] + readings[:1])
    assert np.mean(shifted) < 0.5


def test_swapping_a_caption_makes_its_relation_wrong(scenes: list[Scene]) -> None:
    related = [scene for scene in scenes if scene.story.relation is not None]
    question = next(question for question in QUESTIONS if question.name == "relation correct")
    captions = [swapped(caption_of(scene)) for scene in related]
    assert all(caption.text != caption_of(scene).text for caption, scene in zip(captions, related, strict=True))
    assert not any(outcomes(question, captions, [truth(scene) for scene in related]))


def test_every_slot_of_a_caption_is_of_a_kind(scenes: list[Scene]) -> None:
    for scene in scenes[:40]:
        caption: Caption = caption_of(scene)
        kinds = kinds_of(caption)
        assert set(kinds) <= set(caption.text.replace(",", " ").split())
        assert list(kinds.values()).count("object") == len(scene.story.nouns)
    plain = replace(caption_of(scenes[0]), style_named=False, background_word=None)
    assert {"background", "style"}.isdisjoint(kinds_of(plain).values())
    assert len(LABELS) == len(OBJECTS) + len(BACKGROUNDS)


def test_a_result_is_cached_until_what_it_depends_on_changes(tmp_path: Path) -> None:
    weights = tmp_path / "model"
    weights.mkdir()
    save_file({"w": torch.zeros(2)}, weights / "a.safetensors")
    key = fingerprint([weights], QUICK)
    assert key == fingerprint([weights], QUICK)
    assert key != fingerprint([weights], PicturebookSettings())
    assert key != fingerprint([weights], LayoutSettings())
    save_file({"w": torch.ones(2)}, weights / "a.safetensors")
    changed = fingerprint([weights], QUICK)
    assert changed != key
    (weights / "concepts.parquet").write_bytes(b"labels")
    assert changed != fingerprint([weights], QUICK)
    made: list[int] = []

    def make() -> Table:
        made.append(0)
        return Table("t", "T", [{"a": 1.0, "b": None}], ("note",), {"x": [1]})

    first, second = (cached(tmp_path / "store" / f"t-{key}.json", make) for _ in range(2))
    assert len(made) == 1
    assert first.markdown() == second.markdown()


def test_a_cached_result_depends_on_all_code_but_the_pages(tmp_path: Path) -> None:
    package, page = tmp_path / "core", tmp_path / "core" / "ui"
    page.mkdir(parents=True)
    for folder in (package, package / "sae", page):
        folder.mkdir(exist_ok=True)
        (folder / "a.py").write_text("x = 1")

    def digest() -> str:
        return sources.source_digest([package], exclude=[page])

    first = digest()
    (page / "a.py").write_text("x = 2")
    assert digest() == first
    (package / "sae" / "a.py").write_text("x = 2")
    second = digest()
    assert second != first
    (package / "sae" / "a.py").rename(package / "sae" / "b.py")
    assert digest() != second
    assert CODE[0] == sources.CORE
    assert {"layout/evaluation.py", "common/masks.py"} <= {
        p.relative_to(CODE[1]).as_posix() for p in CODE[1].rglob("*.py")
    }
    assert (CODE[2] / "captions.py").exists()


def test_the_command_stores_its_tables_and_rewrites_the_readme(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = Table("grid", "Layout on the grid", [{"method": "concepts", "IoU": "0.50 (0.40 to 0.60)"}], ["A note."])
    monkeypatch.setattr(run, "HERE", tmp_path)
    monkeypatch.setattr("core.load_model", lambda *_, **__: SimpleNamespace(device="cpu"))
    monkeypatch.setattr(run, "evaluate", lambda evaluation, *_: [table] if evaluation.name == "layout" else [])
    monkeypatch.setattr("sys.argv", ["python", "evaluate", "layout", "--store"])
    parser = argparse.ArgumentParser()
    run.add_arguments(parser)
    run.main(parser.parse_args(["layout", "--store", "--out", str(tmp_path / "out")]))
    content = json.loads((tmp_path / "results" / "layout" / "grid.json").read_text())
    assert content["origin"]["command"] == "python -m training evaluate layout --store"
    assert content["origin"]["copied_from"] is None
    readme = (tmp_path / "README.md").read_text()
    assert readme == run.readme()
    assert "| concepts | 0.50 (0.40 to 0.60) |" in readme
    assert "## Layout prediction" in readme
    assert "## Likelihood" not in readme
    assert "### " not in capsys.readouterr().out  # the report of the run has the table at its own level
    with pytest.raises(SystemExit, match="does not go with --quick"):
        run.main(parser.parse_args(["layout", "--store", "--quick"]))


def test_the_card_shows_tables_curve_and_grid(model: Diffuser, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "training.json").write_text(json.dumps(asdict(read_config(RECIPE))))
    (tmp_path / "denoiser").mkdir()
    lines = [{"step": 20, "loss": 1.0, "samples": 960}]
    measured = {"step": 20, "samples": 960, "relations_told_apart": 0.75}
    lines += [{**measured, "held_out_loss": loss} for loss in (0.5, 0.25)]
    (tmp_path / "denoiser" / "log.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    curve = read_curve(tmp_path)
    assert curve == [(960, 0.25, 0.75)]
    table = Table("t", "A table", [{"what": "cats", "share": 0.5}])
    with patch("training.pipeline.card.draw", lambda *_: [Image.new("RGB", (8, 8))] * N_SAMPLES):
        write_card(model, tmp_path, [table], curve, "Counted by eye.\n")
    card = (tmp_path / "model" / "README.md").read_text()
    for shown in (
        "### A table",
        "| cats | 0.5 |",
        "| 960 | 0.2500 | 75 % |",
        "Counted by eye.",
        "CC-BY-4.0",
        "![Forty",
    ):
        assert shown in card
    assert Image.open(tmp_path / "model" / "samples.webp").size == (80, 32)
    assert read_curve(tmp_path / "elsewhere") == []
