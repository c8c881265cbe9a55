"""Model work on a ZeroGPU Space, which lends its GPU for one request at a time.

There the page's own process never has a GPU. The work of a request runs in a forked process, through one function that
`spaces.GPU` wraps; what crosses the boundary is bytes. The model and whatever else the fork inherits are sent by name.
Closing the generator here stops the work there within one U-Net call.
"""

import io
import os
import pickle
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from importlib import import_module
from typing import Any, NamedTuple

import gradio as gr

from core.diffusion.text import distinct_words
from core.ui.backend.errors import JobError, sentence

MAX_SECONDS = 20
"""Longest a request may hold the GPU; longer ones queue longer and use up a visitor's quota sooner."""
SECONDS_PER_EVALUATION = 0.03
"""Of one latent through SD v1.4's U-Net in float16, its share of previews included. A conservative estimate: it has not
been measured on a Space."""
OVERHEAD_SECONDS = 4.0
"""For moving the model to the GPU, encoding the text and decoding the image."""
_EVALS_PER_PROMPT = 256
"""Noise samples that most measurements take: 32 replicates of 8."""


class _Shared(NamedTuple):
    """What the fork inherits and is therefore sent by name."""

    owner: Any
    attributes: Sequence[str]


_shared: _Shared | None = None
"""Set before the fork."""


class _Refused(NamedTuple):
    """The message of an error a user can act on, for not every error can be pickled."""

    message: str


def on_zero_gpu() -> bool:
    """Whether this process runs on a ZeroGPU Space."""
    return os.environ.get("SPACES_ZERO_GPU", "").lower() in ("1", "t", "true")


class ZeroGpuRunner:
    """Runs generator functions in a process that has the GPU."""

    def __init__(self, owner: Any, attributes: Sequence[str]) -> None:
        """Make it before the page is launched: by then ZeroGPU has to know the function that needs a GPU.

        Args:
            owner: An object of this process, the first argument of most functions; sent by name.
            attributes: Names of its attributes that are sent by name, too.
        """
        global _shared
        _shared = self._shared = _Shared(owner, attributes)
        self._compute = import_module("spaces").GPU(_compute, duration=_seconds)

    def run(
        self, seconds: float, function: Callable[..., Any], *arguments: Any, **options: Any
    ) -> Generator[Any, None, None]:
        """What a module-level generator function yields there; a measurement that runs out of time gives what it has.

        Raises:
            ValueError: What the function raised as such.
            JobError: The GPU was not available.
        """
        payload = _dumps(self._shared, (function, arguments, options))
        try:
            with closing(self._compute(payload, min(seconds, MAX_SECONDS))) as items:
                for item in items:
                    found = pickle.loads(item)
                    if isinstance(found, _Refused):
                        raise ValueError(found.message)
                    yield found
        except gr.Error as error:  # of the quota, the queue or the machine
            raise JobError(
                f"The GPU of this Space is not available: {str(error.message).strip().rstrip('.')}. The examples need "
                f"none. Sign in to Hugging Face for a larger quota, try later, or run the app on your own machine."
            ) from error


class ZeroGpuEngine:
    """The package `core`, with the functions that use a model running on the Space's GPU."""

    def __init__(self, engine: Any, gpu_runner: ZeroGpuRunner) -> None:
        self._engine, self._gpu_runner = engine, gpu_runner

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._engine, name)

        def call(model: Any, *arguments: Any, **options: Any) -> Any:
            seconds = seconds_for(measured_evals(name, *arguments, **options))
            if name.endswith("_iter"):
                return self._gpu_runner.run(seconds, found, model, *arguments, **options)
            return next(self._gpu_runner.run(seconds, _once, found, model, *arguments, **options))

        return found if isinstance(found, type) else call


def seconds_for(n_evals: int) -> float:
    """How long a request with so many U-Net evaluations may take."""
    return min(OVERHEAD_SECONDS + n_evals * SECONDS_PER_EVALUATION, MAX_SECONDS)


def measured_evals(name: str, *arguments: Any, **options: Any) -> int:
    """About how many U-Net evaluations one of the engine's functions takes, given its arguments after the model."""
    if name == "attribute_iter":
        return (len(options.get("words") or distinct_words(arguments[1])) + 1) * _EVALS_PER_PROMPT
    if name == "predict_layout":
        return 2 * (int(options.get("step", 0)) + 1)
    return 4 * _EVALS_PER_PROMPT  # two words with and without each other, or a few captions


def _seconds(payload: bytes, seconds: float) -> float:
    del payload
    return seconds


def _compute(payload: bytes, seconds: float) -> Iterator[bytes]:
    """Runs in the process that has the GPU."""
    assert _shared is not None
    deadline = time.monotonic() + seconds - OVERHEAD_SECONDS / 2
    try:
        function, arguments, options = _Unpickler(io.BytesIO(payload), _shared).load()
        with closing(function(*arguments, **options)) as items:
            for item in items:
                partial = getattr(item, "partial", None)
                if partial is not None and time.monotonic() > deadline:
                    yield _dumps(_shared, replace(partial, stopped="budget"))
                    return
                yield _dumps(_shared, item)
    except ValueError as error:
        yield _dumps(_shared, _Refused(sentence(error)))


def _once(function: Callable[..., Any], *arguments: Any, **options: Any) -> Iterator[Any]:
    yield function(*arguments, **options)


def _dumps(shared: _Shared, value: Any) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer, shared).dump(value)
    return buffer.getvalue()


class _Pickler(pickle.Pickler):
    """Writes a name in place of what the other process inherits."""

    def __init__(self, file: io.BytesIO, shared: _Shared) -> None:
        super().__init__(file)
        self._shared = shared

    def persistent_id(self, value: Any) -> str | None:
        if value is self._shared.owner:
            return ""
        names = self._shared.attributes
        return next((name for name in names if value is not None and value is getattr(self._shared.owner, name)), None)


class _Unpickler(pickle.Unpickler):
    """Reads what `_Pickler` wrote."""

    def __init__(self, file: io.BytesIO, shared: _Shared) -> None:
        super().__init__(file)
        self._shared = shared

    def persistent_load(self, name: str) -> Any:
        return getattr(self._shared.owner, name) if name else self._shared.owner
