"""The Interventions tab with a small model of random weights, its SAEs and a segmenter of our own."""

import json
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs

import gradio as gr
import httpx
import numpy as np
import pytest
import torch
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image, ImageDraw

import core
from core.diffusion.diffuser import Diffuser
from core.edits.metrics import OutOfRange
from core.segmentation.semantic import Segmentation
from core.ui.concepts.dictionary import Dictionary
from core.ui.interventions.events import EditInputs, RunTrigger, _Events
from core.ui.interventions.export import link_query, python_lines, to_json
from core.ui.interventions.form import Fields, hint_html, label_choices, suggestion
from core.ui.interventions.panel import outcome_html
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
from core.ui.interventions.results import Plan, measure_redrawn
from core.ui.interventions.tab import why_empty_html
from core.ui.jobs import Redrawn, Waiting, intervene
from core.ui.look.scene import Scene
from core.ui.look.theme import launch_options
from core.ui.page import build_demo
from core.ui.runtime import Runtime
from tests.core.edits.test_edits import COND, MIDDLE, make_editor
from tests.core.ui.conftest import App, Visitor

STEPS, SIZE = 5, 128
PROMPT = "a cat on the grass"
MOVE = EditRequest("move", "cat", region="top-right", stage="early", strength=4.0)
TYPED = Fields("move", "cat", f"{MIDDLE}|cond", "top-right", "", "early", 1, 2, 4)
SENT = TYPED._replace(way=None)
"""As a page sends it that knows no blocks yet."""
RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


class Segmenter:
    """Sees a cat in what is red, a whale in what is blue."""

    def class_names(self) -> tuple[str, ...]:
        return ("whale", "cat")

    def segment(self, pictures: Any) -> Segmentation:
        pixels = np.stack([np.asarray(picture) for picture in pictures])
        masks = np.stack([(pixels == colour).all(-1) for colour in (BLUE, RED)], axis=1)
        return Segmentation(torch.from_numpy(masks), torch.ones(masks.shape[:2]))


def runtime_of(model: Diffuser, examples: Path | None = None) -> Runtime:
    editor = make_editor(model)
    runtime = Runtime(engine=core, examples_dir=examples)
    runtime._model, runtime._segmenter = model, Segmenter()  # type: ignore[assignment]
    runtime._dictionary = Dictionary("saes", editor.saes, {site: editor.table(site) for site in editor.saes}, {})
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


def event(**data: Any) -> gr.EventData:
    return SimpleNamespace(_data=data)  # type: ignore[return-value]


# --- wishes as text ---------------------------------------------------------------------------------------------------


def test_wishes_survive_an_address(runtime: Runtime) -> None:
    cells = paint_cells(np.eye(SIZE))
    requests = (
        MOVE,
        EditRequest("whole", "whale", steps=(1, 3), strength=0.5),
        EditRequest("remove", "", (3, 7), MIDDLE, "cond", region=PAINTED, cells=cells, stage="late"),
    )
    assert requests_of(to_text(requests), runtime.spec, STEPS) == requests
    assert request_of({"label": "cat"}, runtime.spec, STEPS) == EditRequest(label="cat", stage="early", strength=4.0)
    numbers = request_of({"kind": "whole", "concepts": [3]}, runtime.spec, STEPS)
    assert (numbers.hookpoint, numbers.branch) == (runtime.spec.hookpoints[1], "cond")


@pytest.mark.parametrize(
    ("document", "told"),
    [
        ("cat", "An edit is an object such as"),
        ({"label": "cat", "colour": "red"}, "An edit has no 'colour'"),
        ({"label": "cat", "mask": "/etc/passwd"}, "An edit has no 'mask'"),
        ({"label": "cat", "kind": ["move"]}, "The kind of an edit is one of move, whole, remove"),
        ({}, "Say what to edit"),
        ({"label": "cat", "concepts": [1]}, "either a label or numbers"),
        ({"concepts": ["x"]}, "whole number"),
        ({"label": "cat", "region": "middle"}, "The region is one of top-left"),
        ({"label": "cat", "region": {"x": 1}}, "The region is one of top-left"),
        ({"label": "cat", "region": PAINTED}, "The region is empty"),
        ({"label": "cat", "region": PAINTED, "cells": "xyz"}, "256 hexadecimal digits"),
        ({"label": "cat", "stage": "soon"}, "The stage is one of early, middle, late"),
        ({"label": "cat", "steps": [0, 5]}, "within this picture's steps, 0 to 4"),
        ({"label": "cat", "steps": [3, 1]}, "its end not before its beginning"),
        ({"label": "cat", "steps": [1]}, "two numbers"),
        ({"label": "cat", "steps": ["a", "b"]}, "within this picture's steps"),
        ({"label": "cat", "strength": math.inf}, "finite number from 0 on"),
        ({"label": "cat", "strength": math.nan}, "finite number from 0 on"),
        ({"label": "cat", "strength": -1}, "finite number from 0 on"),
        ({"label": "cat", "strength": "much"}, "finite number from 0 on"),
    ],
)
def test_what_is_no_wish_is_told(runtime: Runtime, document: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        request_of(document, runtime.spec, STEPS)


def test_a_label_or_numbers_stand_in_one_field() -> None:
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
    assert mask.sum() == (SIZE // GRID) ** 2  # smaller than a cell, yet not lost
    assert mask[500 * SIZE // 512, 3 * SIZE // 512]
    assert paint_cells(np.zeros((9, 9))) == ""
    # Where a side is no multiple of the grid, painting what is shown of a region changes nothing.
    cells = paint_cells(np.eye(SIZE))
    assert paint_cells(cells_mask(cells, 100)) == cells


def test_a_mask_from_a_program_has_the_pictures_size() -> None:
    clear = Image.new("RGBA", (SIZE, SIZE), (255, 255, 255, 0))
    with pytest.raises(ValueError, match="region is empty"):
        mask_cells(clear, SIZE)
    clear.putpixel((0, 0), (0, 0, 0, 1))
    assert cells_mask(mask_cells(clear, SIZE), SIZE).sum() == 16
    with pytest.raises(ValueError, match="128 x 128, not 64 x 128"):
        mask_cells(Image.new("L", (64, 128), 255), SIZE)


# --- the form ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "field", "told"),
    [
        ({"what": " "}, "what", "Say what to edit"),
        ({"what": "cot"}, "what", "No concept carries the label 'cot' there. The nearest: cat"),
        ({"what": "3, 99"}, "what", "There is no concept 99"),
        ({"what": "3", "way": "attic|cond"}, "what", "no SAE"),
        ({"region": PAINTED}, "region", "The region is empty: paint over some of the picture."),
        ({"stage": "own", "first": 4, "last": 6}, "first", "within this picture's steps, 1 to 5"),
        ({"stage": "own", "first": 0, "last": 2}, "first", "1 to 5"),
        ({"stage": "own", "first": "two", "last": 3}, "first", "not “two” to “3”"),
        ({"stage": "own", "first": 1.5, "last": 3}, "first", "1 to 5"),
        ({"strength": math.inf}, "strength", "finite number"),
        ({"strength": None}, "strength", "finite number"),
    ],
)
def test_what_is_wrong_is_told_beside_its_field(
    runtime: Runtime, changed: dict[str, Any], field: str, told: str
) -> None:
    problems = TYPED._replace(**changed).problems(runtime, STEPS)
    assert told in (getattr(problems, field) or "")
    assert sum(problem is not None for problem in problems) == 1
    assert set(TYPED.problems(runtime, STEPS)) == {None}


def test_a_stage_without_steps_is_refused(runtime: Runtime) -> None:
    assert "With 2 steps the middle stage has none" in (TYPED._replace(stage="middle").problems(runtime, 2).stage or "")
    checked = _Events(runtime).check_each(replace_steps(2), (), *TYPED)
    assert "the middle stage has none" in checked[2 + Fields._fields.index("stage")]["message"]


def replace_steps(n: int) -> Scene:
    return Scene(picture(), PROMPT, 3, n, 4.0)


def test_the_form_becomes_a_wish() -> None:
    assert TYPED.request == MOVE
    own = TYPED._replace(stage="own", first=2.0, last=4.0, what="3, 7").request
    assert (own.steps, own.stage, own.concepts, own.hookpoint) == ((1, 3), "", (3, 7), MIDDLE)
    assert TYPED._replace(kind="whole", region=PAINTED, cells="ff").request == EditRequest(
        "whole", "cat", stage="early", strength=4
    )
    assert edit_of(own, SIZE).steps == (1, 3)


def test_something_is_suggested_to_begin_with(runtime: Runtime, scene: Scene) -> None:
    dictionary = runtime.dictionary
    assert dictionary is not None
    assert label_choices(dictionary, scene) == ["cat", "whale"]
    assert label_choices(dictionary, replace(scene, prompt="an orca"))[0] == "whale"
    # The cat is at the left below: it goes to the right.
    assert suggestion(runtime, dictionary, scene).region == "bottom-right"
    assert suggestion(runtime, dictionary, replace(scene, image=picture())).region == "top-left"


def test_what_somebody_typed_stays(runtime: Runtime, scene: Scene) -> None:
    events = _Events(runtime)
    blank = Fields("move", None, None, "top-left", "", "early", 1, 1, 1)
    form = Fields(*events.fill(scene, None, ("", ""), None, (), *blank)[: len(blank)])
    assert form.what.value == "cat"
    assert (form.stage, form.first, form.last) == ("early", 1, 2)
    kept = Fields(
        *events.fill(scene, None, ("cat", "top-right"), None, (), *TYPED._replace(what="whale"))[: len(blank)]
    )
    assert "value" not in kept.what.constructor_args
    assert kept.region == gr.skip()
    elsewhere = Fields(*events.fill(scene, None, ("cat", "left"), None, (), *TYPED)[: len(blank)])
    assert elsewhere.region == gr.skip()
    untouched = Fields(*events.fill(scene, None, ("cat", "top-right"), None, (), *TYPED)[: len(blank)])
    assert untouched.region.value == "bottom-right"


def test_a_link_fills_the_form_and_runs_once_its_picture_is_there(runtime: Runtime, scene: Scene) -> None:
    events = _Events(runtime)
    whole = EditRequest("whole", "whale", stage="middle", strength=0.5)
    query = {name: values[0] for name, values in parse_qs(link_query(scene, (MOVE, whole), True)).items()}
    asked, told = events.restore(SimpleNamespace(query_params=query))  # type: ignore[arg-type]
    assert asked == EditInputs((PROMPT, 3, STEPS, 4.0), (MOVE, whole), True)
    assert told == gr.skip()
    blank = Fields("move", None, None, "top-left", "", "early", 1, 1, 1)
    *form, hint, _, _, requests, chips, _, still, go = events.fill(None, asked, ("", ""), None, (), *blank)
    assert (Fields(*form).kind, requests, still, go) == ("whole", (MOVE,), gr.skip(), gr.skip())
    assert "cat → top right · early · strength 4" in chips
    assert "1 concept (SAE features) of “whale”" in hint
    *_, still, go = events.fill(scene, asked, ("", ""), None, (), *blank)
    assert (still, go) == (None, RunTrigger(1, True))
    for wrong in ({"edits": "[{]"}, {"edits": '[{"label": "cat", "steps": [0, 99]}]'}, {"steps": "many"}):
        asked, told = events.restore(SimpleNamespace(query_params={**query, **wrong}))  # type: ignore[arg-type]
        assert asked is None
        assert "cannot be restored" in told
    assert events.restore(SimpleNamespace(query_params={})) == (None, gr.skip())  # type: ignore[arg-type]


def test_a_hint_tells_what_is_meant(runtime: Runtime) -> None:
    editor = runtime.editor
    assert "3 concepts (SAE features) of “cat”: 3 in the middle, with the prompt" in hint_html(
        editor, "move", "cat", ""
    )
    assert "3 (cat), 4 (no name)" in hint_html(editor, "move", "3, 4", f"{MIDDLE}|cond")
    wrong = hint_html(editor, "move", "c<t", "")
    assert "c&lt;t" in wrong
    assert 'data-word="cat"' in wrong


def test_pointing_names_the_concepts_there(runtime: Runtime, scene: Scene) -> None:
    from core.concepts.trace import CodeTracer

    events, model = _Events(runtime), runtime.model
    assert events.point(scene, "move", event(x=0.5, y=0.5, step=None)) == (gr.skip(),) * 3
    tracer = CodeTracer(model, runtime.dictionary.saes)  # type: ignore[union-attr]
    for _ in model.sample([PROMPT], seeds=[3], num_inference_steps=STEPS, contexts=[tracer.context]):
        pass
    runtime.keep_trace(scene.key, tracer.trace())
    expected = core.edits.concepts_at(tracer.trace(), 0.9, 0.1, COND, steps=[1])
    what, way, hint = events.point(scene, "move", event(x=0.9, y=0.1, step=1))
    assert (what, way) == (", ".join(str(one.number) for one in expected), f"{MIDDLE}|cond")
    assert f"{expected[0].number} (" in hint
    assert events.point(scene, "move", event(x="a", y=0.1)) == (gr.skip(),) * 3


def test_edits_are_kept_in_a_list_and_taken_from_it(runtime: Runtime, scene: Scene) -> None:
    events = _Events(runtime)
    requests, chips, what, _ = events.keep(scene, (), *TYPED)
    assert (requests, what) == ((MOVE,), "")
    assert 'data-index="0"' in chips
    # An empty form beside a list is no mistake; alone it is.
    blank = TYPED._replace(what="")
    assert all(one["is_valid"] for one in events.check(scene, requests, *blank))
    assert not all(one["is_valid"] for one in events.check(scene, (), *blank))
    assert events._plan(False, requests, blank).asked == (MOVE,)
    assert events.drop(scene, requests, event(index=0))[0] == ()
    assert events.drop(scene, requests, event(index=7))[0] == requests
    assert "At most" in str(events.check_cached(scene, (MOVE,) * 7, *TYPED))


# --- what is measured -------------------------------------------------------------------------------------------------


def test_a_move_is_measured_by_hand(runtime: Runtime, scene: Scene) -> None:
    old, new = picture(cat=(8, 80), whale=(8, 8)), picture(cat=(56, 8), whale=(8, 16))
    redrawn = Redrawn((old, new), (OutOfRange(0.5, 2.0),))
    outcome = measure_redrawn(scene, Plan((MOVE,)), redrawn, runtime.dictionary, Segmenter())  # type: ignore[arg-type]
    (result,) = outcome.results
    (moved,) = result.moved
    assert moved is not None
    assert moved.there == (True, True)
    assert moved.area == pytest.approx((1 / 16, 1 / 16))
    assert moved.inside == pytest.approx((0, 24 / 32))
    assert moved.centre_inside == (False, True)
    # Elsewhere, the whale has moved down by 8 pixels, and a fourth of the cat has come.
    assert result.layout == pytest.approx((24 * 32) / (40 * 32))
    elsewhere = SIZE * SIZE - 64 * 64 - 32 * 32
    changed = 2 * 8 * 32 * 2 + 8 * 32 * 2  # pixels and colours: white to blue and back, white to red
    assert result.low**2 + result.high**2 == pytest.approx(changed / (3 * elsewhere))
    assert result.high == pytest.approx(0, abs=1e-6)
    panel = outcome_html(runtime, outcome)
    assert "Done: <b>cat</b> has its centre in the region (75 % of it lies where you asked, 0 % did before)" in panel
    assert "<b>50 %</b> of the edited concepts’ values lie beyond what data have" in panel
    assert "stayed the same to <b>0.60</b>" in panel


def test_what_is_lost_or_gone_is_told(runtime: Runtime, scene: Scene) -> None:
    plan = Plan(
        (
            MOVE,
            EditRequest("remove", "whale", stage="early"),
            EditRequest("whole", "", (20, 3), MIDDLE, "cond", stage="late"),
        )
    )
    redrawn = Redrawn((picture(cat=(8, 80), whale=(60, 0)), picture()), (OutOfRange(math.nan, 0.0),))
    outcome = measure_redrawn(scene, plan, redrawn, runtime.dictionary, Segmenter())  # type: ignore[arg-type]
    panel = outcome_html(runtime, outcome)
    assert "Not done: <b>cat</b> was there and is lost" in panel
    assert "Taken away: <b>whale</b> went from 6.2 % to <b>0 %</b> of the picture" in panel
    assert "The segmenter finds things and places, not this" in panel  # two labels are no thing
    assert "nothing lies beyond what data have" in panel
    document = json.loads(to_json(outcome, "picturebook", "saes"))
    assert document["results"][0]["beyond_data"] == {"share": None, "times_p99": 0}
    assert document["results"][0]["moved"][0]["inside_region"] == [0, None]
    assert document["results"][0]["moved"][2] is None


def test_a_model_without_a_segmenter_says_so(runtime: Runtime, scene: Scene) -> None:
    redrawn = Redrawn((picture(cat=(8, 80)), picture()), (OutOfRange(0.0, 0.5),))
    outcome = measure_redrawn(scene, Plan((MOVE,)), redrawn, runtime.dictionary, None)  # type: ignore[arg-type]
    panel = outcome_html(runtime, outcome)
    assert "No segmenter comes with this model, so nobody but you can tell" in panel
    assert "IoU)" not in panel.split("What these figures mean")[0]
    everywhere = Plan((replace(MOVE, region="all"),))
    outcome = measure_redrawn(scene, everywhere, redrawn, runtime.dictionary, None)  # type: ignore[arg-type]
    assert "there is no elsewhere" in outcome_html(runtime, outcome)


def test_three_stages_stand_side_by_side(runtime: Runtime, scene: Scene) -> None:
    plan = Plan((replace(MOVE, stage="", steps=(1, 2)),), ("early", "middle", "late"))
    assert [(stage, one.stage, one.steps) for stage, (one,) in plan.rows] == [
        (name, name, None) for name in ("early", "middle", "late")
    ]
    images = (picture(cat=(8, 80)), picture(cat=(80, 8)), picture(cat=(8, 80)), picture())
    redrawn = Redrawn(images, (OutOfRange(0.0, 0.5),) * 3)
    outcome = measure_redrawn(scene, plan, redrawn, runtime.dictionary, Segmenter())  # type: ignore[arg-type]
    panel = outcome_html(runtime, outcome)
    assert panel.count('class="id-iv-choose"') == 3
    assert "<td>yes</td><td>no</td><td>lost</td>" in panel
    assert "compare=stages" in panel
    chosen = _Events(runtime).choose(outcome, event(index=2))
    assert np.array_equal(np.asarray(chosen[1].resize((SIZE, SIZE), Image.Resampling.NEAREST))[0, 0], WHITE)
    assert _Events(runtime).choose(outcome, event(index=3)) == gr.skip()


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


def redrawn(runtime: Runtime, scene: Scene, *requests: EditRequest) -> Redrawn:
    edits = [[edit_of(one, SIZE) for one in requests]]
    *_, last = intervene(runtime, None, scene, edits)
    assert isinstance(last, Redrawn)
    return last


def test_no_edit_is_the_same_picture_to_the_bit(runtime: Runtime, scene: Scene) -> None:
    plain, same = redrawn(runtime, scene, replace(MOVE, strength=0.0)).images
    assert plain.tobytes() == same.tobytes()
    alone = runtime.model.generate(PROMPT, seed=3, num_inference_steps=STEPS, guidance_scale=4.0).image
    assert np.abs(np.asarray(alone, np.int16) - np.asarray(plain, np.int16)).max() <= 1
    edit = replace(MOVE, strength=9.0)
    before, after = redrawn(runtime, scene, edit).images
    assert before.tobytes() == plain.tobytes()
    assert np.abs(np.asarray(before, np.int16) - np.asarray(after, np.int16)).max() > 2
    both = redrawn(runtime, scene, edit, EditRequest("whole", "whale", stage="middle", strength=9.0)).images[1]
    assert both.tobytes() != after.tobytes()
    assert redrawn(runtime, scene, edit).images[1].tobytes() == after.tobytes()  # what was taken away left no trace


def test_a_job_that_nobody_wants_stops_within_a_step(runtime: Runtime, scene: Scene) -> None:
    ticket = runtime.tickets.issue("somebody")
    work = intervene(runtime, ticket, scene, [[edit_of(MOVE, SIZE)]])
    next(work)
    calls = runtime.model.n_unet_calls
    runtime.tickets.cancel("somebody")
    assert list(work) == []
    assert runtime.model.n_unet_calls <= calls + 1
    assert not runtime.model._lock.locked()
    assert sum(len(module._forward_hooks) for module in runtime.model.unet.modules()) == 0


def test_a_model_that_is_still_loaded_is_waited_for(scene: Scene) -> None:
    runtime = Runtime(engine=core)
    work = intervene(runtime, None, scene, [[]])
    assert isinstance(next(work), Waiting)
    assert "will appear here" in why_empty_html(runtime)
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


def drawn(visitor: Visitor, *data: Any) -> None:
    ticket = int(visitor.run("begin_draw", *data)["data"][0])
    visitor.run("draw", ticket, *data, None)


def test_a_picture_is_edited_and_then_its_words_have_their_turn(
    editing_app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(_: Runtime, ticket: int, scene: Scene, *settings: Any) -> Iterator[tuple[str, str]]:
        assert (ticket, scene.prompt, settings) == (number, PROMPT, ("rest", 0.2))
        yield "the words", "told"

    monkeypatch.setattr("core.ui.interventions.events.measure_updates", measured)
    visitor = Visitor(editing_app)
    drawn(visitor, PROMPT, 3, STEPS, 4)
    assert visitor.join("accept", None, None, *SENT).status_code == 200
    list(visitor.results())
    number, compare, status, _ = visitor.run("begin_show", None)["data"]
    assert "Waiting" in status
    visitor.join("run", number, compare, None, "rest", 0.2, None, None, *SENT)
    messages = list(visitor.results())
    told = " ".join(json.dumps(data) for message, data in messages if message == "process_generating")
    assert "Drawing again: step 1 of 5" in told
    panel = next(
        data["data"][0]
        for message, data in messages
        if message in ("process_generating", "process_completed") and "data-query" in str(data["data"][0])
    )
    assert "cat → top right · early · strength 4" in str(panel)
    assert "the words" in json.dumps(messages[-1])


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"what": "cot"}, "The nearest: cat"),
        ({"region": PAINTED}, "region is empty"),
        ({"stage": "own", "last": 99}, "within this picture"),
    ],
)
def test_wrong_input_is_refused_beside_its_field(editing_app: App, changed: dict[str, Any], told: str) -> None:
    visitor = Visitor(editing_app)
    drawn(visitor, PROMPT, 3, STEPS, 4)
    answer = visitor.join("accept", None, None, *SENT._replace(**changed))
    assert answer.status_code == 422
    wrong = [one for one in answer.json()["detail"] if not one["is_valid"]]
    assert len(wrong) == 1
    assert told in wrong[0]["message"]


def test_a_picture_of_ones_own_cannot_be_edited(editing_app: App, picture: Path) -> None:
    visitor = Visitor(editing_app)
    with picture.open("rb") as file:
        answer = httpx.post(f"{editing_app.url}gradio_api/upload", files={"files": (picture.name, file)})
    brought = ({"path": answer.json()[0], "meta": {"_type": "gradio.FileData"}}, "a cat", 0)
    ticket = int(visitor.run("begin_load_user_image", *brought)["data"][0])
    visitor.run("bring", ticket, *brought)
    number, _, status, panel = visitor.run("begin_show", None)["data"]
    assert number == 0
    assert "no noise from which to draw it again" in status
    assert "no noise from which to draw it again" in panel


def test_cancel_frees_the_model(editing_app: App) -> None:
    visitor = Visitor(editing_app)
    drawn(visitor, PROMPT, 3, 30, 4)
    ticket, compare, *_ = visitor.run("begin_each", None)["data"]
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
    assert not editing_app.model._lock.locked()  # type: ignore[attr-defined]


def test_a_program_asks_for_an_edit(editing_app: App, tmp_path: Path) -> None:
    client = Client(editing_app.url, verbose=False)
    asked: dict[str, Any] = {"prompt": PROMPT, "seed": 3, "steps": STEPS, "guidance": 4, "label": "cat"}
    asked |= {"region": "top-right", "stage": "early", "strength": 9}
    unedited, edited, measured = client.predict(**asked, api_name="/intervene")
    with Image.open(unedited) as before, Image.open(edited) as after:
        assert before.size == after.size == (SIZE, SIZE)
        assert before.tobytes() != after.tobytes()
    assert measured["settings"]["num_inference_steps"] == STEPS
    (result,) = measured["results"]
    assert result["edits"] == [{"kind": "move", "label": "cat", "region": "top-right", "stage": "early", "strength": 9}]
    assert result["beyond_data"]["times_p99"] > 1

    mask = np.zeros((SIZE, SIZE), np.uint8)
    mask[:64, 64:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    runner_ups = [{"kind": "whole", "concepts": [20], "hookpoint": MIDDLE, "steps": [1, 2], "strength": 0.5}]
    *_, same = client.predict(
        **asked, mask=handle_file(tmp_path / "mask.png"), runner_ups=runner_ups, api_name="/intervene"
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
        ({"runner_ups": [{"label": "cat", "mask": "/etc/passwd"}]}, "no 'mask'"),
        ({"runner_ups": ["cat"]}, "An edit is an object"),
    ):
        with pytest.raises(AppError, match=message):
            client.predict(**{**asked, **wrong}, api_name="/intervene")
