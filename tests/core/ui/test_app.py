"""The served page, with a stand-in for the engine: jobs, cancelling, bad input, and the API."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

from core.ui.backend.runtime import Runtime
from core.ui.page import build_demo
from tests.core.ui.conftest import HTTP, App, Visitor
from tests.fakes.engine import FakeEngine, paint

CAT = ("a cat", 0, 5, 4)


def begin(visitor: Visitor, name: str, *data: Any) -> int:
    return int(visitor.run(name, *data)["data"][0])


def drawn(visitor: Visitor, *data: Any) -> dict[str, Any]:
    result: dict[str, Any] = visitor.run("generate_image", begin(visitor, "begin_generate", *data), *data, None)
    return result


def problems(response: httpx.Response) -> dict[str, str]:
    assert response.status_code == 422
    return {v["parameter_name"]: v["message"] for v in response.json()["detail"] if not v["is_valid"]}


def uploaded(app: App, path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        answer = HTTP.post(f"{app.url}gradio_api/upload", files={"files": (path.name, file)})
    return {"path": answer.json()[0], "meta": {"_type": "gradio.FileData"}}


def test_building_the_page_does_not_import_torch() -> None:
    code = (
        "import sys, core.ui.page as p, core.ui.look.theme as t, core.ui.backend.runtime as r; "
        "p.build_demo(r.Runtime()); t.launch_options(); "
        "sys.exit(', '.join(m for m in ('torch', 'diffusers', 'transformers') if m in sys.modules) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[3])
    assert done.returncode == 0, done.stderr


def test_an_image_is_generated_and_its_words_are_measured(visitor: Visitor) -> None:
    ticket = begin(visitor, "begin_generate", *CAT)
    viewer, _, status = visitor.run("generate_image", ticket, *CAT, None)["data"]
    assert viewer.count('class="id-frame" data-step') == 5
    assert "Reading the words" in status
    panel, status = visitor.run("measure", ticket, None, "rest", 0.1)["data"]
    assert 'data-word="cat"' in panel
    assert "the requested precision was reached" in panel
    assert "seed=0&amp;steps=5" in panel


def test_progress_reports_the_step_and_the_time_left(visitor: Visitor) -> None:
    prompt = ("a cat on the sea", 1, 20, 4)
    ticket = begin(visitor, "begin_generate", *prompt)
    visitor.join("generate_image", ticket, *prompt, None)
    text = " ".join(json.dumps(data) for message, data in visitor.results() if message == "process_generating")
    assert "Drawing: step" in text
    assert "s left" in text


def test_cancel_stops_the_computation_before_the_next_job_begins(app: App, visitor: Visitor) -> None:
    first, second = ("a small cat", 0, 150, 4), ("a small dog", 0, 4, 4)
    ticket = begin(visitor, "begin_generate", *first)
    visitor.join("generate_image", ticket, *first, None)
    while not any(job == "draw a small cat" for job, _ in app.model.calls):
        time.sleep(0.01)
    time.sleep(0.1)
    Visitor(app, visitor.session).join("cancel")
    messages = list(visitor.results())
    assert "Cancelled" in json.dumps(messages)
    drawn(Visitor(app), *second)
    calls_of_first = [when for job, when in app.model.calls if job == "draw a small cat"]
    began = min(when for job, when in app.model.calls if job == "draw a small dog")
    assert len(calls_of_first) < 100
    assert max(calls_of_first) < began


def test_a_newer_job_replaces_the_one_that_runs(app: App, visitor: Visitor) -> None:
    first, second = ("blue cat", 0, 150, 4), ("blue dog", 0, 4, 4)
    ticket = begin(visitor, "begin_generate", *first)
    visitor.join("generate_image", ticket, *first, None)
    time.sleep(0.2)
    again = Visitor(app, visitor.session)
    again.join("begin_generate", *second)
    done = [data["data"] for message, data in again.results() if message == "process_completed"]
    newer = max(int(d[0]) for d in done if isinstance(d[0], int | float))
    viewer, _, _ = visitor.run("generate_image", newer, *second, None)["data"]
    assert viewer.count('class="id-frame" data-step') == 4
    assert len([1 for job, _ in app.model.calls if job == "draw blue cat"]) < 100


def test_cancelling_a_measurement_keeps_its_partial_result(app: App, visitor: Visitor) -> None:
    prompt = ("the blue sea and snow", 2, 4, 4)
    ticket = begin(visitor, "begin_generate", *prompt)
    visitor.run("generate_image", ticket, *prompt, None)
    app.runtime.engine.model.delay = 0.1
    try:
        visitor.join("measure", ticket, None, "rest", 0.1)
        time.sleep(0.9)
        Visitor(app, visitor.session).join("cancel")
        text = json.dumps(list(visitor.results()))
    finally:
        app.runtime.engine.model.delay = 0.02
    assert "stopped early" in text
    assert "Cancelled" in text


def test_a_client_that_cancels_frees_the_model(app: App, client: Client) -> None:
    job = client.submit("a dog on snow", 0, 200, 4, api_name="/generate")
    while not any(name == "draw a dog on snow" for name, _ in app.model.calls):
        time.sleep(0.01)
    job.cancel()
    client.predict("a dog on grass", 0, 3, 4, api_name="/generate")
    first = [when for name, when in app.model.calls if name == "draw a dog on snow"]
    second = [when for name, when in app.model.calls if name == "draw a dog on grass"]
    assert len(first) < 150
    assert max(first) < min(second)


def test_stored_examples_are_shown_at_once_and_from_a_link(app: App, visitor: Visitor) -> None:
    calls = len(app.model.calls)
    body = {"fn_index": visitor.function("pick")._id, "session_hash": "x", "event_data": {"name": "cat"}, "data": []}
    shown = HTTP.post(f"{app.url}gradio_api/run/predict", json=body).json()["data"]
    assert shown[0] == "a cat on the grass"
    assert 'data-word="grass"' in shown[8]
    query = "?prompt=a+cat+on+the+grass&seed=3&steps=6&guidance=4&given=nothing"
    body = {"fn_index": visitor.function("load")._id, "session_hash": "y", "data": []}
    shown = HTTP.post(f"{app.url}gradio_api/queue/join{query}", json=body)
    restored = [data for message, data in Visitor(app, "y").results() if message == "process_completed"][-1]["data"]
    assert restored[4] == "nothing"
    assert "” alone contributed" in restored[8]
    assert len(app.model.calls) == calls


@pytest.mark.parametrize(
    ("data", "field", "says"),
    [
        (("", 0, 5, 4), "prompt", "Describe the picture"),
        (("   ", 0, 5, 4), "prompt", "Describe the picture"),
        (("!?", 0, 5, 4), "prompt", "in a few words"),
        (("cat " * 200, 0, 5, 4), "prompt", "at most 500"),
        (("a cat and " * 8, 0, 5, 4), "prompt", "reads at most 20 words"),
        (("a zebra", 0, 5, 4), "prompt", "zebra"),
        (("a cat", "seven", 5, 4), "seed", "whole number"),
        (("a cat", 1.5, 5, 4), "seed", "whole number"),
        (("a cat", -1, 5, 4), "seed", "whole number"),
        (("a cat", None, 5, 4), "seed", "whole number"),
        (("a cat", 0, 0, 4), "steps", "from 1 to"),
        (("a cat", 0, 5, "x"), "guidance", "from 0 to"),
    ],
)
def test_bad_input_is_reported_next_to_its_field(
    visitor: Visitor, data: tuple[Any, ...], field: str, says: str
) -> None:
    answer = problems(visitor.join("begin_generate", *data))
    assert list(answer) == [field]
    assert says in answer[field]


def test_the_app_goes_on_after_bad_input(visitor: Visitor) -> None:
    problems(visitor.join("begin_generate", "a zebra", 0, 5, 4))
    assert drawn(visitor, *CAT)["data"][0]


def test_no_event_wipes_what_a_validator_wrote_beside_a_field(app: App) -> None:
    """The browser does so for the fields that an event shows progress on, and for its inputs when it begins."""
    events = [event for event in app.demo.fns.values() if event.api_visibility == "private"]
    assert len(events) > 30
    assert [event.name for event in events if event.outputs and event.show_progress_on != []] == []
    checked = {field._id for event in events if event.validator for field in event.inputs}
    waiting = [event for event in events if event.trigger_mode == "always_last"]
    assert len(waiting) >= 3
    assert [event.name for event in waiting if checked & {field._id for field in event.inputs}] == []


def make_files(folder: Path) -> dict[str, Path]:
    """Unusual files to upload, by name."""
    rgba = Image.new("RGBA", (40, 40), (255, 0, 0, 128))
    files = {name: folder / name for name in ("text.png", "large.png", "one.png", "clear.png", "grey.png", "film.gif")}
    files["text.png"].write_text("I am no picture")
    Image.new("1", (10000, 10000)).save(files["large.png"])
    Image.new("RGB", (1, 1)).save(files["one.png"])
    rgba.save(files["clear.png"])
    Image.new("L", (40, 50), 90).save(files["grey.png"])
    frames = [Image.new("RGB", (40, 40), colour) for colour in ("red", "green")]
    frames[0].save(files["film.gif"], save_all=True, append_images=frames[1:])
    return files


@pytest.mark.parametrize(
    ("name", "says"),
    [("text.png", "not an image"), ("large.png", "100 million pixels"), ("one.png", "1 x 1 pixels")],
)
def test_an_unusable_file_is_reported_next_to_its_field(
    app: App, visitor: Visitor, tmp_path: Path, name: str, says: str
) -> None:
    file = uploaded(app, make_files(tmp_path)[name])
    answer = problems(visitor.join("begin_load_user_image", file, "a cat", 0))
    assert says in answer["image"]


@pytest.mark.parametrize(
    ("name", "note"), [("clear.png", "shown on white"), ("grey.png", "no colour"), ("film.gif", "first frame")]
)
def test_an_unusual_image_is_used_and_the_page_says_how(
    app: App, visitor: Visitor, tmp_path: Path, name: str, note: str
) -> None:
    file = uploaded(app, make_files(tmp_path)[name])
    ticket = begin(visitor, "begin_load_user_image", file, "a cat", 0)
    viewer, _, status = visitor.run("load_user_image", ticket, file, "a cat", 0)["data"]
    assert note in status
    assert "no denoising steps" in viewer
    if name == "clear.png":
        panel, _ = visitor.run("measure", ticket, None, "rest", 0.2)["data"]
        assert 'data-uploaded="1"' in panel
        assert "id-link" not in panel


def test_an_image_needs_a_caption_and_a_caption_an_image(app: App, visitor: Visitor, image_file: Path) -> None:
    assert (
        "in a few words"
        in problems(visitor.join("begin_load_user_image", uploaded(app, image_file), " ", 0))["caption"]
    )
    assert "Choose an image" in problems(visitor.join("begin_load_user_image", None, "a cat", 0))["image"]


def test_a_client_generates_and_measures(client: Client) -> None:
    path, settings = client.predict("a cat on snow", 2, 4, 3.5, api_name="/generate")
    with Image.open(path) as image:
        assert image.convert("RGB").tobytes() == paint("a cat on snow", 2).tobytes()
    assert settings["num_inference_steps"] == 4
    words = "snow, cat, Snow"  # one twice, and not in the prompt's order
    result = client.predict(handle_file(path), "a cat on snow", words, "nothing", 0.2, 5, api_name="/attribute")
    assert result["words"] == ["cat", "snow"]
    assert result["given"] == "nothing"
    assert len(result["maps"][0]) == 16


def test_the_public_endpoints(app: App) -> None:
    info = HTTP.get(f"{app.url}gradio_api/info").json()
    public = "attribute change_word concept concepts decompose generate intervene layout likelihood rank_captions"
    assert sorted(info["named_endpoints"]) == [f"/{name}" for name in public.split()]
    assert info["unnamed_endpoints"] == {}
    seed = next(p for p in info["named_endpoints"]["/generate"]["parameters"] if p["parameter_name"] == "seed")
    assert seed["python_type"]["type"] == "float"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("", "", "rest", 0.2, 0), "Describe the picture"),
        (("a zebra", "", "rest", 0.2, 0), "zebra"),
        (("a cat", "dog", "rest", 0.2, 0), "'dog' is not in the prompt"),
        (("a cat", "", "rest", 0, 0), "relative error"),
        (("a cat", "", "rest", 0.2, "x"), "seed must be a whole number"),
    ],
)
def test_a_client_gets_the_reason_of_a_refusal(
    client: Client, image_file: Path, arguments: tuple[Any, ...], says: str
) -> None:
    with pytest.raises(AppError, match=says):
        client.predict(handle_file(str(image_file)), *arguments, api_name="/attribute")


@pytest.mark.parametrize("path", ["/etc/passwd", str(Path(__file__)), "../../../etc/passwd"])
def test_a_client_cannot_name_a_file_of_the_server(app: App, path: str) -> None:
    file = {"path": path, "meta": {"_type": "gradio.FileData"}}
    started = HTTP.post(f"{app.url}gradio_api/call/attribute", json={"data": [file, "a cat", "", "rest", 0.2, 0]})
    if started.status_code == 200:
        events = HTTP.get(f"{app.url}gradio_api/call/attribute/{started.json()['event_id']}", timeout=30).text
        assert "event: error" in events
        assert "not an image" not in events  # that would mean that it had been opened
        assert "root:" not in events
    answer = HTTP.get(f"{app.url}gradio_api/file={path}")
    assert answer.status_code in (403, 404)


def test_jobs_wait_for_the_model() -> None:
    runtime = Runtime(engine=FakeEngine(load_seconds=0.6), examples_dir=Path("/nowhere"))
    assert build_demo(runtime) is not None
    runtime.start()
    assert runtime.badge() == ("loading", "loading the model, about 10 s")
    from core.ui.backend.jobs import Waiting, generate

    items = list(generate(runtime, None, "a cat", 0, 3, 4.0))
    assert isinstance(items[0], Waiting)
    assert items[-1].image.size == (64, 64)  # type: ignore[union-attr]
    assert runtime.badge() == ("ready", "picturebook · CPU · ready")


def test_a_model_that_fails_to_load_says_why() -> None:
    runtime = Runtime(engine=FakeEngine(fails="its folder is empty"), examples_dir=Path("/nowhere"))
    runtime.start()
    assert runtime.ready.wait(5)
    assert "its folder is empty" in runtime.badge()[1]
    from core.ui.backend.errors import JobError
    from core.ui.backend.jobs import generate

    with pytest.raises(JobError, match="its folder is empty"):
        list(generate(runtime, None, "a cat", 0, 3, 4.0))
