"""Who uses the model when: short jobs pass long ones, nobody starves, and too many are refused."""

import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import core
from core.diffusion.diffuser import Diffuser
from core.information.results import Attribution
from core.job import JobLock
from core.ui.backend import jobs, queue
from core.ui.backend.errors import JobError
from core.ui.backend.jobs import MeasurementProgress, Waiting, generate, measure
from core.ui.backend.queue import MAX_WAITING, MAX_WAITING_PER_SESSION, ModelQueue, Turn, asker
from core.ui.backend.runtime import Runtime
from core.ui.look.scene import Scene
from tests.fakes.engine import FakeEngine


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(queue.time, "monotonic", clock.monotonic)
    return clock


def compute(line: ModelQueue, turn: Turn, clock: Clock, seconds: float) -> bool:
    """Hold the model for so long; whether the job gives way then."""
    assert line.wait(turn, 0)
    clock.now += seconds
    return line.gives_way(turn)


def test_jobs_begin_in_the_order_in_which_they_came() -> None:
    line = ModelQueue()
    first, second, third = line.join(), line.join(), line.join()
    assert not line.wait(second, 0)
    assert line.wait(first, 0)
    assert not line.wait(second, 0)
    line.leave(third)  # no longer wanted
    line.leave(first)
    assert line.wait(second, 0)


def test_a_long_job_gives_way_to_a_new_one_and_goes_on_after_it(clock: Clock) -> None:
    line = ModelQueue()
    long = line.join()
    assert not compute(line, long, clock, 60)  # nobody waits
    short = line.join()
    assert line.gives_way(long)
    assert not line.wait(long, 0)
    assert not compute(line, short, clock, 1)
    line.leave(short)
    assert line.wait(long, 0)


def test_a_job_is_not_interrupted_before_its_first_turn_is_over(clock: Clock) -> None:
    line = ModelQueue()
    first, second = line.join(), line.join()
    assert not compute(line, first, clock, queue.TURN_SECONDS / 2)
    clock.now += queue.TURN_SECONDS
    assert line.gives_way(first)
    assert line.wait(second, 0)


def test_long_jobs_are_finished_one_after_the_other(clock: Clock) -> None:
    """Sharing the time among them would finish all of them late."""
    line = ModelQueue()
    first, second = line.join(), line.join()
    assert compute(line, first, clock, 4)  # for the first turn of the second
    assert compute(line, second, clock, 4)  # back to the first
    assert not compute(line, first, clock, 60)
    assert not line.wait(second, 0)
    line.leave(first)
    assert line.wait(second, 0)


def test_a_long_job_gets_as_much_time_as_the_short_ones_that_pass_it(clock: Clock) -> None:
    line = ModelQueue()
    long, of_short, of_long = line.join(), 0.0, 0.0
    long.used = 10.0
    short = line.join()
    for _ in range(40):
        if line.wait(short, 0):
            clock.now, of_short = clock.now + 2, of_short + 2
            line.leave(short)
            short = line.join()  # there is always another
            continue
        assert line.wait(long, 0)
        gives_way = False
        while not gives_way:
            clock.now, of_long = clock.now + 0.5, of_long + 0.5
            gives_way = line.gives_way(long)
    assert of_short == of_long == 40


def test_the_place_in_the_queue_and_the_expected_wait_are_told(clock: Clock) -> None:
    line = ModelQueue()
    done = line.join()
    compute(line, done, clock, 2)
    line.leave(done)  # two seconds are usual
    first, second, third = line.join(), line.join(), line.join()
    assert line.wait(first, 0)
    assert line.standing(second) == "Waiting for the model: 1 job is before yours · about 2 s"
    assert line.standing(third) == "Waiting for the model: 2 jobs are before yours · about 4 s"
    line.leave(first)
    assert line.standing(second) == "Waiting for the model: yours is next"


def test_a_session_can_have_a_few_jobs_waiting_and_all_together_some_more() -> None:
    line = ModelQueue()
    token = asker.set("one")
    try:
        assert line.wait(line.join(), 0)
        mine = [line.join() for _ in range(MAX_WAITING_PER_SESSION)]
        with pytest.raises(JobError, match=f"{MAX_WAITING_PER_SESSION} of your jobs are waiting"):
            line.join()
        for i in range(MAX_WAITING - MAX_WAITING_PER_SESSION):
            asker.set(f"other {i}")
            line.join()
        with pytest.raises(JobError, match=f"{MAX_WAITING} jobs are waiting for the model. Try again in a minute"):
            line.join()
        line.leave(mine[0])
        line.join()
    finally:
        asker.reset(token)


def test_a_lent_lock_is_taken_back_and_a_closed_job_does_not_free_anothers() -> None:
    lock = JobLock()

    def job() -> Iterator[int]:
        with lock.held():
            yield from range(9)

    first, second = job(), job()
    next(first)
    take_back = lock.lend()
    next(second)  # which would wait for ever if the lock were still held
    first.close()  # type: ignore[attr-defined]
    assert lock.is_held
    second.close()  # type: ignore[attr-defined]
    assert not lock.is_held
    third = job()
    next(third)
    take_back = lock.lend()
    take_back()
    assert lock.is_held
    assert list(third) == list(range(1, 9))
    assert not lock.is_held


@pytest.fixture
def runtime() -> Runtime:
    runtime = Runtime(engine=FakeEngine(delay=0.02), examples_dir=Path("/nowhere"))
    runtime._load()
    return runtime


SCENE = Scene(Image.new("RGB", (64, 64)), "a cat on the sea", 0, 4, 4.0)


def test_a_short_job_passes_a_long_measurement_whose_result_does_not_change(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue, "TURN_SECONDS", 0.05)
    *_, alone = measure(runtime, None, SCENE, "rest", 0.1)
    runtime.model.calls.clear()  # type: ignore[union-attr]
    done: list[str] = []
    waited: list[str] = []

    def long() -> None:
        for item in measure(runtime, None, SCENE, "rest", 0.1):
            if isinstance(item, Waiting):
                waited.append(item.text)
        assert item == alone or str(item) == str(alone)
        done.append("long")

    thread = threading.Thread(target=long)
    thread.start()
    while len(runtime.model.calls) < 5:  # type: ignore[union-attr]
        time.sleep(0.005)
    *_, scene = generate(runtime, None, "a dog", 1, 3, 4.0)
    done.append("short")
    thread.join(60)
    assert done == ["short", "long"]
    assert isinstance(scene, Scene)
    names = [name for name, _ in runtime.model.calls]  # type: ignore[union-attr]
    at = names.index("draw a dog")
    assert names[at : at + 3] == ["draw a dog"] * 3
    assert names.count("measure a cat on the sea") == 16
    assert waited


def test_an_image_that_is_being_drawn_is_not_interrupted(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hooks of a run of the sampler stay in place between its steps."""
    monkeypatch.setattr(queue, "TURN_SECONDS", 0.0)
    with (
        closing(generate(runtime, None, "a cat", 0, 9, 4.0)) as first,
        closing(generate(runtime, None, "a dog", 0, 2, 4.0)) as second,
    ):
        next(first)
        assert isinstance(next(second), Waiting)
        list(first)
        assert [name for name, _ in runtime.model.calls] == ["draw a cat"] * 9  # type: ignore[union-attr]
        assert isinstance(list(second)[-1], Scene)


def test_a_suspended_measurement_that_is_given_up_leaves_the_model_to_others(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue, "TURN_SECONDS", 0.001)
    ticket = runtime.tickets.issue("somebody")
    long = measure(runtime, ticket, SCENE, "rest", 0.1)
    next(long)
    short = generate(runtime, None, "a dog", 0, 5, 4.0)
    next(short)  # lines up
    while not isinstance(next(long), Waiting):
        pass
    while isinstance(next(short), Waiting):
        pass
    runtime.tickets.cancel("somebody")
    assert list(long) == []
    assert runtime.model.lock.is_held  # type: ignore[union-attr]
    assert isinstance(list(short)[-1], Scene)
    assert not runtime.model.lock.is_held  # type: ignore[union-attr]
    assert runtime.queue._jobs == []


def test_a_suspended_measurement_of_a_real_model_is_the_same_to_the_bit(
    model: Diffuser, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue, "TURN_SECONDS", 0.001)
    runtime = Runtime("small", engine=core)
    runtime._model = model
    runtime.ready.set()
    scene = Scene(Image.effect_noise((128, 128), 80).convert("RGB"), "a cat on the grass", 0, 3, 4.0)
    *_, alone = measure(runtime, None, scene, "rest", 0.9, ["cat"])
    *_, drawn_alone = generate(runtime, None, "a dog on the sea", 1, 3, 4.0)
    long, image = measure(runtime, None, scene, "rest", 0.9, ["cat"]), None
    for item in long:
        if image is None and isinstance(item, MeasurementProgress):
            short = generate(runtime, None, "a dog on the sea", 1, 3, 4.0)
            next(short)  # lines up
            while not isinstance(next(long), Waiting):
                pass
            image = list(short)[-1].image  # type: ignore[union-attr]
    assert isinstance(item, Attribution)
    assert image is not None
    assert image.tobytes() == drawn_alone.image.tobytes()  # type: ignore[union-attr]
    assert np.array_equal(item.maps, alone.maps)  # type: ignore[union-attr]
    assert np.array_equal(item.timeline.bits, alone.timeline.bits)  # type: ignore[union-attr]
    assert item.n_evals == alone.n_evals  # type: ignore[union-attr]


def test_a_request_has_a_bound_on_its_evaluations(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def attribute_iter(*_: Any, **options: Any) -> Iterator[Any]:
        asked.update(options)
        return iter(())

    monkeypatch.setattr(runtime.engine, "attribute_iter", attribute_iter)
    list(measure(runtime, None, SCENE, "rest", 0.01))
    assert asked["max_evals"] == jobs.MAX_EVALS
