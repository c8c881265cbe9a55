"""Scenes painted once, into memory maps, by processes that go on while others already read.

A chunk is marked when all of it is written, so that a killed run goes on with the next. What a process has written is
the system's, and survives it.
"""

import json
import logging
import os
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from core.files import write_text
from training.picturebook.world.backgrounds import SIZE
from training.picturebook.world.captions import Split
from training.picturebook.world.dropout import WordDropout, drop_words
from training.picturebook.world.scenes import CELL, Scene, caption_of, layout_of, make_scene, paint
from training.picturebook.world.tokens import MAX_TOKENS, build_tokenizer

WORDINGS = 16
"""Texts stored for each scene: captions in the first half, captions after word dropout in the second."""
CHUNK = 64
"""Scenes that are painted in one go."""
_MAPS: dict[str, tuple[npt.DTypeLike, tuple[int, ...]]] = {
    "images": (np.uint8, (SIZE, SIZE, 3)),
    "tokens": (np.int16, (WORDINGS, MAX_TOKENS)),
    "layout": (np.uint8, (SIZE // CELL, SIZE // CELL)),
}
CHUNKS_A_PROCESS = 16
"""Chunks that make a process worth starting, which takes seconds."""
_DONE, _SETTINGS = "done", "settings.json"

logger = logging.getLogger(__name__)


class PaintedScenes:
    """The scenes of a split from number 0 on; those that `wait` has waited for can be read."""

    def __init__(self, folder: Path, n: int) -> None:
        maps = _open(folder, n)
        self.images: npt.NDArray[np.uint8] = maps["images"]
        """[N, SIZE, SIZE, 3]"""
        self.tokens: npt.NDArray[np.int16] = maps["tokens"]
        """[N, WORDINGS, MAX_TOKENS]"""
        self.layout: npt.NDArray[np.uint8] = maps["layout"]
        """[N, SIZE / CELL, SIZE / CELL]: class of the object that covers a cell; `len(OBJECTS)` where there is none."""
        self.done: npt.NDArray[np.uint8] = maps[_DONE]
        """[N / CHUNK]: 1 for a chunk that is painted."""
        self._pending: dict[int, Future[None]] = {}

    def __len__(self) -> int:
        return len(self.images)

    def wait(self, n: int) -> None:
        """Wait until the first `n` scenes are painted.

        Raises:
            Exception: Whatever a painter raised.
        """
        for chunk in range(-(-n // CHUNK)):
            if (future := self._pending.get(chunk)) is not None:
                future.result()
                del self._pending[chunk]


@contextmanager
def painted_scenes(folder: Path, n: int, split: Split, dropout: WordDropout, n_workers: int) -> Iterator[PaintedScenes]:
    """The first `n` scenes of a split (rounded up to a multiple of `CHUNK`), which are painted during the block.

    What is painted already is kept; at the end of the block, what nobody waited for is left for the next time.

    Args:
        folder: Folder of the memory maps, 50 KB a scene.
        n: Number of scenes.
        split: Which scenes.
        dropout: What half of the texts lack; scenes that were painted with another are painted again.
        n_workers: Most processes that paint; 0 paints in a thread, as do a few scenes.

    Raises:
        OSError: There is no room for the maps.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settings = json.dumps({"split": split, "dropout": asdict(dropout)}, indent=2) + "\n"
    kept = folder / _SETTINGS
    if not kept.exists() or kept.read_text(encoding="utf-8") != settings:
        (folder / _DONE).unlink(missing_ok=True)
        write_text(kept, settings)
    n = -(-n // CHUNK) * CHUNK
    scenes = PaintedScenes(folder, n)
    missing = np.flatnonzero(scenes.done == 0).tolist()
    if not missing:
        yield scenes
        return
    logger.info("painting %d of %d scenes", len(missing) * CHUNK, n)
    with _executor(min(n_workers, len(missing) // CHUNKS_A_PROCESS)) as pool:
        try:
            for chunk in missing:
                scenes._pending[chunk] = pool.submit(_paint_into, folder, n, chunk, split, dropout)
            yield scenes
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _executor(n_workers: int) -> Executor:
    if not n_workers:
        return ThreadPoolExecutor(1)
    return ProcessPoolExecutor(n_workers, mp_context=get_context("spawn"), initializer=_give_way)


def _give_way() -> None:
    """Let the process that trains go first."""
    torch.set_num_threads(1)
    if hasattr(os, "nice"):
        os.nice(5)


def _open(folder: Path, n: int) -> dict[str, Any]:
    """The memory maps of `n` scenes, made or made longer where need be."""
    wanted = {name: (kind, (n, *shape)) for name, (kind, shape) in _MAPS.items()} | {_DONE: (np.uint8, (n // CHUNK,))}
    maps: dict[str, Any] = {}
    for name, (kind, shape) in wanted.items():
        size = int(np.prod(shape)) * np.dtype(kind).itemsize
        with (folder / name).open("ab") as file:
            if file.tell() < size:
                # Reserve it: where a map has no room on the disk, writing to it kills the process without a word.
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, size)
                else:
                    file.truncate(size)
        maps[name] = np.memmap(folder / name, dtype=kind, mode="r+", shape=shape)
    return maps


def _paint_into(folder: Path, n: int, chunk: int, split: Split, dropout: WordDropout) -> None:
    """Paint a chunk, and mark it."""
    maps = _open(folder, n)
    rows = slice(chunk * CHUNK, (chunk + 1) * CHUNK)
    scenes = [make_scene(number, split) for number in range(rows.start, rows.stop)]
    texts = [_text(scene, wording, dropout) for scene in scenes for wording in range(WORDINGS)]
    maps["tokens"][rows] = tokenize(texts).numpy().reshape(CHUNK, WORDINGS, MAX_TOKENS)
    for row, scene in zip(range(rows.start, rows.stop), scenes, strict=True):
        maps["images"][row], maps["layout"][row] = paint(scene).image, layout_of(scene)
    maps[_DONE][chunk] = 1


def _text(scene: Scene, wording: int, dropout: WordDropout) -> str:
    caption = caption_of(scene, wording)
    if wording < WORDINGS // 2:
        return caption.text
    return drop_words(np.random.default_rng([*scene.seed, 3, wording]), caption, dropout)


_tokenizer = None


def tokenize(texts: list[str]) -> Tensor:
    """Token ids [N, MAX_TOKENS] of captions.

    Raises:
        ValueError: A caption is too long for the model.
    """
    global _tokenizer
    if _tokenizer is None:
        _tokenizer = build_tokenizer()
    ids = _tokenizer(texts, padding="max_length", max_length=MAX_TOKENS).input_ids
    longest = max(range(len(ids)), key=lambda i: len(ids[i]))
    if len(ids[longest]) > MAX_TOKENS:
        raise ValueError(f"{texts[longest]!r} has {len(ids[longest])} tokens, more than {MAX_TOKENS}")
    return torch.tensor(ids)
