"""Half precision: which one a device has units for, and how long a call takes in it."""

import time
from collections.abc import Callable
from typing import TypeVar

import torch

ResultT = TypeVar("ResultT")

_BFLOAT16_UNITS = ("avx512_bf16", "amx_bf16")
"""Instructions without which a CPU computes in bfloat16 by converting to float32 and back, which is slower."""


def half_precision(device: torch.device) -> torch.dtype | None:
    """The half precision in which a model in float32 may compute faster; None where the device has no units for it.

    On a GPU there is none: large models are loaded in half precision there, and who asks for float32 may have reasons.
    """
    if device.type != "cpu":
        return None
    # Older versions of torch do not tell; float32 alone is right, if not fastest.
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return torch.bfloat16 if any(capabilities.get(name) for name in _BFLOAT16_UNITS) else None


def timed(device: torch.device, compute: Callable[[], ResultT]) -> tuple[ResultT, float]:
    """A result, and the seconds that the device took for it. Waits for a GPU."""
    _wait(device)
    started = time.perf_counter()
    result = compute()
    _wait(device)
    return result, time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
