"""Time, U-Net evaluations and peak memory of the steps of some work, as rows of a table."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter

import torch

from core.diffusion.diffuser import Diffuser
from core.hardware.memory import GIB, peak, reset_peak
from training.common.report import Cell

log = logging.getLogger(__name__)


class TimedSteps:
    """Rows of a table: the time, U-Net evaluations and peak memory of each step of some work on a device."""

    model: Diffuser | None
    """Whose U-Net evaluations are counted, once there is one."""
    rows: list[dict[str, Cell]]
    """A row per step, in order."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.model = None
        self.rows = []

    @contextmanager
    def timed(self, what: str) -> Iterator["Step"]:
        """A context that measures its block and adds a row for it, to whose details the block may add."""
        row = Step()
        reset_peak(self._device)
        before, started = self._n_evals(), perf_counter()
        yield row
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        seconds = perf_counter() - started if row.seconds is None else row.seconds
        held, n_evals = peak(self._device), self._n_evals() - before
        self.rows.append(
            {
                "what": what,
                "seconds": seconds,
                "U-Net evaluations": n_evals or None,
                "peak GiB": None if held is None else held / GIB,
                "details": "; ".join(row.details),
            }
        )
        log.info("%s", self.rows[-1])

    def _n_evals(self) -> int:
        return 0 if self.model is None else self.model.n_unet_rows


class Step:
    """What a step adds to its row."""

    details: list[str]
    """Shown beside its figures."""
    seconds: float | None
    """Shown instead of the time of the whole block."""

    def __init__(self) -> None:
        self.details = []
        self.seconds = None
