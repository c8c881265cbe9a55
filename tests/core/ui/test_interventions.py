"""The Interventions tab with a small model of random weights, its SAEs and a segmenter of our own."""

import base64
import io
import json
import math
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs

import gradio as gr
import numpy as np
import pytest
import torch
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image, ImageDraw

import core
from core.diffusion.diffuser import Diffuser
from core.diffusion.images import open_image
from core.edits.metrics import OutOfRange
from core.errors import ImageError
from core.segmentation.semantic import Segmentation
from core.ui.backend.dictionary import ConceptDictionary
from core.ui.backend.jobs import EditedImages, Waiting, intervene
from core.ui.backend.runtime import Runtime
from core.ui.interventions.events import _InterventionEvents
from core.ui.interventions.export import link_query, python_lines, to_json
from core.ui.interventions.form import EditFields, hint_html, label_choices, suggestion
from core.ui.interventions.form_events import EditLink, RunTrigger
from core.ui.interventions.panel import comparison_html
from core.ui.interventions.request import (
    GRID,
    PAINTED,
    EditRequest,
    cells_mask,
    edit_of,
    mask_cells,
    paint_cells,
    parse_what,
    request_of,
    requests_of,
    to_text,
)
from core.ui.interventions.results import EditPlan, measure_edits
from core.ui.interventions.tab import why_empty_html
from core.ui.look.scene import Scene
from core.ui.look.theme import launch_options
from core.ui.page import build_demo
from tests.core.edits.test_edits import COND, MIDDLE, make_editor
from tests.core.ui.conftest import HTTP, App, Visitor

STEPS, SIZE = 5, 128
PROMPT = "a cat on the grass"
MOVE = EditRequest("move", "cat", region="top-right", stage="early", strength=4.0)
TYPED = EditFields("move", "cat", f"{MIDDLE}|cond", "top-right", "", "early", 1, 2, 4)
SENT = TYPED._replace(site=None)
"""As a page sends it before it knows the blocks."""
RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


class Segmenter:
    """Red is a cat, blue a whale."""

    def class_names(self) -> tuple[str, ...]:
        return ("whale", "cat")

    def segment(self, images: Any) -> Segmentation:
        pixels = np.stack([np.asarray(image) for image in images])
        masks = np.stack([(pixels == colour).all(-1) for colour in (BLUE, RED)], axis=1)
        return Segmentation(torch.from_numpy(masks), torch.ones(masks.shape[:2]))


def runtime_of(model: Diffuser, examples: Path | None = None) -> Runtime:
    editor = make_editor(model)
    runtime = Runtime(engine=core, examples_dir=examples)
    runtime._model, runtime._segmenter = model, Segmenter()  # type: ignore[assignment]
    runtime._dictionary = ConceptDictionary("saes", editor.saes, {site: editor.table(site) for site in editor.saes}, {})
    runtime.ready.set()
    return runtime


@pytest.fixture(scope="module")
def runtime(model: Diffuser) -> Runtime:
    return runtime_of(model)


@pytest.fixture
def scene() -> Scene:
    return Scene(picture(cat=(8, 80)), PROMPT, 3, STEPS, 4.0)


def picture(cat: tuple[int, int] | None = None, whale: tuple[int, int] | None = None) -> Image.Image:
    """Squares of 32 pixels on white."""
    image = Image.new("RGB", (SIZE, SIZE), WHITE)
    for corner, colour in ((cat, RED), (whale, BLUE)):
        if corner:
            x, y = corner
            ImageDraw.Draw(image).rectangle([x, y, x + 31, y + 31], fill=colour)
    return image


def image_of(url: str) -> Image.Image:
    """The image of a data URL."""
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB")


def event(**data: Any) -> gr.EventData:
    return SimpleNamespace(_data=data)  # type: ignore[return-value]


# --- requests as text -------------------------------------------------------------------------------------------------


def test_requests_survive_a_link(runtime: Runtime) -> None:
    cells = paint_cells(np.eye(SIZE))
    requests = (
        MOVE,
        EditRequest("global", "whale", steps=(1, 3), strength=0.5),
        EditRequest("remove", "", (3, 7), MIDDLE, "cond", region=PAINTED, cells=cells, stage="late"),
    )
    assert requests_of(to_text(requests), runtime.spec, STEPS) == requests
    assert request_of({"label": "cat"}, runtime.spec, STEPS) == EditRequest(label="cat", stage="early", strength=4.0)
    numbers = request_of({"kind": "global", "concepts": [3]}, runtime.spec, STEPS)
    assert (numbers.hookpoint, numbers.branch) == (runtime.spec.default_hookpoint, "cond")


@pytest.mark.parametrize(
    ("document", "says"),
    [
        ("cat", "An edit is an object such as"),
        ({"label": "cat", "colour": "red"}, "An edit has no field “colour”"),
        ({"label": "cat", "mask": "/etc/passwd"}, "An edit has no field “mask”"),
        ({"label": "cat", "kind": ["move"]}, "The kind of an edit must be one of move, global, remove"),
        ({}, "Say what to edit"),
        ({"label": "cat", "concepts": [1]}, "either a label or concept numbers"),
        ({"concepts": ["x"]}, "whole number"),
        ({"label": "cat", "region": "middle"}, "The region must be one of top-left"),
        ({"label": "cat", "region": {"x": 1}}, "The region must be one of top-left"),
        ({"label": "cat", "region": PAINTED}, "The region is empty"),
        ({"label": "cat", "region": PAINTED, "cells": "xyz"}, "256 hexadecimal digits"),
        ({"label": "cat", "stage": "soon"}, "The stage is one of early, middle, late"),
        ({"label": "cat", "steps": [0, 5]}, "within this picture's steps, 0 to 4"),
        ({"label": "cat", "steps": [3, 1]}, "must not end before they begin"),
        ({"label": "cat", "steps": [1]}, "two numbers"),
        ({"label": "cat", "steps": ["a", "b"]}, "within this picture's steps"),
        ({"label": "cat", "strength": math.inf}, "finite number of at least 0"),
        ({"label": "cat", "strength": math.nan}, "finite number of at least 0"),
        ({"label": "cat", "strength": -1}, "finite number of at least 0"),
        ({"label": "cat", "strength": "much"}, "finite number of at least 0"),
    ],
)
def test_an_invalid_request_is_explained(runtime: Runtime, document: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        request_of(document, runtime.spec, STEPS)


def test_one_field_takes_a_label_or_numbers() -> None:
    assert parse_what(" Big  Ben ") == ("Big Ben", ())
    assert parse_what("12, #40;7") == ("", (12, 40, 7))
    assert parse_what("12, cat") == ("12, cat", ())
    assert parse_what(None) == ("", ())


def test_a_painted_region_is_kept_in_cells() -> None:
    quarter = np.zeros((SIZE, SIZE))
    quarter[:64, 64:] = 1
    np.testing.assert_array_equal(cells_mask(paint_cells(quarter), SIZE), quarter > 0)
    spot = np.zeros((512, 512), dtype=np.uint8)
    spot[500, 3] = 9
    mask = cells_mask(paint_cells(spot), SIZE)
    assert mask.sum() == (SIZE // GRID) ** 2  # smaller than a cell, but not lost
    assert mask[500 * SIZE // 512, 3 * SIZE // 512]
    assert paint_cells(np.zeros((9, 9))) == ""
    # Where a side is no multiple of the grid, painting what is shown of a region changes nothing.
    cells = paint_cells(np.eye(SIZE))
    assert paint_cells(cells_mask(cells, 100)) == cells


def test_an_uploaded_mask_must_have_the_images_size() -> None:
    clear = Image.new("RGBA", (SIZE, SIZE), (255, 255, 255, 0))
    with pytest.raises(ValueError, match="region is empty"):
        mask_cells(clear, SIZE)
    clear.putpixel((0, 0), (0, 0, 0, 1))
    assert cells_mask(mask_cells(clear, SIZE), SIZE).sum() == 16
    with pytest.raises(ValueError, match="128 x 128, not 64 x 128"):
        mask_cells(Image.new("L", (64, 128), 255), SIZE)


def test_a_damaged_mask_is_told_in_a_sentence(tmp_path: Path) -> None:
    Image.effect_noise((SIZE, SIZE), 90).save(tmp_path / "mask.png")
    (tmp_path / "mask.png").write_bytes((tmp_path / "mask.png").read_bytes()[:3000])
    with (
        open_image(tmp_path / "mask.png") as image,
        pytest.raises(ImageError, match=r"data is damaged\. Save it again"),
    ):
        mask_cells(image, SIZE)


# --- the form ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "field", "says"),
    [
        ({"what": " "}, "what", "Say what to edit"),
        ({"what": "cot"}, "what", "No concept has the label 'cot' there. The nearest: cat"),
        ({"what": "3, 99"}, "what", "There is no concept 99"),
        ({"what": "3", "site": "attic|cond"}, "what", "no SAE"),
        ({"region": PAINTED}, "region", "The region is empty: paint over part of the picture."),
        ({"stage": "custom", "first": 4, "last": 6}, "first", "within this picture's steps, 1 to 5"),
        ({"stage": "custom", "first": 0, "last": 2}, "first", "1 to 5"),
        ({"stage": "custom", "first": "two", "last": 3}, "first", "not “two” to “3”"),
        ({"stage": "custom", "first": 1.5, "last": 3}, "first", "1 to 5"),
        ({"strength": math.inf}, "strength", "finite number"),
        ({"strength": None}, "strength", "finite number"),
    ],
)
def test_problems_are_reported_by_field(runtime: Runtime, changed: dict[str, Any], field: str, says: str) -> None:
    problems = TYPED._replace(**changed).problems(runtime, STEPS)
    assert says in (getattr(problems, field) or "")
    assert sum(problem is not None for problem in problems) == 1
    assert set(TYPED.problems(runtime, STEPS)) == {None}


def test_a_stage_without_steps_is_refused(runtime: Runtime) -> None:
    assert "With 2 steps the middle stage has none" in (TYPED._replace(stage="middle").problems(runtime, 2).stage or "")
    checked = _InterventionEvents(runtime).check_compare(replace_steps(2), (), *TYPED)
    assert "the middle stage has none" in checked[2 + EditFields._fields.index("stage")]["message"]


def replace_steps(n: int) -> Scene:
    return Scene(picture(), PROMPT, 3, n, 4.0)


def test_the_form_becomes_a_request() -> None:
    assert TYPED.request == MOVE
    custom = TYPED._replace(stage="custom", first=2.0, last=4.0, what="3, 7").request
    assert (custom.steps, custom.stage, custom.concepts, custom.hookpoint) == ((1, 3), "", (3, 7), MIDDLE)
    assert TYPED._replace(kind="global", region=PAINTED, cells="ff").request == EditRequest(
        "global", "cat", stage="early", strength=4
    )
    assert edit_of(custom, SIZE).steps == (1, 3)


def test_an_edit_is_suggested_to_start_with(runtime: Runtime, scene: Scene) -> None:
    dictionary = runtime.dictionary
    assert dictionary is not None
    assert label_choices(dictionary, scene) == ["cat", "whale"]
    assert label_choices(dictionary, replace(scene, prompt="an orca"))[0] == "whale"
    # The cat is at the left below: it goes to the right.
    assert suggestion(runtime, dictionary, scene).region == "bottom-right"
    assert suggestion(runtime, dictionary, replace(scene, image=picture())).region == "top-left"


def test_entered_values_are_kept(runtime: Runtime, scene: Scene) -> None:
    events = _InterventionEvents(runtime)
    blank = EditFields("move", None, None, "top-left", "", "early", 1, 1, 1)
    form = EditFields(*events.fill(scene, None, ("", ""), None, (), *blank)[: len(blank)])
    assert form.what.value == "cat"
    assert (form.stage, form.first, form.last) == ("early", 1, 2)
    kept = EditFields(
        *events.fill(scene, None, ("cat", "top-right"), None, (), *TYPED._replace(what="whale"))[: len(blank)]
    )
    assert "value" not in kept.what.constructor_args
    assert kept.region == gr.skip()
    elsewhere = EditFields(*events.fill(scene, None, ("cat", "left"), None, (), *TYPED)[: len(blank)])
    assert elsewhere.region == gr.skip()
    untouched = EditFields(*events.fill(scene, None, ("cat", "top-right"), None, (), *TYPED)[: len(blank)])
    assert untouched.region.value == "bottom-right"


def test_a_link_fills_the_form_and_runs_once_its_picture_is_there(runtime: Runtime, scene: Scene) -> None:
    events = _InterventionEvents(runtime)
    whole = EditRequest("global", "whale", stage="middle", strength=0.5)
    query = {name: values[0] for name, values in parse_qs(link_query(scene, (MOVE, whole), True)).items()}
    linked, status = events.restore(SimpleNamespace(query_params=query))  # type: ignore[arg-type]
    assert linked == EditLink((PROMPT, 3, STEPS, 4.0), (MOVE, whole), True)
    assert status == gr.skip()
    blank = EditFields("move", None, None, "top-left", "", "early", 1, 1, 1)
    *form, hint, requests, chips, _, remaining, run = events.fill(None, linked, ("", ""), None, (), *blank)
    assert (EditFields(*form).kind, requests, remaining, run) == ("global", (MOVE,), gr.skip(), gr.skip())
    assert "cat → top right · early · strength 4" in chips
    assert "1 concept (SAE features) of “whale”" in hint
    *_, remaining, run = events.fill(scene, linked, ("", ""), None, (), *blank)
    assert (remaining, run) == (None, RunTrigger(1, True))
    for wrong in ({"edits": "[{]"}, {"edits": '[{"label": "cat", "steps": [0, 99]}]'}, {"steps": "many"}):
        linked, status = events.restore(SimpleNamespace(query_params={**query, **wrong}))  # type: ignore[arg-type]
        assert linked is None
        assert "cannot be restored" in status
    assert events.restore(SimpleNamespace(query_params={})) == (None, gr.skip())  # type: ignore[arg-type]


def test_a_hint_names_the_selected_concepts(runtime: Runtime) -> None:
    editor = runtime.editor
    assert "3 concepts (SAE features) of “cat”: 3 (middle, with the prompt)" in hint_html(editor, "move", "cat", "")
    assert "3 (cat), 4 (unnamed)" in hint_html(editor, "move", "3, 4", f"{MIDDLE}|cond")
    wrong = hint_html(editor, "move", "c<t", "")
    assert "c&lt;t" in wrong
    assert 'data-word="cat"' in wrong


def test_a_click_selects_the_concepts_there(runtime: Runtime, scene: Scene) -> None:
    from core.concepts.trace import CodeTracer

    events, model = _InterventionEvents(runtime), runtime.model
    assert events.point(scene, "move", event(x=0.5, y=0.5, step=None)) == (gr.skip(),) * 3
    tracer = CodeTracer(model, runtime.dictionary.saes)  # type: ignore[union-attr]
    for _ in model.sample([PROMPT], seeds=[3], num_inference_steps=STEPS, contexts=[tracer.context]):
        pass
    runtime.cache_trace(scene.key, tracer.trace())
    expected = core.edits.concepts_at(tracer.trace(), 0.9, 0.1, COND, steps=[1])
    what, site, hint = events.point(scene, "move", event(x=0.9, y=0.1, step=1))
    assert (what, site) == (", ".join(str(one.number) for one in expected), f"{MIDDLE}|cond")
    assert f"{expected[0].number} (" in hint
    assert events.point(scene, "move", event(x="a", y=0.1)) == (gr.skip(),) * 3
    # In the final image, the object that lies there; on the white of this one there is none, so concepts again.
    what, site, hint = events.point(scene, "move", event(x=0.2, y=0.8, step=None))
    assert (what, site) == ("cat", gr.skip())
    assert "of “cat”" in hint
    assert events.point(scene, "move", event(x=0.9, y=0.1, step=None))[1] == f"{MIDDLE}|cond"


def test_a_drag_moves_the_object_there(runtime: Runtime, scene: Scene) -> None:
    events, n = _InterventionEvents(runtime), len(EditFields._fields)
    drag = event(x0=0.2, y0=0.8, x1=0.2 + 0.5, y1=0.8 - 0.25)
    *form, hint, requests, _, run = events.drag(scene, None, drag)
    fields = EditFields(*form)
    assert (fields.kind, fields.stage, requests, run) == ("move", "early", (), RunTrigger(1, False))
    assert (fields.region.value, fields.what.value) == (PAINTED, "cat")  # type: ignore[attr-defined, union-attr]
    assert "of “cat”" in hint
    # Its mask, moved by half the width to the right and a fourth of the height up.
    expected = np.zeros((SIZE, SIZE), dtype=bool)
    x, y = 8 + SIZE // 2, 80 - SIZE // 4
    expected[y : y + 32, x : x + 32] = True
    np.testing.assert_array_equal(cells_mask(fields.cells, SIZE), expected)
    assert events.drag(scene, run, drag)[-1] == RunTrigger(2, False)
    # What leaves the image is cut off.
    far = EditFields(*events.drag(scene, None, event(x0=0.2, y0=0.8, x1=1.0, y1=0.8))[:n])
    assert 0 < cells_mask(far.cells, SIZE).sum() < 32 * 32

    *form, note, _, _, run = events.drag(scene, None, event(x0=0.9, y0=0.1, x1=0.2, y1=0.2))
    assert all(value == gr.skip() for value in (*form, run))
    assert "no object where the drag began" in note
    for wrong in ({"x0": "a"}, {"x0": 7}, {"x0": float("nan")}):
        assert events.drag(scene, None, event(**{"y0": 0.1, "x1": 0.2, "y1": 0.2, **wrong}))[-1] == gr.skip()


def test_edits_are_added_to_a_list_and_removed(runtime: Runtime, scene: Scene) -> None:
    events = _InterventionEvents(runtime)
    requests, chips, what, _ = events.add(scene, (), *TYPED)
    assert (requests, what) == ((MOVE,), "")
    assert 'data-index="0"' in chips
    # An empty form is fine with a list of edits, but not alone.
    blank = TYPED._replace(what="")
    assert all(one["is_valid"] for one in events.check(scene, requests, *blank))
    assert not all(one["is_valid"] for one in events.check(scene, (), *blank))
    assert events._plan(False, requests, blank).requests == (MOVE,)
    assert events.drop(scene, requests, event(index=0))[0] == ()
    assert events.drop(scene, requests, event(index=7))[0] == requests
    assert "At most" in str(events.check_add(scene, (MOVE,) * 7, *TYPED))


# --- what is measured -------------------------------------------------------------------------------------------------


def test_a_move_is_measured_by_hand(runtime: Runtime, scene: Scene) -> None:
    old, new = picture(cat=(8, 80), whale=(8, 8)), picture(cat=(56, 8), whale=(8, 16))
    redrawn = EditedImages((old, new), (OutOfRange(0.5, 2.0),))
    comparison = measure_edits(scene, EditPlan((MOVE,)), redrawn, runtime.dictionary, Segmenter())  # type: ignore[arg-type]
    (result,) = comparison.results
    (change,) = result.objects
    assert change is not None
    assert change.present == (True, True)
    assert change.area == pytest.approx((1 / 16, 1 / 16))
    assert change.inside == pytest.approx((0, 24 / 32))
    assert change.centre_inside == (False, True)
    # Elsewhere, the whale has moved down by 8 pixels, and a fourth of the cat has come.
    assert result.layout == pytest.approx((24 * 32) / (40 * 32))
    elsewhere = SIZE * SIZE - 64 * 64 - 32 * 32
    changed = 2 * 8 * 32 * 2 + 8 * 32 * 2  # pixels and colours: white to blue and back, white to red
    assert result.low**2 + result.high**2 == pytest.approx(changed / (3 * elsewhere))
    assert result.high == pytest.approx(0, abs=1e-6)
    panel = comparison_html(runtime, comparison)
    assert "Done: the centre of <b>cat</b> is in the region (75 % of it lies there now, 0 % before)" in panel
    assert "<b>50 %</b> of the edited concepts’ values are outside the normal range" in panel
    assert "Rest of the layout: <b>60%</b> unchanged (IoU 0.60)" in panel


def test_lost_and_removed_objects_are_reported(runtime: Runtime, scene: Scene) -> None:
    plan = EditPlan(
        (
            MOVE,
            EditRequest("remove", "whale", stage="early"),
            EditRequest("global", "", (20, 3), MIDDLE, "cond", stage="late"),
        )
    )
    redrawn = EditedImages((picture(cat=(8, 80), whale=(60, 0)), picture()), (OutOfRange(math.nan, 0.0),))
    comparison = measure_edits(scene, plan, redrawn, runtime.dictionary, Segmenter())  # type: ignore[arg-type]
    panel = comparison_html(runtime, comparison)
    assert "Not done: <b>cat</b> was there before and is gone" in panel
    assert "Removed: <b>whale</b> went from 6.2 % to <b>0 %</b> of the picture" in panel
    assert "We cannot measure automatically whether <b>concepts 20, 3</b> worked" in panel  # two different labels
    assert "no value is outside the normal range" in panel
    document = json.loads(to_json(comparison, "picturebook", "saes"))
    assert document["results"][0]["out_of_range"] == {"share": None, "times_p99": 0}
    assert document["results"][0]["objects"][0]["inside_region"] == [0, None]
    assert document["results"][0]["objects"][2] is None


def test_another_object_that_is_gone_is_told(runtime: Runtime, scene: Scene) -> None:
    redrawn = EditedImages((picture(cat=(8, 80), whale=(60, 0)), picture(cat=(80, 8))), (OutOfRange(0.0, 0.5),))
    comparison = measure_edits(scene, EditPlan((MOVE,)), redrawn, runtime.dictionary, Segmenter())  # type: ignore[arg-type]
    assert comparison.results[0].lost == ("whale",)
    assert "<b>But the whale is gone</b>, according to the segmenter." in comparison_html(runtime, comparison)
    assert json.loads(to_json(comparison, "picturebook", "saes"))["results"][0]["objects_lost"] == ["whale"]
    # The cat, which the edit is about, is none of the others.
    redrawn = EditedImages((picture(cat=(8, 80), whale=(60, 0)), picture(whale=(60, 0))), (OutOfRange(0.0, 0.5),))
    comparison = measure_edits(scene, EditPlan((MOVE,)), redrawn, runtime.dictionary, Segmenter())  # type: ignore[arg-type]
    assert comparison.results[0].lost == ()


def test_a_model_without_a_segmenter_says_so(runtime: Runtime, scene: Scene) -> None:
    redrawn = EditedImages((picture(cat=(8, 80)), picture()), (OutOfRange(0.0, 0.5),))
    comparison = measure_edits(scene, EditPlan((MOVE,)), redrawn, runtime.dictionary, None)  # type: ignore[arg-type]
    panel = comparison_html(runtime, comparison)
    assert "Without a segmenter we cannot measure whether <b>cat</b> worked" in panel
    assert "IoU)" not in panel.split("What these figures mean")[0]
    everywhere = EditPlan((replace(MOVE, region="all"),))
    comparison = measure_edits(scene, everywhere, redrawn, runtime.dictionary, None)  # type: ignore[arg-type]
    assert "side effects cannot be separated" in comparison_html(runtime, comparison)


def test_three_stages_are_compared(runtime: Runtime, scene: Scene) -> None:
    plan = EditPlan((replace(MOVE, stage="", steps=(1, 2)),), ("early", "middle", "late"))
    assert [(stage, one.stage, one.steps) for stage, (one,) in plan.rows] == [
        (name, name, None) for name in ("early", "middle", "late")
    ]
    images = (picture(cat=(8, 80)), picture(cat=(80, 8)), picture(cat=(8, 80)), picture())
    redrawn = EditedImages(images, (OutOfRange(0.0, 0.5),) * 3)
    comparison = measure_edits(scene, plan, redrawn, runtime.dictionary, Segmenter())  # type: ignore[arg-type]
    panel = comparison_html(runtime, comparison)
    assert panel.count('class="id-iv-choose"') == 3
    assert "<td>yes</td><td>no</td><td>gone</td>" in panel
    assert "compare=stages" in panel
    # Each button carries its image for the large picture.
    shown = [image_of(url) for url in re.findall(r'class="id-iv-choose".*?data-edited="([^"]+)"', panel)]
    for image, edited in zip(shown, images[1:], strict=True):
        np.testing.assert_array_equal(np.asarray(image), np.asarray(edited))


def test_the_lines_repeat_the_edits(scene: Scene) -> None:
    cells = paint_cells(np.eye(SIZE))
    painted = EditRequest("remove", "", (3, 7), MIDDLE, "cond", region=PAINTED, cells=cells, steps=(1, 2), strength=0.5)
    lines = python_lines(scene, (MOVE, painted), "picturebook", "picturebook")
    assert 'core.SpatialEdit(label="cat", region="top-right", strength=4, stage="early")' in lines
    assert f'concepts=[3, 7], hookpoints=["{MIDDLE}"], branches=["cond"], region=painted(' in lines
    names: dict[str, Any] = {}
    exec(lines.split("model =")[0], names)
    np.testing.assert_array_equal(names["painted"](cells, SIZE) > 0, cells_mask(cells, SIZE))
    compile(lines, "lines", "exec")
    elsewhere = python_lines(scene, (MOVE,), "sd-v1-4", "me/saes", ("early", "late"))
    compile(elsewhere, "lines", "exec")
    assert "contexts=[editor.editing(edits, 5)]" in elsewhere
    assert 'for stage in ["early", "late"]' in elsewhere
    assert "stage=stage" in elsewhere


# --- the job ----------------------------------------------------------------------------------------------------------


def redrawn(runtime: Runtime, scene: Scene, *requests: EditRequest) -> EditedImages:
    edits = [[edit_of(one, SIZE) for one in requests]]
    *_, last = intervene(runtime, None, scene, edits)
    assert isinstance(last, EditedImages)
    return last


def test_strength_zero_is_bit_identical(runtime: Runtime, scene: Scene) -> None:
    plain, same = redrawn(runtime, scene, replace(MOVE, strength=0.0)).images
    assert plain.tobytes() == same.tobytes()
    alone = runtime.model.generate(PROMPT, seed=3, num_inference_steps=STEPS, guidance_scale=4.0).image
    assert np.abs(np.asarray(alone, np.int16) - np.asarray(plain, np.int16)).max() <= 1
    edit = replace(MOVE, strength=9.0)
    before, after = redrawn(runtime, scene, edit).images
    assert before.tobytes() == plain.tobytes()
    assert np.abs(np.asarray(before, np.int16) - np.asarray(after, np.int16)).max() > 2
    both = redrawn(runtime, scene, edit, EditRequest("global", "whale", stage="middle", strength=9.0)).images[1]
    assert both.tobytes() != after.tobytes()
    assert redrawn(runtime, scene, edit).images[1].tobytes() == after.tobytes()  # removed hooks leave no trace


def test_a_cancelled_job_stops_within_a_step(runtime: Runtime, scene: Scene) -> None:
    ticket = runtime.tickets.issue("somebody")
    work = intervene(runtime, ticket, scene, [[edit_of(MOVE, SIZE)]])
    next(work)
    calls = runtime.model.n_unet_calls
    runtime.tickets.cancel("somebody")
    assert list(work) == []
    assert runtime.model.n_unet_calls <= calls + 1
    assert not runtime.model._lock.is_held
    assert sum(len(module._forward_hooks) for module in runtime.model.unet.modules()) == 0


def test_a_job_waits_for_the_model(scene: Scene) -> None:
    runtime = Runtime(engine=core)
    work = intervene(runtime, None, scene, [[]])
    assert isinstance(next(work), Waiting)
    assert "The large picture will change" in why_empty_html(runtime)
    runtime.ready.set()
    assert "python -m training labels" in why_empty_html(runtime)
    with pytest.raises(RuntimeError, match="python -m training labels"):
        list(work)
    runtime.error = "gone"
    assert "could not be loaded" in why_empty_html(runtime)


# --- the page ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def editing_app(model: Diffuser, examples_dir: Path) -> Iterator[App]:
    runtime = runtime_of(model, examples_dir)
    demo = build_demo(runtime)
    _, url, _ = demo.launch(prevent_thread_lock=True, quiet=True, **launch_options())
    yield App(demo, runtime, url)
    demo.close()


def generated(visitor: Visitor, *data: Any) -> None:
    ticket = int(visitor.run("begin_generate", *data)["data"][0])
    visitor.run("generate_image", ticket, *data, None)


def test_an_image_is_edited_and_then_its_words_are_measured(editing_app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(_: Runtime, ticket: int, scene: Scene, *settings: Any) -> Iterator[tuple[str, str]]:
        assert (ticket, scene.prompt, settings) == (number, PROMPT, ("rest", 0.2))
        yield "the words", "measured"

    monkeypatch.setattr("core.ui.interventions.events.measure_updates", measured)
    visitor = Visitor(editing_app)
    generated(visitor, PROMPT, 3, STEPS, 4)
    assert visitor.join("accept", None, None, *SENT).status_code == 200
    list(visitor.results())
    number, compare, status, _ = visitor.run("begin_show", None)["data"]
    assert "Waiting" in status
    visitor.join("run", number, compare, None, "rest", 0.2, None, None, *SENT)
    messages = list(visitor.results())
    text = " ".join(json.dumps(data) for message, data in messages if message == "process_generating")
    assert "Redrawing: step 1 of 5" in text
    panel = next(
        data["data"][0]
        for message, data in messages
        if message in ("process_generating", "process_completed") and "data-query" in str(data["data"][0])
    )
    assert "cat → top right · early · strength 4" in str(panel)
    assert "the words" in json.dumps(messages[-1])


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"what": "cot"}, "The nearest: cat"),
        ({"region": PAINTED}, "region is empty"),
        ({"stage": "custom", "last": 99}, "within this picture"),
    ],
)
def test_invalid_input_is_reported_next_to_its_field(editing_app: App, changed: dict[str, Any], says: str) -> None:
    visitor = Visitor(editing_app)
    generated(visitor, PROMPT, 3, STEPS, 4)
    answer = visitor.join("accept", None, None, *SENT._replace(**changed))
    assert answer.status_code == 422
    wrong = [one for one in answer.json()["detail"] if not one["is_valid"]]
    assert len(wrong) == 1
    assert says in wrong[0]["message"]


def test_an_uploaded_image_cannot_be_edited(editing_app: App, image_file: Path) -> None:
    visitor = Visitor(editing_app)
    with image_file.open("rb") as file:
        answer = HTTP.post(f"{editing_app.url}gradio_api/upload", files={"files": (image_file.name, file)})
    upload = ({"path": answer.json()[0], "meta": {"_type": "gradio.FileData"}}, "a cat", 0)
    ticket = int(visitor.run("begin_load_user_image", *upload)["data"][0])
    visitor.run("load_user_image", ticket, *upload)
    number, _, status, panel = visitor.run("begin_show", None)["data"]
    assert number == 0
    assert "the noise to start from is not known" in status
    assert "the noise to start from is not known" in panel


def test_cancel_frees_the_model(editing_app: App) -> None:
    visitor = Visitor(editing_app)
    generated(visitor, PROMPT, 3, 30, 4)
    ticket, compare, *_ = visitor.run("begin_compare", None)["data"]
    assert compare is True
    calls = editing_app.model.n_unet_calls  # type: ignore[attr-defined]
    visitor.join("run", ticket, compare, None, "rest", 0.2, None, None, *SENT)
    until = time.monotonic() + 20
    while editing_app.model.n_unet_calls == calls and time.monotonic() < until:  # type: ignore[attr-defined]
        time.sleep(0.01)
    visitor.join("cancel")
    last = [data for message, data in visitor.results() if message == "process_completed"]
    assert any("Cancelled" in json.dumps(data) for data in last)
    assert calls < editing_app.model.n_unet_calls < calls + 30  # type: ignore[attr-defined]
    assert not editing_app.model._lock.is_held  # type: ignore[attr-defined]


def test_a_client_requests_an_edit(editing_app: App, tmp_path: Path) -> None:
    client = Client(editing_app.url, verbose=False, ssl_verify=False)
    arguments: dict[str, Any] = {"prompt": PROMPT, "seed": 3, "steps": STEPS, "guidance": 4, "label": "cat"}
    arguments |= {"region": "top-right", "stage": "early", "strength": 9}
    unedited, edited, measured = client.predict(**arguments, api_name="/intervene")
    with Image.open(unedited) as before, Image.open(edited) as after:
        assert before.size == after.size == (SIZE, SIZE)
        assert before.tobytes() != after.tobytes()
    assert measured["settings"]["num_inference_steps"] == STEPS
    (result,) = measured["results"]
    assert result["edits"] == [{"kind": "move", "label": "cat", "region": "top-right", "stage": "early", "strength": 9}]
    assert result["out_of_range"]["times_p99"] > 1

    mask = np.zeros((SIZE, SIZE), np.uint8)
    mask[:64, 64:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    more_edits = [{"kind": "global", "concepts": [20], "hookpoint": MIDDLE, "steps": [1, 2], "strength": 0.5}]
    *_, same = client.predict(
        **arguments, mask=handle_file(tmp_path / "mask.png"), more_edits=more_edits, api_name="/intervene"
    )
    first, second = same["results"][0]["edits"]
    np.testing.assert_array_equal(cells_mask(first["cells"], SIZE), mask > 0)
    assert second["steps"] == [1, 2]

    Image.fromarray(mask[:64]).save(tmp_path / "small.png")
    Image.fromarray(mask * 0).save(tmp_path / "empty.png")
    for wrong, message in (
        ({"label": "cot"}, "The nearest: cat"),
        ({"label": ""}, "Say what to edit"),
        ({"first_step": 2, "last_step": 9}, "steps, 0 to 4"),
        ({"first_step": 2}, "within this picture's steps"),
        ({"strength": "lots"}, "finite number"),
        ({"strength": -1}, "finite number"),
        ({"steps": "many"}, "steps must be a whole number"),
        ({"mask": handle_file(tmp_path / "small.png")}, "128 x 128, not 128 x 64"),
        ({"mask": handle_file(tmp_path / "empty.png")}, "region is empty"),
        ({"label": "", "concepts": "3, 99"}, "no concept 99"),
        ({"more_edits": [{"label": "cat", "mask": "/etc/passwd"}]}, "no field “mask”"),
        ({"more_edits": ["cat"]}, "An edit is an object"),
    ):
        with pytest.raises(AppError, match=message):
            client.predict(**{**arguments, **wrong}, api_name="/intervene")
