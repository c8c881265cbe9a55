"""Model work on a GPU that is lent for one request (ZeroGPU on a Hugging Face Space).

There the page's process never has a GPU. What a request computes runs in a process forked from it, through one function
that `spaces.GPU` wraps; what goes there and comes back is bytes. The model and whatever else the fork has already are
not sent but named. Closing the generator here stops the work there within one U-Net call.
"""

import io
import os
import pickle
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

from core.diffusion.text import distinct_words

if TYPE_CHECKING:
    from core.ui.runtime import Runtime

MOST_SECONDS = 20
"""Longest a request may hold the GPU; longer ones wait longer and find a visitor's quota spent sooner."""
SECONDS_AN_EVALUATION = 0.03
"""Of a latent through SD v1.4's U-Net in float16, its share of previews included. A guess on the safe side: it has not
been measured on a Space."""
OVERHEAD_SECONDS = 4.0
"""For moving the model to the GPU, text and the picture."""
_REPLICATES_EVALS = 256
"""Noise samples that most measurements take: 32 replicates of 8."""
_NAMED = ("model", "dictionary")
"""What the fork has of the runtime."""

_runtime: "Runtime | None" = None
"""Whose fork this is; set before the fork."""


class _Refused(NamedTuple):
    """An error that a user can act on: its message, for not every error can be sent."""

    message: str


def on_zero_gpu() -> bool:
    """Whether this is a Space whose GPU is lent."""
    return os.environ.get("SPACES_ZERO_GPU", "").lower() in ("1", "t", "true")


class ZeroGpuRunner:
    """Runs generator functions on the lent GPU."""

    def __init__(self, runtime: "Runtime") -> None:
        """Before the page is launched: by then ZeroGPU wants to know the function that needs a GPU."""
        global _runtime
        _runtime = self._runtime = runtime
        self._compute = import_module("spaces").GPU(_compute, duration=_seconds)

    def run(
        self, seconds: float, function: Callable[..., Any], *arguments: Any, **options: Any
    ) -> Generator[Any, None, None]:
        """What a generator function of some module yields there; a measurement that takes longer gives what it has.

        Raises:
            ValueError: What the function raised as such.
            JobError: The GPU could not be had.
        """
        import gradio as gr

        from core.ui.jobs import JobError  # which imports the runtime, and that this

        payload = _dumps(self._runtime, (function, arguments, options))
        try:
            with closing(self._compute(payload, min(seconds, MOST_SECONDS))) as items:
                for item in items:
                    found = pickle.loads(item)
                    if isinstance(found, _Refused):
                        raise ValueError(found.message)
                    yield found
        except gr.Error as error:  # of the quota, the queue or the machine
            raise JobError(
                f"The GPU of this Space could not be had: {str(error.message).strip().rstrip('.')}. The examples need "
                f"none. Sign in to Hugging Face for more of it, come back later, or run the app on your own machine."
            ) from error


class LentEngine:
    """The package `core`, whose functions of a model run on the lent GPU."""

    def __init__(self, engine: Any, runtime: "Runtime", gpu_runner: ZeroGpuRunner) -> None:
        self._engine, self._runtime, self._gpu_runner = engine, runtime, gpu_runner

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._engine, name)

        def call(model: Any, *arguments: Any, **options: Any) -> Any:
            seconds = seconds_of(measured_evals(name, *arguments, **options))
            if name.endswith("_iter"):
                return self._gpu_runner.run(seconds, found, model, *arguments, **options)
            return next(self._gpu_runner.run(seconds, _once, found, model, *arguments, **options))

        return found if isinstance(found, type) else call


def seconds_of(n_evals: int) -> float:
    """How long a request with so many U-Net evaluations may take."""
    return min(OVERHEAD_SECONDS + n_evals * SECONDS_AN_EVALUATION, MOST_SECONDS)


def measured_evals(name: str, *arguments: Any, **options: Any) -> int:
    """About how many U-Net evaluations one of the engine's functions takes, its arguments after the model given."""
    if name == "attribute_iter":
        return (len(options.get("words") or distinct_words(arguments[1])) + 1) * _REPLICATES_EVALS
    if name == "predict_layout":
        return 2 * (int(options.get("step", 0)) + 1)
    return 4 * _REPLICATES_EVALS  # two words with and without each other, or a few captions


def _seconds(payload: bytes, seconds: float) -> float:
    del payload
    return seconds


def _compute(payload: bytes, seconds: float) -> Iterator[bytes]:
    """In the process that has the GPU."""
    assert _runtime is not None
    deadline = time.monotonic() + seconds - OVERHEAD_SECONDS / 2
    try:
        function, arguments, options = _Reader(io.BytesIO(payload), _runtime).load()
        with closing(function(*arguments, **options)) as items:
            for item in items:
                partial = getattr(item, "partial", None)
                if partial is not None and time.monotonic() > deadline:
                    yield _dumps(_runtime, replace(partial, stopped="budget"))
                    return
                yield _dumps(_runtime, item)
    except ValueError as error:
        yield _dumps(_runtime, _Refused(str(error)))


def _once(function: Callable[..., Any], *arguments: Any, **options: Any) -> Iterator[Any]:
    yield function(*arguments, **options)


def _dumps(runtime: "Runtime", value: Any) -> bytes:
    buffer = io.BytesIO()
    _Writer(buffer, runtime).dump(value)
    return buffer.getvalue()


class _Writer(pickle.Pickler):
    """Writes a name in the place of what the other process has, too."""

    def __init__(self, file: io.BytesIO, runtime: "Runtime") -> None:
        super().__init__(file)
        self._runtime = runtime

    def persistent_id(self, value: Any) -> str | None:
        if value is self._runtime:
            return "runtime"
        return next((name for name in _NAMED if value is not None and value is getattr(self._runtime, name)), None)


class _Reader(pickle.Unpickler):
    """Reads what `_Writer` wrote."""

    def __init__(self, file: io.BytesIO, runtime: "Runtime") -> None:
        super().__init__(file)
        self._runtime = runtime

    def persistent_load(self, name: str) -> Any:
        return self._runtime if name == "runtime" else getattr(self._runtime, name)
