"""The real page, served with a stand-in for the engine, and a client that speaks its protocol."""

import json
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from gradio_client import Client
from PIL import Image

from core.information.stored import save_example
from core.ui.backend.runtime import Runtime
from core.ui.backend.server import LOOPBACK, server_options
from core.ui.look.theme import launch_options
from core.ui.page import build_demo
from tests.fakes.engine import FakeEngine, FakeModel, attribution, paint

HTTP = httpx.Client(verify=False, timeout=60)
"""One for all requests: each new one would read the certificates of all authorities, for pages of this computer."""
EXAMPLE = {"prompt": "a cat on the grass", "seed": 3, "steps": 6, "guidance": 4.0}


@dataclass
class App:
    """A served page."""

    demo: Any
    runtime: Runtime
    url: str

    @property
    def model(self) -> FakeModel:
        model: FakeModel = self.runtime.model
        return model


@dataclass
class Visitor:
    """An open page: sends events as a browser does, by their number, over the queue."""

    app: App
    session: str = field(default_factory=lambda: uuid.uuid4().hex[:10])

    def function(self, name: str) -> Any:
        return next(fn for fn in self.app.demo.fns.values() if fn.name == name)

    def join(self, name: str, *data: Any, event: dict[str, Any] | None = None) -> httpx.Response:
        """Put an event into the queue; `event` is the data that the page's script sends with it."""
        number = self.function(name)._id
        body = {"data": list(data), "fn_index": number, "session_hash": self.session, "event_data": event}
        return HTTP.post(f"{self.app.url}gradio_api/queue/join", json=body, timeout=30)

    def results(self) -> Iterator[tuple[str, Any]]:
        """(message, data) of everything the queue sends to this session until it closes the stream."""
        url = f"{self.app.url}gradio_api/queue/data?session_hash={self.session}"
        with HTTP.stream("GET", url, timeout=60) as stream:
            for line in stream.iter_lines():
                if line.startswith("data:"):
                    message = json.loads(line[5:])
                    if message["msg"] == "close_stream":
                        return
                    yield message["msg"], message.get("output", {})

    def run(self, name: str, *data: Any, event: dict[str, Any] | None = None) -> Any:
        """The final data of one event."""
        assert self.join(name, *data, event=event).status_code == 200
        return [output for message, output in self.results() if message == "process_completed"][-1]


@pytest.fixture(scope="session")
def examples_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("examples")
    image = paint(EXAMPLE["prompt"], EXAMPLE["seed"])
    results = {
        given: attribution(EXAMPLE["prompt"], ("a", "cat", "on", "the", "grass"), given, 0.1, 3, 6, 16, "converged")
        for given in ("rest", "nothing")
    }
    save_example(folder, "cat", image, [image] * 6, EXAMPLE, results)
    return folder


@pytest.fixture(scope="session")
def app(examples_dir: Path) -> Iterator[App]:
    runtime = Runtime(engine=FakeEngine(delay=0.02), examples_dir=examples_dir)
    demo = build_demo(runtime)
    _, url, _ = demo.launch(prevent_thread_lock=True, quiet=True, **launch_options(), **server_options(LOOPBACK))
    runtime.start()
    assert runtime.ready.wait(20)
    yield App(demo, runtime, url)
    demo.close()


@pytest.fixture(scope="session")
def client(app: App) -> Client:
    """A client of the API; making one reads the whole description of the page."""
    return Client(app.url, verbose=False, ssl_verify=False)


@pytest.fixture
def visitor(app: App) -> Visitor:
    return Visitor(app)


@pytest.fixture
def image_file(tmp_path: Path) -> Path:
    path = tmp_path / "upload.png"
    Image.new("RGB", (90, 70), "#c04030").save(path)
    return path
