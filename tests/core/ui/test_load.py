"""Many visitors at once, for minutes: no answer is another's, nobody is forgotten, and memory stays level.

The real page, API and queue, with the stand-in for the engine, whose images and numbers are known for each request.
`LOAD_TEST_SECONDS` sets the length; 360 is a thorough one.
"""

import os
import random
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gradio_client import Client, handle_file
from PIL import Image

from core.ui.backend import queue
from tests.core.ui.conftest import App, Visitor
from tests.fakes.engine import KNOWN, attribution, paint

SECONDS = float(os.environ.get("LOAD_TEST_SECONDS", "20"))
N_CLIENTS, N_PAGES = 20, 2
THINGS = ("cat", "dog", "crab", "car", "tree", "sun")
PLACES = ("grass", "sea", "snow")


@dataclass
class Call:
    """One answered request."""

    who: int
    what: str
    seconds: float
    n_before: int
    """Jobs that were waiting when it was asked."""
    problem: str = ""


@dataclass
class Record:
    """What all visitors note."""

    until: float
    calls: list[Call] = field(default_factory=list)


def resident() -> float:
    """MB of this process, in which the server runs."""
    with open("/proc/self/status", encoding="utf-8") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmRSS"))


def client_of(app: App, folder: Path) -> Client:
    return Client(app.url, verbose=False, download_files=str(folder), httpx_kwargs={"timeout": 120})


def pixels(image: Image.Image) -> Any:
    return np.asarray(image.convert("RGB"))


def check_api(client: Client, who: int, k: int, folder: Path) -> tuple[str, str]:
    """Ask one thing; what it was, and what is wrong with the answer."""
    thing, place = THINGS[who % len(THINGS)], PLACES[who % len(PLACES)]
    prompt, seed, steps = f"a {thing} on the {place}", 100 * who + k % 3, 3 + who % 5
    what = ("generate", "attribute", "likelihood", "rank_captions")[(who + k) % 4]
    if what == "generate":
        path, settings = client.predict(prompt, seed, steps, 4, api_name="/generate")
        with Image.open(path) as image:
            right = np.array_equal(pixels(image), pixels(paint(prompt, seed)))
        return what, "" if right and (settings["prompt"], settings["seed"]) == (
            prompt,
            seed,
        ) else f"not {prompt} {seed}"
    file = handle_file(folder / f"{who}.png")
    if what == "attribute":
        result = client.predict(file, prompt, thing, "rest", 0.2, seed, api_name="/attribute")
        right = result["words"] == [thing] and result["seed"] == seed and result["prompt"] == prompt
        expected = attribution(prompt, (thing,), "rest", 0.2, seed, 25, 8).bits[0]
        return what, "" if right and abs(result["bits"][0] - expected) < 1e-3 else f"not the bits of {thing}"
    if what == "likelihood":
        result = client.predict(file, prompt, 0.1, seed, api_name="/likelihood")
        return what, "" if (result["gain"], result["seed"]) == (len(prompt), seed) else f"not the gain of {prompt}"
    captions = [prompt, f"the {thing}"]
    result = client.predict(file, "\n".join(captions), 0.8, seed, api_name="/rank_captions")
    return what, "" if result["captions"] == captions and result["seed"] == seed else f"not the captions of {who}"


def check_page(visitor: Visitor, who: int, k: int) -> tuple[str, str]:
    """Generate on an open page and have the words measured."""
    settings = (f"the {THINGS[(who + k) % len(THINGS)]} in the {PLACES[k % len(PLACES)]}", 10 * who + k % 4, 4, 4)
    ticket, _ = visitor.run("begin_generate", *settings)["data"]
    viewer, _, _ = visitor.run("generate_image", ticket, *settings, None)["data"]
    panel, _ = visitor.run("measure", ticket, None, "rest", 0.2)["data"]
    right = f'alt="{settings[0]}"' in viewer and f"seed={settings[1]}&amp;steps=4" in panel
    return "page", "" if right else f"not the page of {settings}"


def visit(record: Record, app: App, who: int, client: Client | None, folder: Path) -> None:
    """Ask one thing after the other: over the API, or without a client as an open page does."""
    rng = random.Random(who)
    visitor, k = Visitor(app), 0
    while time.monotonic() < record.until:
        started, n_before = time.monotonic(), len(app.runtime.queue._jobs)
        try:
            what, problem = check_api(client, who, k, folder) if client else check_page(visitor, who, k)
        except Exception as error:
            what, problem = "failed", f"{type(error).__name__}: {error}"
        record.calls.append(Call(who, what, time.monotonic() - started, n_before, problem))
        k += 1
        time.sleep(rng.random() * 0.05)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_many_visitors_at_once(app: App, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue, "TURN_SECONDS", 0.1)
    assert set(THINGS) | set(PLACES) <= set(KNOWN)
    for who in range(N_CLIENTS):
        Image.new("RGB", (80, 80), (10 * who, 90, 90)).save(tmp_path / f"{who}.png")
    clients = [client_of(app, tmp_path / "got") for _ in range(N_CLIENTS)]
    record = Record(time.monotonic() + SECONDS)
    visitors = [
        threading.Thread(target=visit, args=(record, app, who, client, tmp_path), daemon=True)
        for who, client in enumerate([*clients, *[None] * N_PAGES])
    ]
    for visitor in visitors:
        visitor.start()
    levels: list[float] = []
    while time.monotonic() < record.until:
        time.sleep(SECONDS / 60)
        levels.append(resident())
    for visitor in visitors:
        visitor.join(300)
    assert not any(visitor.is_alive() for visitor in visitors), "somebody is still waiting"
    assert [call for call in record.calls if call.problem] == []
    assert {call.who for call in record.calls} == set(range(N_CLIENTS + N_PAGES))
    # Nobody starves: no answer takes much longer than all jobs that can be in the queue at once, one after the other.
    took = sorted(call.seconds for call in record.calls)
    usual = took[len(took) // 2]
    print(
        f"{len(took)} answers, median {usual:.1f} s, longest {took[-1]:.1f} s, MB {levels[0]:.0f} to {levels[-1]:.0f}"
    )
    assert took[-1] < 10 * usual + 10
    third = levels[-len(levels) // 3 :]
    assert max(third) - min(third) < 0.1 * max(third)
    assert app.runtime.queue._jobs == []
    assert not app.model.lock.is_held
