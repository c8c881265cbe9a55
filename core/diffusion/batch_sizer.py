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

from core.diffusion.memory import GIB, Memory
from core.errors import OutOfMemory

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
        compute: Callable[[slice], ResultT],
        *,
        whole: bool = False,
        remedy: str = "",
    ) -> list[ResultT]:
        """Results of `compute` for consecutive parts of n rows: `rows` at once, and half as many when memory runs out.

        What was computed before is kept. `compute` may be asked for rows again of which it was asked before, when that
        call has failed. `whole`: the rows cannot be parted.

        Raises:
            OutOfMemory: Not even one row fits, or not all where they cannot be parted. The message ends in `remedy`.
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


def memory_format_for(device: torch.device) -> torch.memory_format:
    """The fastest layout of feature maps: channels last on CUDA, and on a CPU (a fifth faster for a batch of 28)."""
    return torch.channels_last if device.type in ("cpu", "cuda") else torch.contiguous_format
