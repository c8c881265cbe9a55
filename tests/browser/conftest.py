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
READY = ".id-badge.ready"
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


class Opener:
    """Opens pages, and collects what is wrong with them: requests to other hosts, errors of scripts, and breaches of
    the content policy.
    """

    def __init__(self, browser: Browser, url: str) -> None:
        self.browser, self.url = browser, url
        self.pages: list[Page] = []
        self.problems: list[str] = []

    def __call__(self, width: int = 1400, height: int = 900, query: str = "", scheme: Any = "light") -> Page:
        page = self.browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
        page.set_default_timeout(90_000)
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.on("console", lambda said: self._breach(said.text))
        page.on("request", lambda request: self.problems.append(request.url) if self.elsewhere(request.url) else None)
        page.goto(self.url + query)
        page.wait_for_selector("#id-prompt textarea")
        self.pages.append(page)
        return page

    def _breach(self, said: str) -> None:
        if "Content Security Policy" in said:
            self.problems.append(said)

    def elsewhere(self, address: str) -> bool:
        return not address.startswith((self.url, "data:", "blob:"))


@pytest.fixture
def open_page(browser: Browser, url: str) -> Iterator[Opener]:
    """Opens new pages, and fails the test if they request other hosts or raise errors."""
    opener = Opener(browser, url)
    yield opener
    for page in opener.pages:
        page.close()
    assert opener.problems == []


@pytest.fixture(scope="session")
def shared(browser: Browser, url: str) -> tuple[Page, list[str]]:
    """The page that most tests share, since opening one takes seconds, and its problems."""
    opener = Opener(browser, url)
    page = opener()
    page.wait_for_selector(READY)
    return page, opener.problems


@pytest.fixture
def page(shared: tuple[Page, list[str]]) -> Iterator[Page]:
    """The shared page at 1400 pixels without a chosen step. Its image and its tab are those of the last test."""
    page, problems = shared
    page.set_viewport_size({"width": 1400, "height": 900})
    page.evaluate("() => idPage.state.step !== null && idPage.chooseStep(idPage.state.step)")
    yield page
    found, problems[:] = problems[:], []
    assert found == []


def wait_while_it_goes_on(page: Page, condition: str, arg: Any = None) -> None:
    """Until a JavaScript function of `arg` is true, however slow the machine, if the progress goes on meanwhile."""
    text = "[...document.querySelectorAll('.id-status, .id-question-progress')].map((one) => one.textContent).join()"
    met = False
    while not met:
        before = page.evaluate(text)
        page.wait_for_function(f"([before, arg]) => ({condition})(arg) || {text} !== before", arg=[before, arg])
        met = page.evaluate(condition, arg)
