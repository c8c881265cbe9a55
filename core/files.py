"""Files that are written whole or not at all, whenever a process is killed; text is UTF-8 whatever the locale."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


@contextmanager
def write_atomically(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """A temporary path beside `path` to write to; it replaces `path` at the end of the block, or goes if that fails.

    `shared`: other processes may be writing the same file, so each gets a temporary path of its own.

    Raises:
        OSError: It could not be written, for example to a full disk; `path` is as it was.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part" if shared else f"{path.name}.part")
    try:
        yield part
        os.replace(part, path)
    except SafetensorError as error:  # as its library calls a full disk
        raise OSError(f"{path} could not be written: {error}") from error
    finally:
        part.unlink(missing_ok=True)


def write_text(path: Path, text: str, *, shared: bool = False) -> None:
    """Write a text file in one go, as `write_atomically` does."""
    with write_atomically(path, shared=shared) as part:
        part.write_text(text, encoding="utf-8")
