"""The Layout tab with a dictionary of four classes and hand-made codes."""

import csv
import io
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from html import unescape
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from gradio_client import Client
from gradio_client.exceptions import AppError

from core.activations.hooks import ActivationKey
from core.concepts.layout import make_reader
from core.concepts.trace import CodeTrace, SaeSite
from core.sae.autoencoder import Code
from core.segmentation.semantic import Segmentation
from core.ui.concepts.dictionary import Dictionary
from core.ui.layout.export import python_lines, to_csv, to_json
from core.ui.layout.results import Choice, Reading, final_labels, named_classes, read_scene
from core.ui.layout.tab import layout_html
from core.ui.look.colours import label_colours
from core.ui.look.scene import Scene
from core.ui.look.theme import launch_options
from core.ui.look.timeline import agreement_svg
from core.ui.page import build_demo
from core.ui.runtime import Runtime
from tests.core.ui.conftest import App, Visitor
from tests.fakes.engine import SIZE, FakeEngine, paint

CLASSES = ("cat", "bat", "club", "grass")
PLACE = SaeSite("mid", "cond")
STEPS = 6
FINAL = np.full((SIZE, SIZE), 3)
FINAL[:32, :32], FINAL[48:, 48:] = 0, 2
"""A cat in the quarter on top left, a club in the corner, on the grass."""
COARSE = FINAL[8::16, 8::16]
PROMPT = "a cat and a bat on the grass"


def table() -> Any:
    """A latent a class, which is active nowhere else."""
    cells = np.full(4, 1000.0)
    frame = pd.DataFrame(
        [(i, name, "background" if name == "grass" else "object", 0.8, (), 1.0, 2.0) for i, name in enumerate(CLASSES)],
        columns=["latent", "label", "kind", "iou", "runner_ups", "mean", "p99"],
    )
    counts = SimpleNamespace(intersections=np.diag(cells), active=cells, cells=cells, n_cells=4000.0)
    info = SimpleNamespace(words={"club": ["bat"], "grass": ["grass", "lawn"]})
    return SimpleNamespace(counts=counts, class_names=CLASSES, frame=frame, info=info)


def code(labels: Any) -> Code:
    return Code(torch.tensor(labels).reshape(-1, 1), torch.ones(labels.size, 1))


def trace(sites: tuple[SaeSite, ...] = (PLACE,)) -> CodeTrace:
    """All grass at first, then the cat at half its place, at last the truth."""
    half = np.where(COARSE == 0, 0, 3)
    half[1] = 3
    maps = [np.full((4, 4), 3), half, half, COARSE, COARSE, COARSE]
    codes = {ActivationKey(*site, step): code(labels) for site in sites for step, labels in enumerate(maps)}
    return CodeTrace(codes, {site.hookpoint: (4, 4) for site in sites}, STEPS)


def dictionary(sites: tuple[SaeSite, ...] = (PLACE,)) -> Dictionary:
    tables = {site: table() for site in sites}
    return Dictionary("saes", {}, tables, {site: make_reader(of) for site, of in tables.items()})


class Segmenter:
    """Sees `FINAL`, and has one class more."""

    def class_names(self) -> tuple[str, ...]:
        return ("sky", *CLASSES)

    def segment(self, pictures: Any) -> Segmentation:
        masks = torch.from_numpy(np.arange(5)[:, None, None] == FINAL + 1)
        return Segmentation(masks[None].expand(len(pictures), -1, -1, -1), torch.ones(len(pictures), 5))


@pytest.fixture
def scene() -> Scene:
    image = paint(PROMPT, 3)
    return Scene(image, PROMPT, 3, STEPS, 4.0, ("data:,",) * STEPS)


@pytest.fixture
def reading() -> Reading:
    return read_scene(dictionary(), trace(), PROMPT, FINAL)


def ready(segmenter: Any = None, found: Dictionary | None = None) -> Runtime:
    runtime = Runtime(engine=FakeEngine())
    runtime.ready.set()
    runtime._dictionary, runtime._segmenter = found or dictionary(), segmenter or Segmenter()
    return runtime


def test_words_mean_classes_under_any_of_their_names() -> None:
    assert named_classes("a Bat on the lawn, two cats", table()) == [("bat", "club"), ("grass",), ("cat",)]
    assert named_classes("combat and catalogues", table()) == []


def test_a_word_of_two_senses_is_what_the_picture_shows(reading: Reading) -> None:
    assert [CLASSES[i] for i in reading.things] == ["cat", "club"]
    assert reading.among == CLASSES
    assert read_scene(dictionary(), trace(), "a cat", FINAL).among == ("cat", "grass")


def test_iou_is_counted_by_hand(reading: Reading) -> None:
    told, free = Choice(PLACE, told=True), Choice(PLACE, told=False)
    assert list(reading.foretold) == [told, free]
    np.testing.assert_array_equal(reading.foretold[free].labels[-1], COARSE)
    # The cat has 4 cells, of which 2 are foretold at the second step; the club has its cell from the fourth on.
    expected = np.array([[0, 0], [0.5, 0], [0.5, 0], [1, 1], [1, 1], [1, 1]])
    np.testing.assert_allclose(reading.foretold[free].ious, expected)
    np.testing.assert_allclose(reading.foretold[free].mean, expected.mean(1))
    assert [ord(cell) - 0x41 for cell in reading.foretold[free].text[-16:]] == COARSE.flatten().tolist()


def test_who_is_told_names_nothing_else() -> None:
    reading = read_scene(dictionary(), trace(), "a cat", FINAL)
    labels = reading.foretold[Choice(PLACE, told=True)].labels
    assert set(np.unique(labels)) <= {0, 3, -1}
    assert list(read_scene(dictionary(), trace(), "snow", FINAL).foretold) == [Choice(PLACE, told=False)]


def test_the_usual_block_comes_first() -> None:
    sites = (SaeSite("down", "uncond"), SaeSite("down", "cond"), SaeSite("mid", "uncond"), PLACE)
    reading = read_scene(dictionary(sites), trace(sites), PROMPT, FINAL)
    assert next(iter(reading.foretold)) == Choice(PLACE, told=True)
    assert len(reading.foretold) == 8


def test_what_is_not_in_the_picture_counts_for_nothing(scene: Scene) -> None:
    grass = np.full_like(FINAL, 3)
    grass[:32, :32] = 0
    reading = read_scene(dictionary(), trace(), PROMPT, grass)
    (way, *_) = reading.foretold.values()
    assert way.there == [True, False]
    assert way.mean[-1] == 1
    nothing = read_scene(dictionary(), trace(), PROMPT, np.full_like(FINAL, 3))
    assert np.isnan(next(iter(nothing.foretold.values())).mean).all()
    assert "NaN" not in to_json(scene, nothing, "picturebook", "saes", next(iter(nothing.foretold)))


def test_the_segmenters_classes_are_found_by_name(scene: Scene) -> None:
    np.testing.assert_array_equal(final_labels(Segmenter(), scene.image, CLASSES), FINAL)
    assert set(np.unique(final_labels(Segmenter(), scene.image, CLASSES[:3]))) == {-1, 0, 2}


def test_the_panel_tells_what_was_foretold(scene: Scene) -> None:
    panel = layout_html(ready(), scene, trace())
    match = re.search(r'data-layout="([^"]*)"', panel)
    assert match
    data = json.loads(unescape(match[1]))
    assert data["objects"] == ["cat", "club"]
    assert len(set(data["colours"])) == 4
    way = data["ways"]["mid|cond|told"]
    assert len(way["cells"]) == STEPS * 4 * 4
    assert way["grid"] == [4, 4]
    assert "the map of cat and club agrees with the final picture by <b>0.00</b>" in panel
    assert "step 4 of 6" in panel
    assert 'max="6"' in panel
    assert "core.predict_layout(" in panel


def test_a_model_without_a_segmenter_is_not_compared(scene: Scene) -> None:
    runtime = ready()
    runtime.name, runtime._segmenter = "other", None
    panel = layout_html(runtime, scene, trace())
    assert "No segmenter comes with this model" in panel
    assert "IoU" not in panel


@pytest.mark.parametrize("prompt", ["the grass", "a crab"])
def test_a_prompt_without_a_known_thing_has_no_curve(scene: Scene, prompt: str) -> None:
    panel = layout_html(ready(), replace(scene, prompt=prompt), trace())
    assert "the prompt names no thing that it knows" in panel
    assert "<svg" not in panel


def test_a_brought_picture_has_neither_link_nor_lines(scene: Scene) -> None:
    own = Scene(scene.image, PROMPT, 0, STEPS, 1.0, own=True)
    panel = layout_html(ready(), own, trace())
    assert "id-link" not in panel
    assert "predict_layout" not in panel
    assert "your picture" in panel


def test_an_empty_panel_says_why(scene: Scene) -> None:
    runtime = Runtime(engine=FakeEngine())
    assert "will appear here" in layout_html(runtime, None, None)
    runtime.ready.set()
    assert "<pre>python -m training sae\n" in layout_html(runtime, scene, None)
    runtime.error = "no such file"
    assert "could not be loaded" in layout_html(runtime, scene, None)


def test_what_is_kept_repeats_the_result(reading: Reading, scene: Scene) -> None:
    rows = list(csv.DictReader(io.StringIO(to_csv(reading))))
    assert len(rows) == 2 * STEPS
    assert rows[1] | {"stage": ""} == {
        "hookpoint": "mid",
        "branch": "cond",
        "told": "yes",
        "step_from_0": "1",
        "t": rows[1]["t"],
        "stage": "",
        "mean_iou": "0.25",
        "cat": "0.5",
        "club": "0.0",
    }
    way = Choice(PLACE, told=True)
    document = json.loads(to_json(scene, reading, "picturebook", "saes", way))
    assert document["settings"]["prompt"] == PROMPT
    assert np.shape(document["labels"]["by_step"]) == (STEPS, 4, 4)
    lines = python_lines(scene, reading, "picturebook", "saes", way)
    compile(lines, "lines", "exec")
    assert 'source="saes"' in lines
    assert 'among=["cat", "bat", "club", "grass"]' in lines
    assert "source" not in python_lines(scene, reading, "saes", "saes", Choice(PLACE, told=False))


def test_the_curve_shows_one_way_of_reading() -> None:
    svg = agreement_svg({"a": np.linspace(0, 1, STEPS), "b": np.zeros(STEPS)}, "IoU")
    assert svg.count('class="id-line"') == 2
    assert 'data-choice="b" hidden' in svg
    assert svg.count('class="id-bin"') == STEPS


def test_colours_differ_and_places_are_quiet() -> None:
    colours = label_colours((False,) * 30 + (True,) * 8)
    assert len(set(colours)) == 38
    assert all(re.fullmatch("#[0-9a-f]{6}", colour) for colour in colours)
    spread = [max(rgb) - min(rgb) for rgb in (bytes.fromhex(colour[1:]) for colour in colours)]
    assert max(spread[30:]) < min(spread[:30])


@pytest.fixture(scope="module")
def reading_app(examples_dir: Path) -> Iterator[App]:
    """The page with concepts."""
    runtime = Runtime(engine=FakeEngine(), examples_dir=examples_dir)
    demo = build_demo(runtime)
    _, url, _ = demo.launch(prevent_thread_lock=True, quiet=True, **launch_options())
    runtime.start()
    assert runtime.ready.wait(20)
    runtime._dictionary, runtime._segmenter = dictionary(), Segmenter()
    yield App(demo, runtime, url)
    demo.close()


def test_a_layout_is_asked_for_by_a_program(reading_app: App) -> None:
    client = Client(reading_app.url, verbose=False)
    options: dict[str, Any] = {"prompt": "a cat", "seed": 2, "steps": 4, "guidance": 4, "step": 1}
    found = client.predict(**options, api_name="/layout")
    assert found == {"labels": [[0, 1], [-1, 1]], "classes": ["cat", "sea"], "scores": [[[0.2, 0.2]] * 2] * 2}
    for wrong, message in (
        ({"step": 4}, "whole number from 0 to 3"),
        ({"steps": "many"}, "steps must be a whole number"),
        ({"prompt": " "}, "Describe the picture"),
        ({"hookpoint": "up"}, "no SAE at up"),
        ({"method": "magic"}, "magic"),
    ):
        with pytest.raises(AppError, match=message):
            client.predict(**{**options, **wrong}, api_name="/layout")
    reading_app.runtime._dictionary, kept = None, reading_app.runtime._dictionary
    try:
        with pytest.raises(AppError, match="python -m training labels"):
            client.predict(**options, api_name="/layout")
    finally:
        reading_app.runtime._dictionary = kept


def test_a_picture_that_is_there_is_read(reading_app: App) -> None:
    visitor = Visitor(reading_app)
    cat = ("a cat", 0, 5, 4)
    ticket = int(visitor.run("begin_draw", *cat)["data"][0])
    reading_app.runtime._dictionary, kept = None, reading_app.runtime._dictionary
    try:
        visitor.run("draw", ticket, *cat, None)  # the stand-in has nothing to trace
    finally:
        reading_app.runtime._dictionary = kept
    scene = Scene(paint("a cat", 0), "a cat", 0, 5, 4.0)
    reading_app.runtime.keep_trace(scene.key, trace())
    layout = visitor.run("read", None, "")["data"][2]
    assert 'data-steps="6"' in layout
