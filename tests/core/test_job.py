"""Jobs: progress, result, cancelling, closing, and the functions that return a job's result."""

import inspect
import threading
from collections.abc import Generator
from typing import get_args

import pytest

import core
from core.errors import Cancelled
from core.job import Callback, Job, finished


class Work:
    """Counts to n, and notes whether it was cleaned up."""

    def __init__(self, n: int = 3, error_at: int | None = None) -> None:
        self.n, self.error_at, self.is_free, self.n_done = n, error_at, False, 0

    def run(self) -> Generator[int, None, str]:
        try:
            for i in range(self.n):
                if i == self.error_at:
                    raise KeyError(i)
                self.n_done = i + 1
                yield i
            return "done"
        finally:
            self.is_free = True


def count_iter(n: int, *, callback: Callback[int] | None = None) -> Job[int, str]:
    """Count."""
    if n < 0:
        raise ValueError("n is negative")
    return Job(Work(n).run(), callback, lambda progress: f"up to {progress}")


count = finished(count_iter)


def test_iterating_gives_progress_and_last_the_result() -> None:
    work = Work()
    job = Job(work.run())
    assert list(job) == [0, 1, 2, "done"]
    assert work.is_free
    assert list(job) == []
    assert job.result() == "done"


def test_a_result_of_none_is_a_result() -> None:
    def nothing() -> Generator[int, None, None]:
        yield 1

    assert list(Job(nothing())) == [1, None]


def test_the_result_goes_on_from_where_iteration_stopped() -> None:
    job = Job(Work().run())
    assert next(job) == 0
    seen: list[int] = []
    assert job.result(seen.append) == "done"
    assert seen == [1, 2]


def test_a_callback_cancels_with_what_there_is() -> None:
    work = Work()
    job = Job(work.run(), lambda i: i < 1, lambda i: f"up to {i}")
    assert list(job) == [0, "up to 1"]
    assert (work.is_free, work.n_done) == (True, 2)
    with pytest.raises(Cancelled):
        Job(Work().run(), lambda _: False).result()


def test_closing_stops_the_work_and_leaves_no_result() -> None:
    work = Work()
    job = Job(work.run())
    next(job)
    closer = threading.Thread(target=job.close)  # another thread than the one that began
    closer.start()
    closer.join(10)
    assert (work.is_free, work.n_done) == (True, 1)
    assert list(job) == []
    with pytest.raises(Cancelled, match="closed before"):
        job.result()
    job.close()


@pytest.mark.parametrize("in_callback", [True, False])
def test_an_error_frees_the_model_and_ends_the_job(in_callback: bool) -> None:
    def fail(_: int) -> None:
        raise KeyError

    work = Work(error_at=None if in_callback else 1)
    job = Job(work.run(), fail if in_callback else None)
    with pytest.raises(KeyError):
        job.result()
    assert work.is_free
    assert list(job) == []


def test_the_finished_function_has_the_name_and_signature_of_what_it_returns() -> None:
    assert count(2) == "done"
    assert count(2, callback=lambda _: False) == "up to 0"
    with pytest.raises(ValueError, match="negative"):
        count_iter(-1)
    signature = inspect.signature(count)
    assert list(signature.parameters) == ["n", "callback"]
    assert signature.return_annotation is str
    assert (count.__name__, count.__doc__) == ("count", "Count.")


@pytest.mark.parametrize("name", ["attribute", "decompose", "rank_captions", "likelihood", "change_word"])
def test_every_public_pair_has_one_signature(name: str) -> None:
    once, job = inspect.signature(getattr(core, name)), inspect.signature(getattr(core, f"{name}_iter"))
    assert once.parameters == job.parameters
    assert "callback" in once.parameters
    assert once.return_annotation is get_args(job.return_annotation)[1]
