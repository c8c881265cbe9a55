"""Keep freed memory for the next training step instead of returning it to the system."""

import ctypes
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
"""Parameters of glibc's `mallopt`."""
_MOST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Ask glibc not to return freed memory to the system; returns whether it could (False for other C libraries).

    Every training step frees and allocates the same large tensors. By default their pages come from the system each
    time, which can cost as much as the computation.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = {_MMAP_MAX: 0, _TRIM_THRESHOLD: _MOST, _TOP_PAD: 64 * 2**20}
    return all(mallopt(name, value) for name, value in settings.items())
