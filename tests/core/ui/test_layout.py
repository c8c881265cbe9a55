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
from core.ui.backend.dictionary import ConceptDictionary
from core.ui.backend.runtime import Runtime
from core.ui.layout.export import python_lines, to_csv, to_json
from core.ui.layout.results import LayoutReading, Readout, final_labels, named_classes, read_scene
from core.ui.layout.tab import layout_html
from core.ui.look.colours import label_colours
from core.ui.look.scene import Scene
from core.ui.look.theme import launch_options
from core.ui.look.timeline import agreement_svg
from core.ui.page import build_demo
from tests.core.ui.conftest import App, Visitor
from tests.fakes.engine import SIZE, FakeEngine, paint

CLASSES = ("cat", "bat", "club", "grass")
SITE = SaeSite("mid", "cond")
STEPS = 6
FINAL = np.full((SIZE, SIZE), 3)
FINAL[:32, :32], FINAL[48:, 48:] = 0, 2
"""A cat in the quarter on top left, a club in the corner, on the grass."""
COARSE = FINAL[8::16, 8::16]
PROMPT = "a cat and a bat on the grass"


def table() -> Any:
    """One latent per class, active nowhere else."""
    cells = np.full(4, 1000.0)
    frame = pd.DataFrame(
        [
            (i, name, "background" if name == "grass" else "object", 0.8, (), 1.0, 2.0, 0.1, 0.8, 0.5)
            for i, name in enumerate(CLASSES)
        ],
        columns=[
            "latent",
            "label",
            "kind",
            "iou",
            "runner_ups",
            "mean",
            "p99",
            "firing_rate",
            "held_out_iou",
            "style_auroc",
        ],
    )
    counts = SimpleNamespace(intersections=np.diag(cells), active=cells, cells=cells, n_cells=4000.0)
    info = SimpleNamespace(words={"club": ["bat"], "grass": ["grass", "lawn"]})
    return SimpleNamespace(counts=counts, class_names=CLASSES, frame=frame, info=info)


def code(labels: Any) -> Code:
    return Code(torch.tensor(labels).reshape(-1, 1), torch.ones(labels.size, 1))


def trace(sites: tuple[SaeSite, ...] = (SITE,)) -> CodeTrace:
    """All grass at first, then half of the cat, and finally the true layout."""
    half = np.where(COARSE == 0, 0, 3)
    half[1] = 3
    maps = [np.full((4, 4), 3), half, half, COARSE, COARSE, COARSE]
    codes = {ActivationKey(*site, step): code(labels) for site in sites for step, labels in enumerate(maps)}
    return CodeTrace(codes, {site.hookpoint: (4, 4) for site in sites}, STEPS)


def dictionary(sites: tuple[SaeSite, ...] = (SITE,)) -> ConceptDictionary:
    tables = {site: table() for site in sites}
    return ConceptDictionary("saes", {}, tables, {site: make_reader(of) for site, of in tables.items()})


class Segmenter:
    """Returns `FINAL`, and knows one class more."""

    def class_names(self) -> tuple[str, ...]:
        return ("sky", *CLASSES)

    def segment(self, images: Any) -> Segmentation:
        masks = torch.from_numpy(np.arange(5)[:, None, None] == FINAL + 1)
        return Segmentation(masks[None].expand(len(images), -1, -1, -1), torch.ones(len(images), 5))


@pytest.fixture
def scene() -> Scene:
    image = paint(PROMPT, 3)
    return Scene(image, PROMPT, 3, STEPS, 4.0, ("data:,",) * STEPS)


@pytest.fixture
def reading() -> LayoutReading:
    return read_scene(dictionary(), trace(), PROMPT, FINAL)


def ready(segmenter: Any = None, found: ConceptDictionary | None = None) -> Runtime:
    runtime = Runtime(engine=FakeEngine())
    runtime.ready.set()
    runtime._dictionary, runtime._segmenter = found or dictionary(), segmenter or Segmenter()
    return runtime


def test_words_match_classes_by_any_of_their_names() -> None:
    assert named_classes("a Bat on the lawn, two cats", table()) == [("bat", "club"), ("grass",), ("cat",)]
    assert named_classes("combat and catalogues", table()) == []


def test_an_ambiguous_word_means_what_the_image_shows(reading: LayoutReading) -> None:
    assert [CLASSES[i] for i in reading.objects] == ["cat", "club"]
    assert reading.candidate_classes == CLASSES
    assert read_scene(dictionary(), trace(), "a cat", FINAL).candidate_classes == ("cat", "grass")


def test_iou_is_counted_by_hand(reading: LayoutReading) -> None:
    limited, free = Readout(SITE, uses_prompt_classes=True), Readout(SITE, uses_prompt_classes=False)
    assert list(reading.predicted) == [limited, free]
    np.testing.assert_array_equal(reading.predicted[free].labels[-1], COARSE)
    # The cat has 4 cells, of which 2 are predicted at the second step; the club has its cell from the fourth on.
    expected = np.array([[0, 0], [0.5, 0], [0.5, 0], [1, 1], [1, 1], [1, 1]])
    np.testing.assert_allclose(reading.predicted[free].ious, expected)
    np.testing.assert_allclose(reading.predicted[free].mean, expected.mean(1))
    assert [ord(cell) - 0x41 for cell in reading.predicted[free].text[-16:]] == COARSE.flatten().tolist()


def test_prompt_classes_limit_the_prediction() -> None:
    reading = read_scene(dictionary(), trace(), "a cat", FINAL)
    labels = reading.predicted[Readout(SITE, uses_prompt_classes=True)].labels
    assert set(np.unique(labels)) <= {0, 3, -1}
    assert list(read_scene(dictionary(), trace(), "snow", FINAL).predicted) == [
        Readout(SITE, uses_prompt_classes=False)
    ]


def test_the_default_site_comes_first() -> None:
    sites = (SaeSite("down", "uncond"), SaeSite("down", "cond"), SaeSite("mid", "uncond"), SITE)
    reading = read_scene(dictionary(sites), trace(sites), PROMPT, FINAL)
    assert next(iter(reading.predicted)) == Readout(SITE, uses_prompt_classes=True)
    assert len(reading.predicted) == 8


def test_absent_objects_do_not_count(scene: Scene) -> None:
    grass = np.full_like(FINAL, 3)
    grass[:32, :32] = 0
    reading = read_scene(dictionary(), trace(), PROMPT, grass)
    (layout, *_) = reading.predicted.values()
    assert layout.present == [True, False]
    assert layout.mean[-1] == 1
    nothing = read_scene(dictionary(), trace(), PROMPT, np.full_like(FINAL, 3))
    assert np.isnan(next(iter(nothing.predicted.values())).mean).all()
    assert "NaN" not in to_json(scene, nothing, "picturebook", "saes", next(iter(nothing.predicted)))


def test_the_segmenters_classes_are_found_by_name(scene: Scene) -> None:
    np.testing.assert_array_equal(final_labels(Segmenter(), scene.image, CLASSES), FINAL)
    assert set(np.unique(final_labels(Segmenter(), scene.image, CLASSES[:3]))) == {-1, 0, 2}


def test_the_panel_shows_the_prediction(scene: Scene) -> None:
    panel = layout_html(ready(), scene, trace())
    match = re.search(r'data-layout="([^"]*)"', panel)
    assert match
    data = json.loads(unescape(match[1]))
    assert data["objects"] == ["cat", "club"]
    assert len(set(data["colours"])) == 4
    layout = data["readouts"]["mid|cond|prompt"]
    assert len(layout["cells"]) == STEPS * 4 * 4
    assert layout["grid"] == [4, 4]
    assert "By <b>step 4 of 6</b>" in panel
    assert "the layout of cat and club is 90% as good as it gets (IoU 1.00); at step 1 its IoU is <b>0.00</b>" in panel
    assert 'max="6"' in panel
    assert "core.predict_layout(" in panel


def test_a_model_without_a_segmenter_is_not_compared(scene: Scene) -> None:
    runtime = ready()
    runtime.name, runtime._segmenter = "other", None
    panel = layout_html(runtime, scene, trace())
    assert "No segmenter comes with this model" in panel
    assert "IoU" not in panel


@pytest.mark.parametrize("prompt", ["the grass", "a crab"])
def test_a_prompt_without_a_known_object_has_no_curve(scene: Scene, prompt: str) -> None:
    panel = layout_html(ready(), replace(scene, prompt=prompt), trace())
    assert "the prompt names no object that the concepts know" in panel
    assert "<svg" not in panel


def test_an_uploaded_image_has_neither_link_nor_lines(scene: Scene) -> None:
    upload = Scene(scene.image, PROMPT, 0, STEPS, 1.0, uploaded=True)
    panel = layout_html(ready(), upload, trace())
    assert "id-link" not in panel
    assert "predict_layout" not in panel
    assert "your picture" in panel


def test_an_empty_panel_says_why(scene: Scene) -> None:
    runtime = Runtime(engine=FakeEngine())
    assert "will appear here" in layout_html(runtime, None, None)
    runtime.ready.set()
    assert ">python -m training sae\n" in layout_html(runtime, scene, None)
    runtime.error = "no such file"
    assert "could not be loaded" in layout_html(runtime, scene, None)


def test_the_downloads_reproduce_the_result(reading: LayoutReading, scene: Scene) -> None:
    rows = list(csv.DictReader(io.StringIO(to_csv(reading))))
    assert len(rows) == 2 * STEPS
    assert rows[1] | {"stage": ""} == {
        "hookpoint": "mid",
        "branch": "cond",
        "uses_prompt_classes": "True",
        "step_from_0": "1",
        "t": rows[1]["t"],
        "stage": "",
        "mean_iou": "0.25",
        "cat": "0.5",
        "club": "0.0",
    }
    readout = Readout(SITE, uses_prompt_classes=True)
    document = json.loads(to_json(scene, reading, "picturebook", "saes", readout))
    assert document["settings"]["prompt"] == PROMPT
    assert np.shape(document["labels"]["by_step"]) == (STEPS, 4, 4)
    lines = python_lines(scene, reading, "picturebook", "saes", readout)
    compile(lines, "lines", "exec")
    assert 'source="saes"' in lines
    assert 'candidate_classes=["cat", "bat", "club", "grass"]' in lines
    assert "source" not in python_lines(scene, reading, "saes", "saes", Readout(SITE, uses_prompt_classes=False))


def test_the_chart_shows_one_curve() -> None:
    svg = agreement_svg({"a": np.linspace(0, 1, STEPS), "b": np.zeros(STEPS)}, "IoU")
    assert svg.count('class="id-line"') == 2
    assert 'data-choice="b" hidden' in svg
    assert svg.count('class="id-bin"') == STEPS


def test_colours_differ_and_backgrounds_are_greyish() -> None:
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


def test_a_client_predicts_a_layout(reading_app: App) -> None:
    client = Client(reading_app.url, verbose=False, ssl_verify=False)
    options: dict[str, Any] = {"prompt": "a cat", "seed": 2, "steps": 4, "guidance": 4, "step": 1}
    found = client.predict(**options, api_name="/layout")
    assert found == {"labels": [[0, 1], [-1, 1]], "classes": ["cat", "sea"], "scores": [[[0.2, 0.2]] * 2] * 2}
    for wrong, message in (
        ({"step": 4}, "whole number from 0 to 3"),
        ({"steps": "many"}, "steps must be a whole number"),
        ({"prompt": " "}, "Describe the picture"),
        ({"hookpoint": "up"}, "no concepts at “up”"),
        ({"method": "magic"}, "magic"),
    ):
        with pytest.raises(AppError, match=message):
            client.predict(**{**options, **wrong}, api_name="/layout")
    reading_app.runtime._dictionary, dictionary_ = None, reading_app.runtime._dictionary
    try:
        with pytest.raises(AppError, match="python -m training labels"):
            client.predict(**options, api_name="/layout")
    finally:
        reading_app.runtime._dictionary = dictionary_


def test_a_cached_trace_is_shown(reading_app: App) -> None:
    visitor = Visitor(reading_app)
    cat = ("a cat", 0, 5, 4)
    ticket = int(visitor.run("begin_generate", *cat)["data"][0])
    reading_app.runtime._dictionary, dictionary_ = None, reading_app.runtime._dictionary
    try:
        visitor.run("generate_image", ticket, *cat, None)  # the stand-in cannot be traced
    finally:
        reading_app.runtime._dictionary = dictionary_
    scene = Scene(paint("a cat", 0), "a cat", 0, 5, 4.0)
    reading_app.runtime.cache_trace(scene.key, trace())
    layout = visitor.run("trace", None, "")["data"][2]
    assert 'data-steps="6"' in layout
