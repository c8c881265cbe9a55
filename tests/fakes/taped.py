"""A stand-in for CUDA graphs on any device: records the operations of a call, and replays them without the modules.

Like a CUDA graph it repeats the same operations on the same memory: hooks are not called, and Python's decisions during
the recording are final.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from core.hardware.graph_capture import Output, Work


class TapeCapture:
    """A `core.hardware.graph_capture.Capture`."""

    def __call__(self, work: Work, inputs: Sequence[Tensor]) -> Callable[[], Output]:
        with _Tape() as tape:
            output = work(*inputs)

        def replay() -> Output:
            with torch.no_grad():
                tape.play()
            return output

        return replay


class _Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Any]]] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        output = function(*args, **(kwargs or {}))
        self._calls.append((function, args, kwargs or {}, tree_leaves(output)))
        return output

    def play(self) -> None:
        for function, args, kwargs, outputs in self._calls:
            for old, new in zip(outputs, tree_leaves(function(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():  # neither a view nor written in place
                    old.copy_(new)
