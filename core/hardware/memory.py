"""The memory of a device: how much is free, what a call takes, and peaks."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch

GIB = 2**30
DEFAULT_LIMIT = 8 * GIB
"""Default limit of the GPU memory that a process takes for weights and activations. More makes nothing faster: a GPU is
busy with 32 latents of Stable Diffusion, which take 4.1 GiB in float16."""
MARGIN = 0.9
"""Share of the memory that is planned with: the allocator rounds up and leaves gaps."""
WORKING = GIB
"""Planned with, if the device has it free, where weights alone reach the limit."""


class Memory(Protocol):
    """The memory of a device."""

    @property
    def measurable(self) -> bool:
        """Whether `measure` works on this device."""

    def available(self) -> int | None:
        """Bytes available for activations; None if unknown."""

    def measure(self, call: Callable[[], object]) -> int:
        """Make a call; its peak in bytes, beyond what was held before."""

    def release(self) -> None:
        """Return the memory that the allocator caches."""

    def __str__(self) -> str:
        """The name of the device."""


class DeviceMemory:
    """`Memory` of a torch device."""

    limit: int
    """Limit of the GPU memory of all tensors of this process, in bytes."""

    def __init__(self, device: torch.device, limit: int = DEFAULT_LIMIT) -> None:
        self.device, self.limit = device, limit

    def __str__(self) -> str:
        return "the CPU" if self.device.type == "cpu" else str(self.device)

    def available(self) -> int | None:
        """Half of what is free of main memory; of a GPU, what is free and below the limit."""
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            held = torch.cuda.memory_allocated(self.device)
            free += torch.cuda.memory_reserved(self.device) - held  # cached by the allocator
        elif self.device.type == "mps":
            held = torch.mps.driver_allocated_memory()
            free = torch.mps.recommended_max_memory() - held
        else:
            main = main_memory_available()
            return None if main is None else main // 2
        return max(0, int(min(MARGIN * free, max(MARGIN * self.limit - held, WORKING))))

    @property
    def measurable(self) -> bool:
        """True on CUDA, whose allocator records peaks."""
        return self.device.type == "cuda"

    def measure(self, call: Callable[[], object]) -> int:
        """As `Memory.measure`."""
        before = torch.cuda.memory_allocated(self.device)
        _keep_peak(self.device)
        call()
        # The host counts this as it launches kernels: no need to synchronise.
        return int(torch.cuda.max_memory_allocated(self.device)) - before

    def release(self) -> None:
        """As `Memory.release`."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        elif self.device.type == "mps":
            torch.mps.empty_cache()


def main_memory_available() -> int | None:
    """Bytes of main memory available without swapping; None if the system does not report it."""
    if sys.platform == "linux":
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


_peaks: dict[int, int] = {}
"""By GPU, the peak before a measurement reset the allocator's own."""


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _keep_peak(device: torch.device) -> None:
    _peaks[_index(device)] = max(_peaks.get(_index(device), 0), torch.cuda.max_memory_allocated(device))
    torch.cuda.reset_peak_memory_stats(device)


def reset_peak(device: torch.device) -> None:
    """Start a new `peak` of a GPU's memory, or on Linux of the process's main memory."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        _peaks[_index(device)] = 0
    elif sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def peak(device: torch.device) -> int | None:
    """Peak in bytes since `reset_peak`, of tensors on a GPU or of the process's main memory; None if unknown.

    Unlike `torch.cuda.max_memory_allocated`, it includes what was held before a measurement of `DeviceMemory`.
    """
    if device.type == "cuda":
        return max(_peaks.get(_index(device), 0), int(torch.cuda.max_memory_allocated(device)))
    if device.type == "cpu" and sys.platform == "linux":
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return None
