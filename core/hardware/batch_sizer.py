"""How many rows of a batch go through a network at once: as many as fit into memory.

A row is a latent in the U-Net or an image in the decoder. On CUDA, calls of one row and of two are measured before the
first batch of a kind; their peaks give the memory per row. Attention in float32, or the workspace of a convolution, may
take thirty times the activations, and which kernel runs is not known beforehand. On other devices an estimate is used.
Where memory runs out all the same, the batch is halved, and results so far are kept.

Results depend on the batch size by rounding alone, so this affects only memory and time.
"""

import logging
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple, TypeVar

import torch

from core.errors import OutOfMemory
from core.hardware.memory import GIB, Memory

log = logging.getLogger(__name__)

ResultT = TypeVar("ResultT")

ESTIMATE_MARGIN = 1.25
"""Factor on the estimate of a row's memory where it cannot be measured."""
REMEDY = (
    "Close what else uses this memory, or load the model in half precision (dtype='float16'), with offload=True or on "
    "another device."
)
"""What a user can do about `OutOfMemory`."""
_MESSAGES = ("out of memory", "can't allocate memory", "not enough memory", "CUDNN_STATUS_ALLOC_FAILED")
"""Parts of the messages of a `RuntimeError` for lack of memory; only CUDA has an exception class for it."""


class Load(NamedTuple):
    """A kind of call: all its rows take the same memory."""

    what: str
    """Name for messages: `the U-Net`."""
    dtype: torch.dtype
    """The dtype of the activations."""
    n_tokens: int = 0
    """Rows of the text embeddings, where there are any."""


class Cost(NamedTuple):
    """Memory of a call in bytes: fixed + per_row * rows."""

    per_row: int
    fixed: int


class BatchSizer:
    """Decides how many rows go into a call, and makes the calls."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self._costs: dict[Load, Cost] = {}
        self._succeeded: dict[Load, tuple[int, int | None]] = {}
        """By load, the batch size that succeeded after larger ones had run out of memory, and the bytes available
        then."""

    def fits(self, load: Load, n: int, estimate: int, probe: Callable[[int], object]) -> int:
        """How many of n rows fit into one call, at least 1.

        Args:
            load: The kind of call.
            n: Number of rows.
            estimate: Minimum bytes per row; without measurements, it is the estimate.
            probe: Makes a call with a given number of rows, for measuring.
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
        compute: Callable[[slice], ResultT],
        *,
        whole: bool = False,
        remedy: str = "",
    ) -> list[ResultT]:
        """Results of `compute` for consecutive slices of n rows: `rows` at once, and half as many when memory runs out.

        Args:
            load: The kind of call.
            n: Number of rows.
            rows: Rows in the first call.
            compute: Called with a slice of the rows; after a failure, with parts of the same slice.
            whole: The rows cannot be split.
            remedy: End of the error message.

        Raises:
            OutOfMemory: Not even one row fits, or `whole` and not all fit.
        """
        results: list[ResultT] = []
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
                    self._succeeded[load] = rows, self.memory.available()
                    failed = 0
                continue
            # Only here, with the error gone, are the tensors freed that its traceback held.
            self.memory.release()
            if size == 1 or whole:
                raise OutOfMemory(str(self.memory), load.what, size, self.memory.available(), why, remedy)
            failed, rows = failed or size, size // 2
        return results

    def _measure(self, load: Load, estimate: int, probe: Callable[[int], object]) -> Cost:
        cost = Cost(max(1, int(ESTIMATE_MARGIN * estimate)), 0)
        if self.memory.measurable:
            # The first call may move weights to the device or allocate a workspace that stays; it is not counted.
            peaks = [self._peak(partial(probe, n)) for n in (1, 1, 2)]
            if None in peaks:
                self.memory.release()
                cost = Cost(max(cost.per_row, self.memory.available() or 1), 0)  # one at a time
            else:
                _, one, two = (peak or 0 for peak in peaks)
                # Never less than the estimate: replaying a graph takes less than a call.
                per_row = max(two - one, estimate, 1)
                cost = Cost(per_row, max(0, one - per_row))
            log.debug("%s, %s: %.3f GiB per row, %.3f fixed", load.what, load.dtype, *(part / GIB for part in cost))
        self._costs[load] = cost
        return cost

    def _peak(self, call: Callable[[], object]) -> int | None:
        """The peak of a call; None if it runs out of memory."""
        try:
            return self.memory.measure(call)
        except (RuntimeError, OutOfMemory) as error:
            if not is_out_of_memory(error):
                raise
            return None

    def learned(self, load: Load, n: int) -> int:
        """n, or the batch size that succeeded after larger ones had failed, until twice as much memory is available."""
        if load not in self._succeeded:
            return n
        size, then = self._succeeded[load]
        now = self.memory.available()
        if now is not None and then is not None and now >= 2 * max(then, 1):
            del self._succeeded[load]
            return n
        return min(n, size)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out, on any device."""
    if isinstance(error, torch.OutOfMemoryError | OutOfMemory):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in _MESSAGES)


def has_hooks(modules: Iterable[torch.nn.Module]) -> bool:
    """Whether any of these modules has a forward hook."""
    return any(module._forward_hooks or module._forward_pre_hooks for module in modules)


def memory_format_for(device: torch.device) -> torch.memory_format:
    """The fastest layout of feature maps: channels last on CUDA, and on a CPU (a fifth faster for a batch of 28)."""
    return torch.channels_last if device.type in ("cpu", "cuda") else torch.contiguous_format
