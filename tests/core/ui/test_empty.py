"""What the tabs of a model without concepts show: why, and the lines that make some."""

from collections.abc import Iterator
from html import unescape

import pytest

from core.ui.backend.dictionary import first_lines, no_concepts_html
from core.ui.backend.runtime import Runtime
from core.ui.look.theme import launch_options
from core.ui.page import build_demo
from tests.core.ui.conftest import App, Visitor
from tests.fakes.engine import FakeEngine

NAME = "my models/<b>sd"


@pytest.fixture
def loading_app() -> Iterator[App]:
    """A page whose model is still being loaded."""
    runtime = Runtime(NAME, engine=FakeEngine())
    demo = build_demo(runtime)
    _, url, _ = demo.launch(prevent_thread_lock=True, quiet=True, **launch_options())
    yield App(demo, runtime, url)
    demo.close()


def test_the_three_tabs_say_how_to_make_concepts_once_the_model_is_there(loading_app: App) -> None:
    visitor = Visitor(loading_app)
    waiting = visitor.run("tick", "")["data"]
    assert len(waiting) == 6
    assert all("python -m training" not in str(value) for value in waiting)

    loading_app.runtime.start()
    assert loading_app.runtime.ready.wait(20)
    panels = visitor.run("tick", "")["data"][3:]
    assert len(panels) == 3
    for panel, room in zip(panels, ("id-active empty", "id-layout empty", "id-iv empty"), strict=True):
        assert room in panel
        assert 'class="id-button id-copy"' in panel
        copied = unescape(panel.split("<pre")[1].partition(">")[2].split("</pre>")[0])
        assert tuple(copied.split("\n")) == first_lines(NAME)
        assert "<b>sd" not in panel  # the name is text
    found = visitor.run("find_concepts", event={"word": "cat"})["data"][1]
    assert "concepts for my models/&lt;b&gt;sd. Make them" in found


def test_with_concepts_nothing_is_said(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app.runtime, "_dictionary", object())
    assert all("python -m training" not in str(value) for value in Visitor(app).run("tick", "")["data"])


def test_a_model_that_failed_is_not_told_to_train() -> None:
    runtime = Runtime(NAME, engine=FakeEngine(fails="no such folder"))
    runtime._load()
    from core.ui.concepts.tab import concepts_html
    from core.ui.interventions.tab import why_empty_html
    from core.ui.layout.tab import layout_html

    for panel in (concepts_html(runtime, None, None), layout_html(runtime, None, None), why_empty_html(runtime)):
        assert "could not be loaded" in panel
        assert "<pre" not in panel


def test_the_lines_are_of_the_model_that_was_opened() -> None:
    train, label, page = first_lines("sd-v1-4")
    assert "--model" not in train + label
    assert page == "python app.py --model sd-v1-4"
    assert "16 minutes on an H200" in no_concepts_html("sd-v1-4")
    train, label, page = first_lines("/models/my own")
    assert all(line.count("--model '/models/my own'") == 1 for line in (train, label, page))
    assert "H200" not in no_concepts_html("/models/my own")  # known of one model alone
    assert all("--recipe" not in line for line in first_lines("picturebook"))
