"""Latents of many scenes with their captions as tokens, computed once and stored as safetensors shards."""

import hashlib
import logging
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from core.files import write_atomically
from training.picturebook.models.autoencoder import to_pixels
from training.picturebook.models.loop import Batch
from training.picturebook.models.painting import WORDINGS, PaintedScenes
from training.picturebook.models.resident import on_device
from training.picturebook.world.captions import Split

SHARD = 2048
"""Scenes in a shard."""
DROPPED_P = (0.7, 0.3)
"""Probability that training uses a text of the second half, at the least noisy timestep and at the noisiest.

Once an object is visible, a good denoiser does not need its name. A small one still relies on it, which would count
bits for a word without information: so words are dropped most where the image shows most.
"""
_MADE_WITH = "made_with"

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


def compute_latents(autoencoder: AutoencoderKL, scenes: PaintedScenes, folder: Path, split: Split) -> None:
    """Encode scenes as they get painted; shards that exist and hold the same are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    device = next(autoencoder.parameters()).device
    n_at_once = 64 if device.type == "cpu" else 1024
    weights = hashlib.sha256()
    for value in autoencoder.state_dict().values():
        weights.update(value.cpu().contiguous().numpy().tobytes())
    n_shards = -(-len(scenes) // SHARD)
    for path in sorted(folder.glob(f"{split}-*.safetensors"))[n_shards:]:
        path.unlink()  # of a longer run
    for shard in range(n_shards):
        rows = slice(shard * SHARD, min((shard + 1) * SHARD, len(scenes)))
        scenes.wait(rows.stop)
        tokens, layout = (torch.from_numpy(np.array(part[rows])) for part in (scenes.tokens, scenes.layout))
        made_with = weights.copy()
        made_with.update(tokens.numpy().tobytes())
        target = folder / f"{split}-{shard:05d}.safetensors"
        if target.exists() and _made_with(target) == made_with.hexdigest():
            continue
        images = torch.split(torch.from_numpy(scenes.images[rows]), n_at_once)
        latents = torch.cat([_encode(autoencoder, to_pixels(part.to(device))).half().cpu() for part in images])
        with write_atomically(target) as part:
            tensors = Latents(latents, tokens, layout)._asdict()
            save_file(tensors, part, metadata={_MADE_WITH: made_with.hexdigest()})
        logger.info("latents: shard %d of %d", shard + 1, n_shards)


def _made_with(path: Path) -> str | None:
    """Hash of the autoencoder and the texts that a shard was made with."""
    with safe_open(path, "pt") as file:
        return (file.metadata() or {}).get(_MADE_WITH)


def load_latents(folder: Path, split: Split, device: torch.device | str = "cpu") -> Latents:
    """All shards of a split, on the device if they leave room there, else in the host's memory."""
    shards = [load_file(path) for path in sorted(folder.glob(f"{split}-*.safetensors"))]
    return Latents(*on_device([torch.cat([shard[name] for shard in shards]) for name in Latents._fields], device))


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

    It is drawn where the data are, and depends on the number and the kind of device alone.

    noisy: fraction of samples moved to the noisiest third of the timesteps, where layout is decided.
    crowded: fraction of these with three objects; the others have a relation.
    layout_rows: rows of `data` from which these samples come; None: from all, like the others.
    """
    device = data.latents.device
    generator = torch.Generator(device).manual_seed(number)
    rows = torch.randint(len(data.latents), (n,), generator=generator, device=device)
    u = (torch.randperm(n, generator=generator, device=device) + torch.rand(n, generator=generator, device=device)) / n
    if layout_rows is not None:
        of_three = torch.rand(n, generator=generator, device=device) < crowded
        for group, wanted in zip(layout_rows, (~of_three, of_three), strict=True):
            if len(group):
                theirs = group[torch.randint(len(group), (n,), generator=generator, device=device)]
                rows = torch.where((u < noisy) & wanted, theirs, rows)
    latents = data.latents[rows].float()
    times = torch.where(u < noisy, 2 / 3 + u / max(noisy, 1e-9) / 3, (u - noisy) / (1 - noisy))
    dropped = torch.rand(n, generator=generator, device=device) < DROPPED_P[0] + (DROPPED_P[1] - DROPPED_P[0]) * times
    half = WORDINGS // 2
    wordings = torch.randint(half, (n,), generator=generator, device=device) + half * dropped
    return {
        "latents": latents,
        "tokens": data.tokens[rows, wordings].long(),
        "noise": torch.randn(latents.shape, generator=generator, device=device),
        "timesteps": (times * timesteps).long().clamp(max=timesteps - 1),
        "layout": data.layout[rows].long(),
    }


def draw_captions(data: Latents, number: int, n: int) -> Batch:
    """Batch `number` of whole captions with the layouts of their scenes."""
    device = data.latents.device
    generator = torch.Generator(device).manual_seed(number)
    rows = torch.randint(len(data.latents), (n,), generator=generator, device=device)
    wordings = torch.randint(WORDINGS // 2, (n,), generator=generator, device=device)
    return {"tokens": data.tokens[rows, wordings].long(), "layout": data.layout[rows].long()}


@torch.no_grad()
def _encode(autoencoder: AutoencoderKL, pixels: Tensor) -> Tensor:
    with torch.autocast(pixels.device.type, torch.bfloat16):
        mean: Tensor = autoencoder.encode(pixels.contiguous(memory_format=torch.channels_last)).latent_dist.mode()
    return mean.float().contiguous()
