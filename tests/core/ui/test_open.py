"""The page as it stands in the open: forged and odd requests, clients that ask and leave, hosts, headers, old files."""

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import httpx
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image
from PIL.GifImagePlugin import GifImageFile

from core.errors import ModelError
from core.ui.backend import server
from core.ui.backend.errors import JobError, refuse, sentence
from core.ui.backend.fields import ChoiceField, NumberField, TextField
from core.ui.backend.inputs import concept_number, image_note, number_in, seed_problem, text_problem
from core.ui.backend.queue import MAX_WAITING
from core.ui.backend.server import is_loopback
from tests.core.diffusion.test_images import EPS
from tests.core.ui.conftest import App, Visitor
from tests.core.ui.test_app import begin, uploaded

PYTHONIC = re.compile(
    r"Traceback|NoneType|has no attribute|argument|unhashable|int too large|could not convert|not subscriptable|"
    r"\w+Error\b|surrogates|codec|invalid literal|list index|not iterable|errno|File \"|site-packages|/tmp/|/core/|"
    r"validation error|recursion",
    re.IGNORECASE,
)
"""What Python says to programmers, and names of folders."""
HUGE = 10**400


def answer(app: App, name: str, data: Any, raw: bytes | None = None) -> tuple[str, Any]:
    """(kind, message) of the last thing that an endpoint answers."""
    body = raw if raw is not None else json.dumps({"data": data}).encode()
    headers = {"Content-Type": "application/json"}
    posted = httpx.post(f"{app.url}gradio_api/call/{name}", content=body, headers=headers, timeout=60)
    if posted.status_code != 200:
        return f"http {posted.status_code}", posted.text
    said = httpx.get(f"{app.url}gradio_api/call/{name}/{posted.json()['event_id']}", timeout=60).text
    event, _, message = said.strip().rpartition("\n\n")[2].partition("\ndata: ")
    return event.removeprefix("event: "), json.loads(message)


# --- what is said of an error ----------------------------------------------------------------------------------------


def raised(action: Any) -> BaseException:
    with pytest.raises(BaseException) as caught:  # noqa: PT011 - whatever it is
        action()
    return caught.value


def test_our_own_messages_are_told_and_pythons_are_not(caplog: pytest.LogCaptureFixture) -> None:
    def refuse_model() -> None:
        raise ModelError("There is no model of that name.")

    assert sentence(raised(refuse_model)) == "There is no model of that name."
    assert sentence(raised(lambda: concept_number("x"))).startswith("A concept's number must be")
    assert sentence(JobError("Wait a minute.")) == "Wait a minute."
    assert sentence(raised(lambda: refuse("No such choice."))) == "No such choice."
    assert "not among those" in sentence(raised(lambda: gr.Radio(["a"]).preprocess({})))  # type: ignore[arg-type]
    for odd in (lambda: int("x"), lambda: [][1], lambda: {}["/home/me"], lambda: None.strip(), lambda: float(HUGE)):  # type: ignore[attr-defined]
        caplog.clear()
        said = sentence(raised(odd))
        found = re.fullmatch(r"Something went wrong here\. .* under the reference ([0-9a-f]{6})\.", said)
        assert found
        assert f"reference {found[1]}" in caplog.text
        assert "Traceback" in caplog.text


@pytest.mark.parametrize(
    ("value", "number"),
    [(7, 7.0), (0.5, 0.5), (HUGE, None), (-HUGE, None), (float("nan"), None), (float("inf"), None), (True, None),
     ("7", None), (None, None), ([7], None), ({}, None)],
)  # fmt: skip
def test_only_finite_numbers_are_numbers(value: Any, number: float | None) -> None:
    assert number_in(value) == number


def test_fields_pass_on_what_can_be_worked_with() -> None:
    text, number = TextField(label="word", max_length=5), NumberField(label="seed")
    assert text.preprocess(None) == ""
    assert text.preprocess("cat") == "cat"
    for odd, says in (
        ("catcat", "at most 5"),
        (["cat"], "must be a text"),
        (5, "must be a text"),
        ("\udfff", "half of"),
    ):
        with pytest.raises(gr.Error, match=says):
            text.preprocess(odd)
    choice = ChoiceField(["cond", "uncond"], value="cond", label="branch")
    assert choice.preprocess(None) == "cond"
    assert choice.preprocess("uncond") == "uncond"
    for odd in ("", {}, ["cond"], 5, "middle"):
        with pytest.raises(gr.Error, match="The branch must be one of cond, uncond; not"):
            choice.preprocess(odd)
    assert number.preprocess(HUGE) == str(HUGE)
    assert "whole number" in str(seed_problem(number.preprocess(HUGE)))
    assert text_problem("prompt", "x" * 501) == "The prompt has 501 characters; at most 500 are allowed. Shorten it."
    assert text.get_config()["label"] == "word"  # the page and the API's description read it there


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("generate", [None, 0, 5, 4]),
        ("generate", ["a cat \udfff", 0, 5, 4]),
        ("generate", [["a cat"], 0, 5, 4]),
        ("generate", ["a cat", HUGE, 5, 4]),
        ("generate", ["a cat", 0, 5, -HUGE]),
        ("generate", ["a cat", [], 5, {}]),
        ("generate", ["a cat", 0]),
        ("generate", []),
        ("attribute", [None, "a cat", "", "rest", 0.2, 0]),
        ("attribute", [{"path": None}, "a cat", "", "rest", 0.2, 0]),
        ("attribute", [{"path": "app.py", "meta": {"_type": "gradio.FileData"}}, "a cat", "", "rest", 0.2, 0]),
        ("attribute", [5, "a cat", "", "rest", 0.2, 0]),
        ("concepts", [None]),
        ("concepts", ["cat " * 100]),
        ("concepts", [{"a": 1}]),
        ("concept", [None, "cond", HUGE]),
        ("concept", ["x" * 300, "cond", 3]),
        ("layout", ["a cat", 0, 5, 4, 0, "x" * 90, "cond", "readout"]),
        ("layout", ["a cat", 0, 5, 4, HUGE, None, None, None]),
        ("decompose", [None, None, None, None, None, None]),
        ("rank_captions", [None, "a cat\n" * 5000, 0.9, 0]),
        ("change_word", [None, "a cat", "x" * 1000, None]),
        ("likelihood", [None, "a cat", float("nan"), 0]),
        ("intervene", ["a cat", 0, 5, 4, {}, "cat", "", "", "cond", {}, "", None, None, None, None, None]),
        ("intervene", ["a cat", 0, 5, 4, None, None, None, None, None, None, None, None, None, None, None, [5]]),
    ],
)
def test_whatever_is_sent_is_answered_in_a_sentence(app: App, name: str, data: list[Any]) -> None:
    kind, message = answer(app, name, data)
    text = message["error"] if isinstance(message, dict) else message
    assert kind in ("error", "http 422"), kind
    assert not PYTHONIC.search(text), text
    assert text.strip(" '\"").endswith((".", "?", "]", "}"))


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b'{"data": 5}',
        b'{"data":' + b"[" * 3000 + b"]" * 3000 + b"}",
        b'{"data":["a cat",' + b"9" * 5000 + b",5,4]}",
    ],
)
def test_bodies_that_are_no_requests_are_refused(app: App, raw: bytes) -> None:
    kind, message = answer(app, "generate", None, raw)
    assert kind in ("http 400", "http 422", "error")
    assert "Traceback" not in str(message)


@pytest.mark.parametrize(
    "event", ["x", [1], 5, {"number": [1], "site": 5}, {"index": HUGE}, {"word": {}, "kind": ["a"]}]
)
@pytest.mark.parametrize("name", ["open_concept", "find_concepts", "steer", "point", "pick", "restore_captions"])
def test_odd_event_data_is_no_data(app: App, visitor: Visitor, name: str, event: Any) -> None:
    data = [None] * len(visitor.function(name).inputs)
    body = {"fn_index": visitor.function(name)._id, "session_hash": "x", "event_data": event, "data": data}
    said = httpx.post(f"{app.url}gradio_api/run/predict", content=json.dumps(body), timeout=60)
    assert not PYTHONIC.search(said.text) or said.status_code == 422
    assert said.status_code in (200, 422)


# --- uploads ---------------------------------------------------------------------------------------------------------


def test_an_upload_that_is_a_program_is_refused_and_the_app_goes_on(app: App, visitor: Visitor, tmp_path: Path) -> None:
    (tmp_path / "cat.png").write_bytes(EPS)
    client = Client(app.url, verbose=False)
    with pytest.raises(AppError, match="not an image that can be read"):
        client.predict(handle_file(tmp_path / "cat.png"), "a cat", "", "rest", 0.2, 0, api_name="/attribute")
    answered = visitor.join("begin_load_user_image", uploaded(app, tmp_path / "cat.png"), "a cat", 0)
    assert "not an image that can be read" in answered.text
    client.predict("a cat", 0, 2, 4, api_name="/generate")


def test_only_the_beginning_of_an_animation_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counting the frames of a large one takes a hundred times as long as reading a picture."""

    def count(_: Any) -> int:
        raise AssertionError("all frames are read")

    frames = [Image.new("RGB", (40, 40), (i, 0, 0)) for i in range(9)]
    frames[0].save(tmp_path / "film.gif", save_all=True, append_images=frames[1:])
    monkeypatch.setattr(GifImageFile, "n_frames", property(count))
    assert image_note(tmp_path / "film.gif") == "Only the first frame of the animation is used."


def test_old_files_are_removed(app: App) -> None:
    frequency, age = app.demo.delete_cache
    assert 0 < frequency <= 3600
    assert 0 < age <= 24 * 3600


# --- jobs ------------------------------------------------------------------------------------------------------------


def test_tickets_cannot_be_guessed(app: App) -> None:
    tickets = [app.runtime.tickets.issue(f"somebody {i}") for i in range(200)]
    assert len(set(tickets)) == 200
    assert all(0 < ticket < 2**53 for ticket in tickets)
    assert len({ticket >> 45 for ticket in tickets}) > 50
    assert [*tickets] != sorted(tickets)
    for i in range(200):
        app.runtime.tickets.cancel(f"somebody {i}")


def test_a_page_that_opens_while_many_wait_is_served_and_look_ups_are_answered(app: App) -> None:
    """The queue of jobs is full, and what needs no model does not notice."""
    turns = [app.runtime.queue.join() for _ in range(MAX_WAITING)]
    try:
        assert app.runtime.queue.wait(turns[0], 1)
        turns.append(app.runtime.queue.join())
        client = Client(app.url, verbose=False)
        with pytest.raises(AppError, match=f"{MAX_WAITING} jobs are waiting for the model. Try again in a minute"):
            client.predict("a cat", 0, 2, 4, api_name="/generate")
        with pytest.raises(AppError, match="no labelled concepts"):
            client.predict("cat", api_name="/concepts")
        visitor = Visitor(app)
        assert "ready" in visitor.run("tick", "a cat")["data"][0]
        ticket = begin(visitor, "begin_generate", "a cat", 0, 2, 4)
        _, _, status = visitor.run("generate_image", ticket, "a cat", 0, 2, 4, None)["data"]
        assert "jobs are waiting for the model" in status
    finally:
        for turn in turns:
            app.runtime.queue.leave(turn)


def test_a_client_is_told_its_place(app: App) -> None:
    turn = app.runtime.queue.join()
    assert app.runtime.queue.wait(turn, 1)
    job = Client(app.url, verbose=False).submit("a small sea", 0, 2, 4, api_name="/generate")
    until, told = time.monotonic() + 30, ""
    while "before yours" not in told and time.monotonic() < until:
        time.sleep(0.05)
        told = " ".join(str(one.desc) for one in job.status().progress_data or ())
    app.runtime.queue.leave(turn)
    assert "1 job is before yours" in told
    assert job.result(timeout=60)


def test_a_job_that_nobody_listens_to_ends(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "UNHEARD_SECONDS", 0.5)
    body = {"data": ["the snow and the sun", 0, 200, 4]}
    assert httpx.post(f"{app.url}gradio_api/call/generate", json=body).status_code == 200
    Client(app.url, verbose=False).predict("a dog on the left", 0, 2, 4, api_name="/generate")
    calls = [name for name, _ in app.model.calls]
    assert 12 < calls.count("draw the snow and the sun") < 150
    assert calls.index("draw a dog on the left") > calls.index("draw the snow and the sun")


def test_a_link_whose_prompt_cannot_be_drawn_is_told_at_once(app: App) -> None:
    def opened(query: dict[str, str], session: str) -> list[Any]:
        visitor = Visitor(app, session)
        body = {"fn_index": visitor.function("load")._id, "session_hash": session, "data": []}
        httpx.post(f"{app.url}gradio_api/queue/join", params=query, json=body)
        return [data for message, data in visitor.results() if message == "process_completed"][-1]["data"]

    for prompt, says in (("a zzz on the grass", "zzz"), ("...", "in a few words"), ("a cat " * 200, "at most 500")):
        status = opened({"prompt": prompt}, "link" + says[:3].strip())[9]
        assert "This link cannot be restored" in status
        assert says in status
    visitor = Visitor(app)  # the model was not there yet when the page was opened
    ticket, status = visitor.run("begin_restored", "a zzz", 0, 5, 4)["data"]
    assert ticket == 0
    assert "zzz" in status
    deep = opened({"prompt": "a cat", "edits": "[" * 5000}, "deep")
    assert "Restoring the picture of this link" in deep[9]  # its edits are told by the tab


def test_deep_edits_in_a_link_are_a_mistake_like_any_other(app: App) -> None:
    from core.ui.interventions.request import requests_of

    for text in ("[" * 5000, "[" * 50_000, '{"a":' * 5000):
        with pytest.raises(ValueError, match="edits cannot be read"):
            requests_of(text, app.runtime.spec, 25)


# --- hosts and headers -----------------------------------------------------------------------------------------------


def test_browsers_are_told_what_the_page_may_do(app: App) -> None:
    for path in ("", "config", "gradio_api/info", "nowhere"):
        headers = httpx.get(app.url + path).headers
        assert headers["x-content-type-options"] == "nosniff"
        policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
        assert policy["default-src"] == "'self'"
        assert policy["object-src"] == "'none'"
        assert "http" not in headers["content-security-policy"]  # no other host


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("127.0.0.1:1", 200),
        ("[::1]:7860", 200),
        ("evil.example", 421),
        ("127.0.0.1.evil.example", 421),
        ("[::1", 421),
    ],
)
def test_only_this_computers_own_names_are_answered(app: App, host: str, status: int) -> None:
    assert httpx.get(app.url + "config", headers={"Host": host}).status_code == status


def test_large_bodies_are_refused_before_they_are_read(app: App) -> None:
    body = b'{"data": ["' + b"cat " * 2_000_000 + b'"]}'
    assert httpx.post(f"{app.url}gradio_api/call/concepts", content=body, timeout=60).status_code == 413
    pieces: Iterator[bytes] = iter([b'{"data": [', b'"cat"]}'])
    assert httpx.post(f"{app.url}gradio_api/call/concepts", content=pieces, timeout=60).status_code == 413


@pytest.mark.parametrize(
    ("host", "alone"),
    [
        ("127.0.0.1", True),
        ("localhost", True),
        ("::1", True),
        ("0.0.0.0", False),
        ("192.168.0.7", False),
        ("me.example", False),
    ],
)
def test_what_is_reached_from_this_computer_alone(host: str, alone: bool) -> None:
    assert is_loopback(host) is alone
