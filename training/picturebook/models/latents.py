"""Latents of many scenes with their captions as tokens, computed once and stored as safetensors shards."""

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor

from core.files import write_atomically
from training.picturebook.models.autoencoder import to_pixels
from training.picturebook.models.loop import Batch
from training.picturebook.world.captions import Split
from training.picturebook.world.dropout import WordDropout, drop_words
from training.picturebook.world.scenes import Scene, caption_of, layout_of, make_scene, paint
from training.picturebook.world.tokens import MAX_TOKENS, build_tokenizer

SHARD = 2048
"""Scenes in a shard."""
WORDINGS = 16
"""Texts stored for each scene: captions in the first half, captions after word dropout in the second."""
DROPPED_P = (0.7, 0.3)
"""Probability that training uses a text of the second half, at the least noisy timestep and at the noisiest.

Once an object is visible, a good denoiser does not need its name. A small one still relies on it, which would count
bits for a word without information: so words are dropped most where the image shows most.
"""
_CHUNK = 64

logger = logging.getLogger(__name__)


class Latents(NamedTuple):
    """What the denoiser is trained on."""

    latents: Tensor
    """[N, C, h, w] float16, each channel standardised."""
    tokens: Tensor
    """[N, WORDINGS, MAX_TOKENS] int16."""
    layout: Tensor
    """[N, h, w] uint8: class of the object that covers a cell; `len(OBJECTS)` where there is none."""


class LayoutRows(NamedTuple):
    """Rows of `Latents` whose captions say most about the layout."""

    placed: Tensor
    """Two objects in a stated relation."""
    crowded: Tensor
    """Three objects."""


def compute_latents(
    autoencoder: AutoencoderKL, n_scenes: int, folder: Path, split: Split, dropout: WordDropout, n_workers: int
) -> None:
    """Paint and encode `n_scenes` scenes (rounded up to a multiple of 64); existing shards are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    device = next(autoencoder.parameters()).device
    with _painters(n_workers) as paint_all:
        for shard in range(-(-n_scenes // SHARD)):
            target = folder / f"{split}-{shard:05d}.safetensors"
            if target.exists():
                continue
            starts = range(shard * SHARD, min((shard + 1) * SHARD, n_scenes), _CHUNK)
            chunks = paint_all(partial(_paint_chunk, split=split, dropout=dropout), starts)
            parts: dict[str, list[Tensor]] = {name: [] for name in Latents._fields}
            for images, ids, layout in chunks:
                parts["latents"].append(_encode(autoencoder, to_pixels(images).to(device)).half().cpu())
                parts["tokens"].append(torch.from_numpy(ids))
                parts["layout"].append(torch.from_numpy(layout))
            with write_atomically(target) as part:
                save_file({name: torch.cat(tensors) for name, tensors in parts.items()}, part)
            logger.info("latents: shard %d of %d", shard + 1, -(-n_scenes // SHARD))


@contextmanager
def _painters(n_workers: int) -> Iterator[Callable[..., Iterator[Any]]]:
    """A `map` over processes that run ahead, or, with none, the plain one."""
    if not n_workers:
        yield map
        return
    with ProcessPoolExecutor(n_workers, mp_context=get_context("spawn")) as pool:
        yield pool.map


def load_latents(folder: Path, split: Split) -> Latents:
    """All shards of a split."""
    shards = [load_file(path) for path in sorted(folder.glob(f"{split}-*.safetensors"))]
    return Latents(*(torch.cat([shard[name] for shard in shards]) for name in Latents._fields))


def draw_batch(
    data: Latents,
    number: int,
    n: int,
    timesteps: int,
    noisy: float = 0.0,
    crowded: float = 0.0,
    layout_rows: LayoutRows | None = None,
) -> Batch:
    """Batch `number`: latents, one text of each scene, noise, and timesteps stratified over the batch.

    noisy: fraction of samples moved to the noisiest third of the timesteps, where layout is decided.
    crowded: fraction of these with three objects; the others have a relation.
    layout_rows: rows of `data` from which these samples come; None: from all, like the others.
    """
    generator = torch.Generator().manual_seed(number)
    rows = torch.randint(len(data.latents), (n,), generator=generator)
    u = (torch.randperm(n, generator=generator) + torch.rand(n, generator=generator)) / n
    if layout_rows is not None:
        of_three = torch.rand(n, generator=generator) < crowded
        for group, wanted in zip(layout_rows, (~of_three, of_three), strict=True):
            if len(group):
                theirs = group[torch.randint(len(group), (n,), generator=generator)]
                rows = torch.where((u < noisy) & wanted, theirs, rows)
    latents = data.latents[rows].float()
    times = torch.where(u < noisy, 2 / 3 + u / max(noisy, 1e-9) / 3, (u - noisy) / (1 - noisy))
    dropped = torch.rand(n, generator=generator) < DROPPED_P[0] + (DROPPED_P[1] - DROPPED_P[0]) * times
    half = WORDINGS // 2
    wordings = torch.randint(half, (n,), generator=generator) + half * dropped
    return {
        "latents": latents,
        "tokens": data.tokens[rows, wordings].long(),
        "noise": torch.randn(latents.shape, generator=generator),
        "timesteps": (times * timesteps).long().clamp(max=timesteps - 1),
        "layout": data.layout[rows].long(),
    }


def draw_captions(data: Latents, number: int, n: int) -> Batch:
    """Batch `number` of whole captions with the layouts of their scenes."""
    generator = torch.Generator().manual_seed(number)
    rows = torch.randint(len(data.latents), (n,), generator=generator)
    wordings = torch.randint(WORDINGS // 2, (n,), generator=generator)
    return {"tokens": data.tokens[rows, wordings].long(), "layout": data.layout[rows].long()}


class _Chunk(NamedTuple):
    images: npt.NDArray[np.uint8]
    """[_CHUNK, H, W, 3]"""
    tokens: npt.NDArray[np.int16]
    """[_CHUNK, WORDINGS, MAX_TOKENS]"""
    layout: npt.NDArray[np.uint8]
    """[_CHUNK, h, w]"""


def _paint_chunk(start: int, split: Split, dropout: WordDropout) -> _Chunk:
    """The scenes from `start` on."""
    scenes = [make_scene(start + i, split) for i in range(_CHUNK)]
    texts = [_text(scene, wording, dropout) for scene in scenes for wording in range(WORDINGS)]
    ids = tokenize(texts).numpy().astype(np.int16)
    return _Chunk(
        np.stack([paint(scene).image for scene in scenes]),
        ids.reshape(_CHUNK, WORDINGS, MAX_TOKENS),
        np.stack([layout_of(scene) for scene in scenes]),
    )


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


@torch.no_grad()
def _encode(autoencoder: AutoencoderKL, pixels: Tensor) -> Tensor:
    with torch.autocast(pixels.device.type, torch.bfloat16):
        mean: Tensor = autoencoder.encode(pixels.contiguous(memory_format=torch.channels_last)).latent_dist.mode()
    return mean.float().contiguous()
