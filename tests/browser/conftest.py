"""`python app.py` as visitors start it, and a real browser that opens it."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from core.spec import BUILT_IN

ROOT = Path(__file__).parents[2]
CHROMIUM = Path(os.environ.get("CHROMIUM", "/usr/bin/chromium"))
FLAGS = (  # noqa: SIM905 - as one would type them
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()


@pytest.fixture(scope="session")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the app writes."""
    return tmp_path_factory.mktemp("app") / "log.txt"


@pytest.fixture(scope="session")
def url(log: Path) -> Iterator[str]:
    """Address of the app with the embedded model, or with the folder that PAGE_TEST_MODEL names."""
    model = os.environ.get("PAGE_TEST_MODEL", "picturebook")
    if model == "picturebook" and not (Path(BUILT_IN["picturebook"].source) / "model_index.json").is_file():
        pytest.skip("the embedded model is not there yet")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "app.py", "--model", model, "--port", str(port), "--device", "cpu"]
    address = f"http://127.0.0.1:{port}/"
    with log.open("wb") as output:
        app = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)
    try:
        wait_for(address, app)
        yield address
    finally:
        app.terminate()
        app.wait(20)
        sys.stderr.write(log.read_text(encoding="utf-8"))


def wait_for(address: str, app: "subprocess.Popen[bytes]", seconds: float = 90) -> None:
    """Until the page is served."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        assert app.poll() is None, "app.py ended; its message is above"
        try:
            urllib.request.urlopen(address, timeout=5)
        except OSError:
            time.sleep(0.2)
        else:
            return
    raise AssertionError(f"no page after {seconds} s")


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    if not CHROMIUM.exists():
        pytest.fail(f"There is no browser at {CHROMIUM}. Install Debian's chromium, or set CHROMIUM to one's path.")
    with sync_playwright() as playwright:
        expect.set_options(timeout=60_000)  # for a busy machine
        chromium = playwright.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser: Browser, url: str) -> Iterator[Any]:
    """Opens the page at a width. Requests of other hosts, errors and breaches of the content policy fail the test."""
    pages: list[Page] = []
    problems: list[str] = []

    def open_at(width: int = 1400, height: int = 900, query: str = "", scheme: Any = "light") -> Page:
        page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
        page.set_default_timeout(90_000)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda said: problems.append(said.text) if "Content Security Policy" in said.text else None)
        page.on("request", lambda request: problems.append(request.url) if other_host(request.url) else None)
        page.goto(url + query)
        page.wait_for_selector("#id-prompt textarea")
        pages.append(page)
        return page

    def other_host(address: str) -> bool:
        return not address.startswith((url, "data:", "blob:"))

    yield open_at
    for page in pages:
        page.close()
    assert problems == []
