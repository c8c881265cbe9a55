"""Keep freed memory for the next step instead of giving it back to the system."""

import ctypes
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
"""Parameters of glibc's `mallopt`."""
_MOST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Ask the C library not to return freed memory; whether it could be asked (glibc alone).

    Every step of training frees and takes the same large tensors. By default each comes fresh from the
    system, page by page, which can cost as much as what is computed in it.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = {_MMAP_MAX: 0, _TRIM_THRESHOLD: _MOST, _TOP_PAD: 64 * 2**20}
    return all(mallopt(name, value) for name, value in settings.items())
