"""Long computations that report progress, can be cancelled, and end in one result."""

import functools
import inspect
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Generic, NoReturn, ParamSpec, TypeVar, get_args

from core.errors import Cancelled

P = ParamSpec("P")
ProgressT = TypeVar("ProgressT")
ResultT = TypeVar("ResultT")

Callback = Callable[[ProgressT], bool | None]
"""Called with each progress report; returning False cancels the job."""


def raise_cancelled(progress: object) -> NoReturn:
    """End a cancelled job that has no partial result."""
    raise Cancelled(f"Cancelled after {progress}.")


class Job(Generic[ProgressT, ResultT]):
    """A computation that runs while it is iterated, or all at once by `result`.

    Iterating yields progress reports, and as the last item the result:

        for item in core.attribute_iter(model, image, "a cat on grass"):
            ...
        attribution = core.attribute_iter(model, image, "a cat on grass").result()

    A job that works with a model holds it from the first `next()` to the last, or until `close()`, which stops the work
    within one call of the network. Each `next()`, and `close()`, may be called from another thread, one at a time.
    """

    def __init__(
        self,
        work: Generator[ProgressT, None, ResultT],
        callback: Callback[ProgressT] | None = None,
        when_cancelled: Callable[[ProgressT], ResultT] = raise_cancelled,
    ) -> None:
        """Wrap a generator that yields progress and returns the result.

        Args:
            work: Does the work.
            callback: Called with every progress report; the job is cancelled if it returns False.
            when_cancelled: The result of a job cancelled by its callback, from the last progress; may raise
                `Cancelled`.
        """
        self._work, self._callback, self._when_cancelled = work, callback, when_cancelled
        self._is_over = False
        self._results: list[ResultT] = []

    def __iter__(self) -> Iterator[ProgressT | ResultT]:
        return self

    def __next__(self) -> ProgressT | ResultT:
        if self._is_over:
            raise StopIteration
        try:
            progress = next(self._work)
            if self._callback is None or self._callback(progress) is not False:
                return progress
            self.close()
            result = self._when_cancelled(progress)
        except StopIteration as end:
            result = end.value
        except BaseException:
            self.close()
            raise
        self._is_over = True
        self._results.append(result)
        return result

    def close(self) -> None:
        """Stop the work and free the model; nothing happens if the job is over."""
        self._is_over = True
        self._work.close()

    def result(self, callback: Callback[ProgressT] | None = None) -> ResultT:
        """Run to the end, and return the result.

        Args:
            callback: Takes the place of the job's own, if given.

        Raises:
            Cancelled: The callback returned False before there was a result, or the job was closed.
        """
        self._callback = callback or self._callback
        for _ in self:
            pass
        if not self._results:
            raise Cancelled("The job was closed before it had a result.")
        return self._results[0]


class JobLock:
    """Held by one job at a time, which may lend it to others between two of its steps."""

    def __init__(self) -> None:
        # Not an RLock: each next() of a job may run in another thread, and any of them has to be able to free it.
        self._lock = threading.Lock()
        self._holder: object | None = None

    @property
    def is_held(self) -> bool:
        """Whether a job holds it."""
        return self._lock.locked()

    @contextmanager
    def held(self, when_busy: Callable[[], object] = lambda: None) -> Iterator[None]:
        """Hold it for a job; another one waits here, after a call of its `when_busy`. May be left in another thread."""
        if not self._lock.acquire(blocking=False):
            when_busy()
            self._lock.acquire()
        job = self._holder = object()
        try:
            yield
        finally:
            if self._holder is job:  # not if the job ends while others have it
                self._release()

    def lend(self) -> Callable[[], None]:
        """Let others hold it while the job that holds it is suspended; returns what takes it back, and may wait.

        The job may be closed without taking it back, but must not go on.
        """
        job = self._holder
        self._release()

        def take_back() -> None:
            self._lock.acquire()
            self._holder = job

        return take_back

    def _release(self) -> None:
        self._holder = None
        self._lock.release()


def finished(start: Callable[P, Job[ProgressT, ResultT]]) -> Callable[P, ResultT]:
    """The function `f` of a function `f_iter` that starts a job: same arguments, but it returns the job's result."""

    @functools.wraps(start)
    def run(*args: P.args, **kwargs: P.kwargs) -> ResultT:
        return start(*args, **kwargs).result()

    run.__name__, run.__qualname__ = (name.removesuffix("_iter") for name in (start.__name__, start.__qualname__))
    signature = inspect.signature(start)
    _, result = get_args(signature.return_annotation)
    vars(run)["__signature__"] = signature.replace(return_annotation=result)
    return run
