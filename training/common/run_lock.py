"""One run per folder: two at once would overwrite each other's checkpoints."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

logger = logging.getLogger(__name__)


class FolderInUseError(RuntimeError):
    """Another run is using the run folder."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a run's folder, creating it if needed. The system releases the lock of a killed process.

    Raises:
        FolderInUseError: Another run is at work in the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise FolderInUseError(
            f"Another run is at work in {folder}. Wait until it has ended, or stop it, or give this one another folder."
        ) from None
    except (NotImplementedError, OSError) as error:
        logger.warning("%s cannot be locked (%s): let no other run use it meanwhile", folder, error)
    try:
        yield
    finally:
        lock.release()
