"""How many rows of a batch go through a network at once: as many as fit, by what one of them was measured to take.

A row is a latent in the U-Net or an image in the decoder. On CUDA the first batch of a kind is preceded by calls of one
row and of two, whose peaks tell what a further row costs: attention in float32, or the workspace of a convolution, may
take thirty times the activations, and which kernel runs is not known beforehand. Elsewhere an estimate takes the
measurement's place. Where memory runs out all the same, the batch is halved and what was computed is kept.

Results depend on the batch size by rounding alone, so all of this changes memory and time, nothing else.
"""

import logging
import os
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

import torch

from core.errors import OutOfMemory

log = logging.getLogger(__name__)

Result = TypeVar("Result")

GIB = 2**30
DEFAULT_LIMIT = 8 * GIB
"""Most memory of a GPU that a process takes for weights and activations unless told otherwise. More makes nothing
faster: a GPU is busy with 32 latents of Stable Diffusion, 4.1 GiB in float16."""
MARGIN = 0.9
"""Share of the memory that is planned with: the allocator rounds up and leaves gaps."""
WORKING = GIB
"""What is planned with, if the device has it free, where weights alone reach the limit."""
ESTIMATE_MARGIN = 1.25
"""How much more than its estimate a row is taken for where it cannot be measured."""

_MESSAGES = ("out of memory", "can't allocate memory", "not enough memory", "CUDNN_STATUS_ALLOC_FAILED")
"""By these a RuntimeError is one of memory: only CUDA has a class for it."""


class Load(NamedTuple):
    """A kind of call whose rows all take the same memory."""

    what: str
    """What is called, in messages: `the U-Net`."""
    dtype: torch.dtype
    """Of the activations."""
    n_tokens: int = 0
    """Rows of the text embeddings."""


class Cost(NamedTuple):
    """What a call takes, in bytes: `fixed` and for every row `per_row`."""

    per_row: int
    fixed: int


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


class BatchSizer:
    """Decides how many rows go into a call, and makes the calls."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self._costs: dict[Load, Cost] = {}
        self._most: dict[Load, tuple[int, int | None]] = {}
        """Rows that went well after more had run out of memory, and what was available then."""

    def fits(self, load: Load, n: int, estimate: int, probe: Callable[[int], object]) -> int:
        """How many of n rows fit into one call, at least 1.

        Args:
            load: The kind of call.
            n: Rows there are.
            estimate: Bytes that a row takes at least; what it takes, if it cannot be measured.
            probe: Makes a call of so many rows, for measuring.
        """
        if n == 1:
            return 1
        cost = self._costs.get(load) or self._measure(load, estimate, probe)
        available = self.memory.available()
        if available is not None:
            n = min(n, max(1, (available - cost.fixed) // cost.per_row))
        return self.learned(load, n)

    def run(
        self,
        load: Load,
        n: int,
        rows: int,
        compute: Callable[[slice], Result],
        *,
        whole: bool = False,
        remedy: str = "",
    ) -> list[Result]:
        """Results of `compute` for consecutive parts of n rows: `rows` at once, and half as many when memory runs out.

        What was computed before is kept. `compute` may be asked for rows again of which it was asked before, when that
        call has failed. `whole`: the rows cannot be parted.

        Raises:
            OutOfMemory: Not even one row fits, or not all where they cannot be parted. The message ends in `remedy`.
        """
        results: list[Result] = []
        done, failed = 0, 0
        while done < n:
            part = slice(done, min(done + rows, n))
            size = part.stop - part.start
            try:
                results.append(compute(part))
            except (RuntimeError, OutOfMemory) as error:
                if not is_out_of_memory(error):
                    raise
                why = str(error).partition("\n")[0]
            else:
                done = part.stop
                if failed:
                    log.warning(
                        "%s: %s ran out of memory with a batch of %d; going on with %d",
                        self.memory,
                        load.what,
                        failed,
                        rows,
                    )
                    self._most[load] = rows, self.memory.available()
                    failed = 0
                continue
            # Only here, with the error gone, are the tensors free that its traceback held.
            self.memory.release()
            if size == 1 or whole:
                raise OutOfMemory(str(self.memory), load.what, size, self.memory.available(), why, remedy)
            failed, rows = failed or size, size // 2
        return results

    def _measure(self, load: Load, estimate: int, probe: Callable[[int], object]) -> Cost:
        cost = Cost(max(1, int(ESTIMATE_MARGIN * estimate)), 0)
        if self.memory.measurable:
            # The first call may bring weights to the device, or work space that stays; it is not counted.
            peaks = [self._peak(partial(probe, n)) for n in (1, 1, 2)]
            if None in peaks:
                self.memory.release()
                cost = Cost(max(cost.per_row, self.memory.available() or 1), 0)  # one at a time
            else:
                _, one, two = (peak or 0 for peak in peaks)
                # A replayed graph takes less than a row needs: never less than the estimate.
                per_row = max(two - one, estimate, 1)
                cost = Cost(per_row, max(0, one - per_row))
            log.debug("%s, %s: %.3f GiB a row, %.3f besides", load.what, load.dtype, *(part / GIB for part in cost))
        self._costs[load] = cost
        return cost

    def _peak(self, call: Callable[[], object]) -> int | None:
        """What a call takes; None if it runs out of memory."""
        try:
            return self.memory.measure(call)
        except (RuntimeError, OutOfMemory) as error:
            if not is_out_of_memory(error):
                raise
            return None

    def learned(self, load: Load, n: int) -> int:
        """Of n rows, as many as memory did not run out with; all again, once there is twice as much of it."""
        if load not in self._most:
            return n
        most, then = self._most[load]
        now = self.memory.available()
        if now is not None and then is not None and now >= 2 * max(then, 1):
            del self._most[load]
            return n
        return min(n, most)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on whichever device."""
    if isinstance(error, torch.OutOfMemoryError | OutOfMemory):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in _MESSAGES)


def has_hooks(modules: Iterable[torch.nn.Module]) -> bool:
    """Whether somebody looks into any of these modules, or changes something there."""
    return any(module._forward_hooks or module._forward_pre_hooks for module in modules)


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
