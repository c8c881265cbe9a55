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
        """Whether `measure` can tell, so that probing is worth its calls."""

    def available(self) -> int | None:
        """Bytes that may be taken for activations; None where nobody knows."""

    def measure(self, call: Callable[[], object]) -> int:
        """Make a call; bytes that it held at most, beside those held before."""

    def release(self) -> None:
        """Give back what the allocator keeps for later."""

    def __str__(self) -> str:
        """The device's name."""


class DeviceMemory:
    """The memory of a real device."""

    limit: int
    """Most bytes of a GPU that this process's tensors should take in all."""

    def __init__(self, device: torch.device, limit: int = DEFAULT_LIMIT) -> None:
        self.device, self.limit = device, limit

    def __str__(self) -> str:
        return "the CPU" if self.device.type == "cpu" else str(self.device)

    def available(self) -> int | None:
        """Of main memory half of what is free; of a GPU's what is free and below the limit."""
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            held = torch.cuda.memory_allocated(self.device)
            free += torch.cuda.memory_reserved(self.device) - held  # kept by the allocator for whoever asks next
        elif self.device.type == "mps":
            held = torch.mps.driver_allocated_memory()
            free = torch.mps.recommended_max_memory() - held
        else:
            main = main_memory_available()
            return None if main is None else main // 2
        return max(0, int(min(MARGIN * free, max(MARGIN * self.limit - held, WORKING))))

    @property
    def measurable(self) -> bool:
        """Only CUDA's allocator can tell."""
        return self.device.type == "cuda"

    def measure(self, call: Callable[[], object]) -> int:
        """As `Memory.measure`."""
        before = torch.cuda.memory_allocated(self.device)
        _keep_peak(self.device)
        call()
        # Counted as kernels are launched, by the host: nothing has to be waited for.
        return int(torch.cuda.max_memory_allocated(self.device)) - before

    def release(self) -> None:
        """As `Memory.release`."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        elif self.device.type == "mps":
            torch.mps.empty_cache()


def main_memory_available() -> int | None:
    """Bytes of main memory that can be had without swapping; None where the system does not say."""
    if sys.platform == "linux":
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


_peaks: dict[int, int] = {}
"""By GPU, what was held at most before a probe set the allocator's own mark back."""


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _keep_peak(device: torch.device) -> None:
    _peaks[_index(device)] = max(_peaks.get(_index(device), 0), torch.cuda.max_memory_allocated(device))
    torch.cuda.reset_peak_memory_stats(device)


def reset_peak(device: torch.device) -> None:
    """Begin a new `peak` of a GPU's memory; on Linux also of the process's main memory."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        _peaks[_index(device)] = 0
    elif sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")


def peak(device: torch.device) -> int | None:
    """Most bytes held since `reset_peak`: by tensors on a GPU, measurements included; on the CPU by the whole process.

    `torch.cuda.max_memory_allocated` may miss what was held before a measurement in between. None where nobody knows.
    """
    if device.type == "cuda":
        return max(_peaks.get(_index(device), 0), int(torch.cuda.max_memory_allocated(device)))
    if device.type == "cpu" and sys.platform == "linux":
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return None
