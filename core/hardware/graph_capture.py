"""Recording work on tensors as a CUDA graph, for replay."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

Output = Tensor | tuple[Tensor, ...]
Work = Callable[..., Output]
"""A function of tensors alone, with tensors as its output."""
Capture = Callable[[Work, Sequence[Tensor]], Callable[[], Output]]
"""Records some work on input tensors, and returns a function that repeats it: on the present contents of the inputs,
with the same output tensors at every call."""


class CudaCapture:
    """A `Capture` by CUDA graphs that share a memory pool, on a side stream as recording requires."""

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None

    def __call__(self, work: Work, inputs: Sequence[Tensor]) -> Callable[[], Output]:
        """Record the work, after a warm-up in which libraries set up their handles and workspaces."""
        with torch.cuda.device(inputs[0].device):
            if self._stream is None:
                self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
                self._pool = torch.cuda.graph_pool_handle()
            graph, stream, current = torch.cuda.CUDAGraph(), self._stream, torch.cuda.current_stream()
            stream.wait_stream(current)
            # Not `torch.cuda.graph`, which collects garbage and empties the allocator's cache each time.
            with torch.cuda.stream(stream):
                work(*inputs)
                stream.synchronize()
                # Other threads of the app may use the GPU meanwhile.
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    output = work(*inputs)
                except BaseException:
                    with suppress(RuntimeError):
                        graph.capture_end()
                    raise
                graph.capture_end()
            current.wait_stream(stream)

        def replay() -> Output:
            graph.replay()
            return output

        return replay
