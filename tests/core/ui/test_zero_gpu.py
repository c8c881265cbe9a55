"""Model work in another process, as on a ZeroGPU Space."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.ui.backend import zero_gpu
from core.ui.backend.errors import JobError
from core.ui.backend.jobs import GenerationProgress, generate, measure
from core.ui.backend.runtime import Runtime
from core.ui.look.scene import Scene
from core.ui.look.theme import launch_options
from core.ui.page import build_demo
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
    """The same model in this process."""
    other = Runtime(runtime.name, engine=__import__("core"))
    other._model = runtime.model
    other.ready.set()
    return other


def scene_of(runtime: Runtime, steps: int = 3) -> Scene:
    *previews, scene = generate(runtime, None, PROMPT, 1, steps, 4.0)
    assert all(isinstance(item, GenerationProgress) for item in previews)
    assert isinstance(scene, Scene)
    return scene


def test_work_in_the_other_process_gives_the_same_result(runtime: Runtime, direct: Runtime, spaces: FakeSpaces) -> None:
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


def test_the_gpu_is_requested_for_as_long_as_the_work_takes(runtime: Runtime, spaces: FakeSpaces) -> None:
    scene = scene_of(runtime, 2)
    list(generate(runtime, None, PROMPT, 1, 12, 4.0))
    list(measure(runtime, None, scene, "rest", 0.9, ["cat"]))
    list(measure(runtime, None, scene, "rest", 0.9))
    short, long, one_word, all_words = spaces.durations
    assert zero_gpu.OVERHEAD_SECONDS < short < long < one_word <= all_words <= 20


def test_a_measurement_returns_its_partial_result_at_the_deadline(
    runtime: Runtime, spaces: FakeSpaces, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = scene_of(runtime)
    monkeypatch.setattr(zero_gpu, "MAX_SECONDS", 0.0)
    *_, bits = measure(runtime, None, scene, "rest", 1e-6, ["cat"])
    assert spaces.durations[-1] == 0
    assert (bits.stopped, bits.n_replicates) == ("budget", 4)  # type: ignore[union-attr]


def test_a_cancelled_job_ends_in_the_other_process_too(runtime: Runtime, spaces: FakeSpaces) -> None:
    ticket = runtime.tickets.issue("somebody")
    work = generate(runtime, ticket, PROMPT, 0, 200, 4.0)
    next(work)
    runtime.tickets.cancel("somebody")
    assert list(work) == []
    assert spaces.exit_codes == [0]
    assert spaces.n_items.value < 100


def test_errors_keep_their_message(runtime: Runtime, spaces: FakeSpaces) -> None:
    with pytest.raises(ValueError, match=r"does not know 'whalle' \(try whale"):
        list(generate(runtime, None, "a whalle", 0, 2, 4.0))
    spaces.quota = False
    with pytest.raises(JobError, match=r"exceeded your free ZeroGPU quota.*examples need none"):
        list(generate(runtime, None, PROMPT, 0, 2, 4.0))


def _unpicklable(_: Runtime) -> Iterator[Any]:
    yield lambda: None


def test_an_item_that_cannot_be_pickled_is_an_error(runtime: Runtime) -> None:
    with pytest.raises(JobError, match=r"PicklingError|AttributeError"):
        list(runtime.run(1, _unpicklable))


def test_a_small_model_runs_on_the_cpu(spaces: FakeSpaces) -> None:
    runtime = Runtime(engine=FakeEngine())
    runtime.enable_zero_gpu()
    assert runtime.device == "cpu"
    assert isinstance(scene_of(runtime), Scene)
    assert spaces.durations == []


def test_nothing_happens_outside_a_space(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPACES_ZERO_GPU", raising=False)
    runtime = Runtime()
    runtime.enable_zero_gpu()
    assert not runtime.ready.is_set()


def test_a_visitor_without_quota_sees_the_examples_and_the_reason(spaces: FakeSpaces, examples_dir: Path) -> None:
    runtime = Runtime("large", engine=FakeEngine(), examples_dir=examples_dir)
    runtime.enable_zero_gpu()
    demo = build_demo(runtime)
    _, url, _ = demo.launch(prevent_thread_lock=True, quiet=True, **launch_options())
    try:
        visitor = Visitor(App(demo, runtime, url))
        assert 'data-word="cat"' in str(demo.get_config_file())  # the first example is on the page as it opens
        link = [EXAMPLE[name] for name in ("prompt", "seed", "steps", "guidance")]
        spaces.quota = False
        ticket = visitor.run("begin_generate", *link)["data"][0]
        _, _, status = visitor.run("generate_image", ticket, *link, None)["data"]
        assert "exceeded your free ZeroGPU quota" in status
        assert len(spaces.durations) == 1  # of that request alone
        spaces.quota = True
        ticket = visitor.run("begin_generate", *link)["data"][0]
        viewer, _, status = visitor.run("generate_image", ticket, *link, None)["data"]
        assert viewer.count('class="id-frame" data-step') == EXAMPLE["steps"]
    finally:
        demo.close()
