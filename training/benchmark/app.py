"""How long `python app.py` takes to serve its page, load its model and generate its first image, compared with
importing its libraries alone.

The app is started as a user would start it, in its own process, which is always terminated.
"""

import logging
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple
from urllib.request import urlopen

from PIL import Image

from training.benchmark.benchmark import Benchmark
from training.common.report import ROOT, Figure, Table, timed

log = logging.getLogger(__name__)

PAGE_TARGET, IMAGE_TARGET = 5.0, 20.0
"""Seconds."""
TITLE = "Interpretable Diffusion"
"""Text on the page that a placeholder of Gradio's would not contain."""
PROMPT = "a cat on the grass"
IMPORTS = {
    "gradio": "import gradio",
    "torch and diffusers": "import torch; from diffusers import StableDiffusionPipeline",
}
"""Imports needed before the page and before the model. `import diffusers` alone is lazy."""
_PATIENCE = 180.0
"""Seconds after which a start counts as failed."""


class Start(NamedTuple):
    """Seconds since the command."""

    page: float
    """Until the page was served."""
    model: float | None
    """Until the app logged that the model is ready; None if it did not."""
    image: float
    """Until a client that requested an image as soon as the page was served received it."""


def measure(model: str, n: int) -> Table:
    """`n` starts of the app, each after importing what it needs in processes of their own."""
    floors: dict[str, list[float]] = {name: [] for name in IMPORTS}
    starts: list[Start] = []
    for i in range(n):
        for name, statement in IMPORTS.items():
            floors[name] += timed(partial(subprocess.run, [sys.executable, "-c", statement], check=True), 1)
        starts.append(start(model))
        log.info("app: start %d of %d: %s", i + 1, n, starts[-1])
    reference = {name: f"import of {name}: {Figure(name, seconds).median:.1f} s" for name, seconds in floors.items()}
    figures = [
        Figure("page served, s", [s.page for s in starts], PAGE_TARGET, reference["gradio"]),
        Figure(
            "model ready, s", [s.model for s in starts if s.model is not None], None, reference["torch and diffusers"]
        ),
        Figure("first image, s", [s.image for s in starts], IMAGE_TARGET, reference["torch and diffusers"]),
    ]
    notes = [
        f"{n} starts of `python app.py`, seconds since the command. The imports were timed before each start, so that "
        "files are cached for both.",
        "The first image is requested through the page's queue (`/generate`) as soon as the page is served.",
    ]
    return Table("app", "Start of the app", [figure.row() for figure in figures if figure.values], notes)


def start(model: str) -> Start:
    """Start the app, wait for the page, the model and an image, and terminate it."""
    # Imported before the clock runs, as a browser would be open already.
    from gradio_client import Client  # type: ignore[import-untyped]

    logging.getLogger("httpx").setLevel(logging.WARNING)
    with _app(model) as app:
        app.wait_for_page()
        page = app.seconds
        image, _ = Client(app.url, verbose=False).predict(prompt=PROMPT, api_name="/generate")
        Image.open(image["path"] if isinstance(image, dict) else image).verify()
        return Start(page, app.logged_at("is ready after"), app.seconds)


class App:
    """The running app and its log."""

    def __init__(self, process: "subprocess.Popen[str]", url: str) -> None:
        self.url = url
        self._process, self._started = process, time.monotonic()
        self._lines: list[tuple[float, str]] = []
        threading.Thread(target=self._listen, daemon=True).start()

    @property
    def seconds(self) -> float:
        """Seconds since it was started."""
        return time.monotonic() - self._started

    def logged_at(self, text: str) -> float | None:
        """Seconds until it logged a line with `text`; None if it has not."""
        return next((when for when, line in list(self._lines) if text in line), None)

    def wait_for_page(self) -> None:
        """Request the page until it is served.

        Raises:
            RuntimeError: The app terminated, or took too long.
        """
        while self.seconds < _PATIENCE and self._process.poll() is None:
            with suppress(OSError, HTTPException), urlopen(self.url, timeout=10) as answer:
                if answer.status == 200 and TITLE in answer.read().decode():
                    return
            time.sleep(0.02)
        tail = "\n".join(line for _, line in self._lines[-20:])
        raise RuntimeError(f"The app served no page within {self.seconds:.0f} s. Its last log lines:\n{tail}")

    def _listen(self) -> None:
        for line in self._process.stderr or ():
            self._lines.append((self.seconds, line.rstrip()))


@contextmanager
def _app(model: str) -> Iterator["App"]:
    script = ROOT / "app.py"
    if not script.exists():
        raise RuntimeError(f"There is no {script}: the benchmark `app` needs a checkout.")
    with serve([sys.executable, str(script), "--model", model], ROOT) as app:
        yield app


@contextmanager
def serve(command: Sequence[str], folder: Path, env: Mapping[str, str] | None = None) -> Iterator["App"]:
    """Start the app by a command in a folder, on a free port, and terminate it at the end.

    `env` is its whole environment, by default that of this process.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # A plain kill of the benchmark would leave the app running.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        process = subprocess.Popen(
            [*command, "--port", str(port)],
            cwd=folder,
            env=env,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            encoding="utf-8",
        )
        try:
            yield App(process, f"http://127.0.0.1:{port}/")
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
    finally:
        signal.signal(signal.SIGTERM, before)


BENCHMARK = Benchmark(
    title="Start of the app",
    description=__doc__,
    settings=3,
    quick=1,
    measure=lambda run, n: [measure(run.model_name, n)],
)
