"""Model work in another process, as on a Space whose GPU is lent for one request."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.ui import zero_gpu as lent
from core.ui.jobs import Drawing, JobError, draw, measure
from core.ui.look.scene import Scene
from core.ui.look.theme import launch_options
from core.ui.page import build_demo
from core.ui.runtime import Runtime
from tests.core.ui.conftest import EXAMPLE, App, Visitor
from tests.fakes.engine import FakeEngine
from tests.fakes.spaces import FakeSpaces

PROMPT = "a cat on the grass"


@pytest.fixture
def spaces(monkeypatch: pytest.MonkeyPatch) -> FakeSpaces:
    fake = FakeSpaces()
    monkeypatch.setitem(sys.modules, "spaces", fake)
    monkeypatch.setenv("SPACES_ZERO_GPU", "true")
    return fake


@pytest.fixture
def runtime(spaces: FakeSpaces, model_folder: Path) -> Runtime:
    del spaces
    runtime = Runtime(str(model_folder))
    runtime.enable_zero_gpu()
    assert runtime.ready.is_set()
    assert runtime.error is None
    return runtime


@pytest.fixture
def direct(runtime: Runtime) -> Runtime:
    """The same model without a gpu_runner."""
    other = Runtime(runtime.name, engine=__import__("core"))
    other._model = runtime.model
    other.ready.set()
    return other


def scene_of(runtime: Runtime, steps: int = 3) -> Scene:
    *previews, scene = draw(runtime, None, PROMPT, 1, steps, 4.0)
    assert all(isinstance(item, Drawing) for item in previews)
    assert isinstance(scene, Scene)
    return scene


def test_a_picture_and_its_bits_are_made_elsewhere_and_are_the_same(
    runtime: Runtime, direct: Runtime, spaces: FakeSpaces
) -> None:
    scene = scene_of(runtime)
    *_, bits = measure(runtime, None, scene, "rest", 0.9, ["cat"])
    assert runtime.model.n_unet_calls == 0  # here
    assert spaces.exit_codes == [0, 0]
    expected = scene_of(direct)
    assert runtime.model.n_unet_calls == 3
    difference = np.asarray(scene.image, np.int64) - np.asarray(expected.image)
    assert np.abs(difference).max() <= 1  # one thread there, perhaps more here
    assert len(scene.frames) == len(expected.frames) == 3
    *_, here = measure(direct, None, expected, "rest", 0.9, ["cat"])
    np.testing.assert_allclose(bits.maps, here.maps, rtol=0.01)  # type: ignore[union-attr]


def test_the_gpu_is_asked_for_as_long_as_the_request_takes(runtime: Runtime, spaces: FakeSpaces) -> None:
    scene = scene_of(runtime, 2)
    list(draw(runtime, None, PROMPT, 1, 12, 4.0))
    list(measure(runtime, None, scene, "rest", 0.9, ["cat"]))
    list(measure(runtime, None, scene, "rest", 0.9))
    short, long, one_word, all_words = spaces.durations
    assert lent.OVERHEAD_SECONDS < short < long < one_word <= all_words <= 20


def test_a_measurement_gives_what_it_has_when_its_time_is_up(
    runtime: Runtime, spaces: FakeSpaces, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = scene_of(runtime)
    monkeypatch.setattr(lent, "MOST_SECONDS", 0.0)
    *_, bits = measure(runtime, None, scene, "rest", 1e-6, ["cat"])
    assert spaces.durations[-1] == 0
    assert (bits.stopped, bits.n_replicates) == ("budget", 2)  # type: ignore[union-attr]


def test_a_cancelled_job_ends_in_the_other_process_too(runtime: Runtime, spaces: FakeSpaces) -> None:
    ticket = runtime.tickets.issue("somebody")
    work = draw(runtime, ticket, PROMPT, 0, 200, 4.0)
    next(work)
    runtime.tickets.cancel("somebody")
    assert list(work) == []
    assert spaces.exit_codes == [0]
    assert spaces.n_items.value < 100


def test_errors_keep_their_words(runtime: Runtime, spaces: FakeSpaces) -> None:
    with pytest.raises(ValueError, match=r"does not know 'whalle' \(try whale"):
        list(draw(runtime, None, "a whalle", 0, 2, 4.0))
    spaces.quota = False
    with pytest.raises(JobError, match=r"exceeded your free ZeroGPU quota.*examples need none"):
        list(draw(runtime, None, PROMPT, 0, 2, 4.0))


def _unfit(_: Runtime) -> Iterator[Any]:
    yield lambda: None


def test_what_cannot_be_sent_is_an_error(runtime: Runtime) -> None:
    with pytest.raises(JobError, match=r"PicklingError|AttributeError"):
        list(runtime.run(1, _unfit))


def test_a_small_model_needs_nobodys_gpu(spaces: FakeSpaces) -> None:
    runtime = Runtime(engine=FakeEngine())
    runtime.enable_zero_gpu()
    assert runtime.device == "cpu"
    assert isinstance(scene_of(runtime), Scene)
    assert spaces.durations == []


def test_nothing_is_lent_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPACES_ZERO_GPU", raising=False)
    runtime = Runtime()
    runtime.enable_zero_gpu()
    assert not runtime.ready.is_set()


def test_a_visitor_without_quota_sees_the_examples_and_is_told_why_no_more(
    spaces: FakeSpaces, examples_dir: Path
) -> None:
    runtime = Runtime("large", engine=FakeEngine(), examples_dir=examples_dir)
    runtime.enable_zero_gpu()
    demo = build_demo(runtime)
    _, url, _ = demo.launch(prevent_thread_lock=True, quiet=True, **launch_options())
    try:
        visitor = Visitor(App(demo, runtime, url))
        assert 'data-word="cat"' in str(demo.get_config_file())  # the first example is on the page as it opens
        link = [EXAMPLE[name] for name in ("prompt", "seed", "steps", "guidance")]
        spaces.quota = False
        ticket = visitor.run("begin_draw", *link)["data"][0]
        _, _, status = visitor.run("draw", ticket, *link, None)["data"]
        assert "exceeded your free ZeroGPU quota" in status
        assert len(spaces.durations) == 1  # of that request alone
        spaces.quota = True
        ticket = visitor.run("begin_draw", *link)["data"][0]
        stage, _, status = visitor.run("draw", ticket, *link, None)["data"]
        assert stage.count("<button") == EXAMPLE["steps"]
    finally:
        demo.close()
