"""Latents of many scenes with their captions as tokens, computed once, kept as shards of safetensors."""

import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor

from training.loop import Batch
from training.picturebook.autoencoder import to_pixels
from training.picturebook.captions import Split, drop_words
from training.picturebook.scenes import caption_of, make_scene, paint
from training.picturebook.tokens import MAX_TOKENS, build_tokenizer

SHARD = 2048
"""Scenes in a shard."""
TELLINGS = 16
"""Captions kept for each scene, words dropped as training wants them."""
_CHUNK = 64

logger = logging.getLogger(__name__)


class Latents(NamedTuple):
    """What the denoiser is trained on."""

    latents: Tensor
    """[N, C, h, w] float16, standardised a channel."""
    tokens: Tensor
    """[N, TELLINGS, MAX_TOKENS] int16."""


def compute_latents(autoencoder: AutoencoderKL, n_scenes: int, folder: Path, split: Split, n_workers: int) -> None:
    """Paint and encode `n_scenes` scenes (rounded up to a multiple of 64); shards already there are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    device = next(autoencoder.parameters()).device
    with _painters(n_workers) as paint_all:
        for shard in range(-(-n_scenes // SHARD)):
            target = folder / f"{split}-{shard:05d}.safetensors"
            if target.exists():
                continue
            starts = range(shard * SHARD, min((shard + 1) * SHARD, n_scenes), _CHUNK)
            chunks = paint_all(_paint_chunk, starts, [split] * len(starts))
            parts, tokens = [], []
            for images, ids in chunks:
                parts.append(_encode(autoencoder, to_pixels(images).to(device)).cpu())
                tokens.append(torch.from_numpy(ids))
            part = target.with_suffix(".part")
            save_file({"latents": torch.cat(parts).half(), "tokens": torch.cat(tokens)}, part)
            os.replace(part, target)
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
    return Latents(torch.cat([s["latents"] for s in shards]), torch.cat([s["tokens"] for s in shards]))


def draw_batch(data: Latents, number: int, n: int, timesteps: int) -> Batch:
    """Batch `number`: latents, one of each scene's captions, noise, and timesteps stratified over the batch."""
    generator = torch.Generator().manual_seed(number)
    rows = torch.randint(len(data.latents), (n,), generator=generator)
    tellings = torch.randint(TELLINGS, (n,), generator=generator)
    latents = data.latents[rows].float()
    strata = (torch.randperm(n, generator=generator) + torch.rand(n, generator=generator)) / n
    return {
        "latents": latents,
        "tokens": data.tokens[rows, tellings].long(),
        "noise": torch.randn(latents.shape, generator=generator),
        "timesteps": (strata * timesteps).long(),
    }


def _paint_chunk(start: int, split: Split) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int16]]:
    """Pictures [_CHUNK, H, W, 3] and captions [_CHUNK, TELLINGS, MAX_TOKENS] of the scenes from `start` on."""
    scenes = [make_scene(start + i, split) for i in range(_CHUNK)]
    images = np.stack([paint(scene).image for scene in scenes])
    texts = [
        drop_words(np.random.default_rng([*scene.seed, 3, telling]), caption_of(scene, telling).text)
        for scene in scenes
        for telling in range(TELLINGS)
    ]
    ids = tokenize(texts).numpy().astype(np.int16)
    return images, ids.reshape(_CHUNK, TELLINGS, MAX_TOKENS)


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
