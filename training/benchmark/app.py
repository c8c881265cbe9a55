"""How soon `python app.py` serves its page, has its model, and draws its first picture, beside what imports alone take.

The app is started as a user would, in a process of its own, and always ended.
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

from training.common.report import ROOT, Figure, Table, timed

log = logging.getLogger(__name__)

PAGE_TARGET, IMAGE_TARGET = 5.0, 20.0
"""Seconds."""
TITLE = "Interpretable Diffusion"
"""What the page says, and a placeholder of Gradio's would not."""
PROMPT = "a cat on the grass"
IMPORTS = {
    "gradio": "import gradio",
    "torch and diffusers": "import torch; from diffusers import StableDiffusionPipeline",
}
"""What has to be imported before the page, and before the model; diffusers alone imports nothing until it is used."""
_PATIENCE = 180.0
"""Seconds before a start counts as failed."""


class Start(NamedTuple):
    """Seconds since the command."""

    page: float
    """Until the page was served."""
    model: float | None
    """Until the app said that the model is ready; None if it did not say so."""
    image: float
    """Until a program that asked for a picture, as soon as there was a page, had it."""


def part(model: str, n: int) -> Table:
    """The benchmark's part `app`: `n` starts, each after bare imports of what it needs."""
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
        Figure("first picture, s", [s.image for s in starts], IMAGE_TARGET, reference["torch and diffusers"]),
    ]
    notes = [
        f"{n} starts of `python app.py`, seconds since the command. The imports were timed in the same run, before "
        "each start, so that files are warm for both.",
        "The first picture is asked for through the page's own queue (`/generate`) as soon as the page is served.",
    ]
    return Table("app", "Start of the app", [figure.row() for figure in figures if figure.values], notes)


def start(model: str) -> Start:
    """Start the app, wait for the page, the model and a picture, and end it."""
    # Imported before the clock runs: a browser is open already, too.
    from gradio_client import Client  # type: ignore[import-untyped]

    logging.getLogger("httpx").setLevel(logging.WARNING)
    with _app(model) as app:
        app.wait_for_page()
        page = app.seconds
        image, _ = Client(app.url, verbose=False).predict(prompt=PROMPT, api_name="/generate")
        Image.open(image["path"] if isinstance(image, dict) else image).verify()
        return Start(page, app.said("is ready after"), app.seconds)


class App:
    """The running app and what it has said."""

    def __init__(self, process: "subprocess.Popen[str]", url: str) -> None:
        self.url = url
        self._process, self._started = process, time.monotonic()
        self._lines: list[tuple[float, str]] = []
        threading.Thread(target=self._listen, daemon=True).start()

    @property
    def seconds(self) -> float:
        """Since it was started."""
        return time.monotonic() - self._started

    def said(self, text: str) -> float | None:
        """When it logged a line with `text`."""
        return next((when for when, line in list(self._lines) if text in line), None)

    def wait_for_page(self) -> None:
        """Ask for the page until it is there.

        Raises:
            RuntimeError: The app ended, or took too long.
        """
        while self.seconds < _PATIENCE and self._process.poll() is None:
            with suppress(OSError, HTTPException), urlopen(self.url, timeout=10) as answer:
                if answer.status == 200 and TITLE in answer.read().decode():
                    return
            time.sleep(0.02)
        tail = "\n".join(line for _, line in self._lines[-20:])
        raise RuntimeError(f"The app served no page within {self.seconds:.0f} s. The last that it said:\n{tail}")

    def _listen(self) -> None:
        for line in self._process.stderr or ():
            self._lines.append((self.seconds, line.rstrip()))


@contextmanager
def _app(model: str) -> Iterator["App"]:
    script = ROOT / "app.py"
    if not script.exists():
        raise RuntimeError(f"There is no {script}: the part `app` needs a checkout.")
    with serve([sys.executable, str(script), "--model", model], ROOT) as app:
        yield app


@contextmanager
def serve(command: Sequence[str], folder: Path, env: Mapping[str, str] | None = None) -> Iterator["App"]:
    """The app that a command starts in a folder, on a port of its own; ended in any case.

    `env` is its whole environment, by default this process's.
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
