"""The autoencoder: 128 x 128 pixels to 16 x 16 cells and back, trained on crops around the objects."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor, nn

from training.picturebook.models.loop import Batch
from training.picturebook.models.painting import PaintedScenes
from training.picturebook.models.resident import fits
from training.picturebook.world.backgrounds import SIZE
from training.picturebook.world.scenes import CELL, make_scene, paint
from training.picturebook.world.world import OBJECTS

AROUND_OBJECT_P = 0.75
"""Fraction of the crops that are around an object."""


@dataclass(frozen=True)
class AutoencoderConfig:
    """Shape and loss of the autoencoder."""

    block_out_channels: tuple[int, ...] = (32, 32, 96, 192)
    """Channels at 128, 64, 32 and 16 pixels."""
    latent_channels: int = 8
    """Channels of a latent, which encodes 8 x 8 pixels."""
    crop: int = 64
    """Side of the training crops in pixels."""
    kl_weight: float = 1e-6
    """Weight of the KL divergence to a standard normal, summed over a latent, against the mean pixel error."""
    edge_weight: float = 1.0
    """Weight of the error of the differences between neighbouring pixels, which is what blur gets wrong."""


def build_autoencoder(config: AutoencoderConfig) -> AutoencoderKL:
    """An untrained `AutoencoderKL` without attention in the middle: distant cells are independent."""
    n = len(config.block_out_channels)
    autoencoder = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * n,
        up_block_types=("UpDecoderBlock2D",) * n,
        block_out_channels=config.block_out_channels,
        layers_per_block=1,
        latent_channels=config.latent_channels,
        norm_num_groups=16,
        mid_block_add_attention=False,
        sample_size=SIZE,
    )
    # Start with a posterior far narrower than its mean's spread: at its usual start the noise is as large as a latent
    # can be, and the first hundreds of steps are spent on growing out of it.
    with torch.no_grad():
        log_variance = autoencoder.quant_conv.bias[config.latent_channels :]
        log_variance.fill_(-6.0)
        autoencoder.quant_conv.weight[config.latent_channels :].mul_(0.1)
    return autoencoder


def to_pixels(image: npt.NDArray[np.uint8] | Tensor) -> Tensor:
    """Images [..., H, W, 3] in 0..255 as tensors [..., 3, H, W] in -1..1."""
    levels = image if isinstance(image, Tensor) else torch.from_numpy(image)
    return levels.movedim(-1, -3).float() / 127.5 - 1


def to_image(pixels: Tensor) -> Image.Image:
    """One tensor [3, H, W] in -1..1 as an image."""
    array = ((pixels.clamp(-1, 1) + 1) * 127.5 + 0.5).to(torch.uint8).movedim(0, -1)
    return Image.fromarray(array.cpu().numpy())


def psnr(pixels: Tensor, rebuilt: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of images in -1..1, from the mean squared error over all of them."""
    return float(10 * torch.log10(4 / (pixels - rebuilt.clamp(-1, 1)).square().mean()))


class CropSource:
    """Crops of painted scenes, drawn where the model is, while the scenes are still being painted.

    Batch i knows the first `FIRST + i * PER_BATCH` scenes, rounded to whole blocks, and waits until they are painted:
    what it holds depends on its number alone.
    """

    FIRST = 2048
    """Scenes before the first batch."""
    PER_BATCH = 128
    """Scenes that each batch adds: about what fifteen processes paint while a GPU takes a step."""
    BLOCK = 1024
    """Scenes that are copied to the device together."""

    def __init__(self, scenes: PaintedScenes, crop: int, device: torch.device) -> None:
        self.scenes, self.crop = scenes, crop
        # On a CPU, and where a GPU has no room, these are the memory maps themselves.
        self._images, self._layout = torch.from_numpy(scenes.images), torch.from_numpy(scenes.layout)
        self._n_copied = len(scenes)
        if device.type != "cpu" and fits(self._images.nbytes, device):
            self._images, self._layout = (torch.empty_like(t, device=device) for t in (self._images, self._layout))
            self._n_copied = 0

    def __call__(self, number: int, n: int) -> Batch:
        """Batch `number` of `n` crops on the grid of cells, three in four around a cell of an object."""
        known = self._known(number)
        self.scenes.wait(known)
        self._copy(known)
        device, side = self._images.device, self.crop // CELL
        generator = torch.Generator(device).manual_seed(number)
        rows = torch.randint(known, (n,), generator=generator, device=device)
        # Top left corners in cells.
        corners = torch.randint(SIZE // CELL - side + 1, (2, n), generator=generator, device=device)
        covered = (self._layout[rows] < len(OBJECTS)).flatten(1).float()
        cells = torch.multinomial(covered, 1, generator=generator).flatten()
        around = torch.stack([cells // (SIZE // CELL), cells % (SIZE // CELL)]) - side // 2
        on_object = torch.rand(n, generator=generator, device=device) < AROUND_OBJECT_P
        y, x = torch.where(on_object, around.clamp(0, SIZE // CELL - side), corners) * CELL
        span = torch.arange(self.crop, device=device)
        crops = self._images[rows[:, None, None], (y[:, None] + span)[:, :, None], (x[:, None] + span)[:, None, :]]
        return {"pixels": to_pixels(crops)}

    def _known(self, number: int) -> int:
        """How many scenes a batch draws from."""
        return min((self.FIRST + number * self.PER_BATCH) // self.BLOCK * self.BLOCK, len(self.scenes))

    def _copy(self, n: int) -> None:
        """Copy what the first `n` scenes lack on the device."""
        new = slice(self._n_copied, n)
        if new.start < n:
            self._images[new].copy_(torch.from_numpy(self.scenes.images[new]))
            self._layout[new].copy_(torch.from_numpy(self.scenes.layout[new]))
            self._n_copied = n


class AutoencoderLoss(nn.Module):
    """Error of pixels (L1 and MSE) and of their differences (L1), plus a small KL term."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.autoencoder = build_autoencoder(config)
        self.autoencoder.to(memory_format=torch.channels_last)

    def forward(self, pixels: Tensor) -> Tensor:
        """Loss of images [B, 3, H, W] in -1..1."""
        posterior = self.autoencoder.encode(pixels.contiguous(memory_format=torch.channels_last)).latent_dist
        rebuilt = self.autoencoder.decode(posterior.sample()).sample.float()
        edges = F.l1_loss(rebuilt.diff(dim=-1), pixels.diff(dim=-1)) + F.l1_loss(
            rebuilt.diff(dim=-2), pixels.diff(dim=-2)
        )
        error = F.l1_loss(rebuilt, pixels) + F.mse_loss(rebuilt, pixels) + self.config.edge_weight * edges
        loss: Tensor = error + self.config.kl_weight * posterior.kl().mean()
        return loss


class AutoencoderTask:
    """The training task of the autoencoder."""

    name = "autoencoder"
    draws_on_device = True
    compiled: Sequence[nn.Module] = ()

    def __init__(self, config: AutoencoderConfig, scenes: PaintedScenes, device: torch.device) -> None:
        self.config, self.crops = config, CropSource(scenes, config.crop, device)
        self.model: nn.Module = AutoencoderLoss(config)

    def batch_maker(self, n: int) -> Callable[[int], Batch]:
        """Batches of crops."""
        return partial(self.crops, n=n)

    def show(self, model: nn.Module, path: Path) -> dict[str, float]:
        """PSNR on 64 held-out scenes; an image of 16 of them above their reconstructions."""
        assert isinstance(model, AutoencoderLoss)
        device = next(model.parameters()).device
        images = np.stack([paint(make_scene(i, "test")).image for i in range(64)])
        pixels = to_pixels(images).to(device)
        rebuilt = torch.cat([reconstruct(model.autoencoder, part) for part in torch.split(pixels, 16)])
        sheet = Image.new("RGB", (8 * SIZE, 4 * SIZE))
        for i in range(16):
            x, y = i % 8 * SIZE, i // 8 * 2 * SIZE
            sheet.paste(to_image(pixels[i]), (x, y))
            sheet.paste(to_image(rebuilt[i]), (x, y + SIZE))
        sheet.save(path, quality=90)
        return {"psnr": psnr(pixels, rebuilt)}


@torch.no_grad()
def reconstruct(autoencoder: AutoencoderKL, pixels: Tensor) -> Tensor:
    """Reconstructions of images [B, 3, H, W] through the posterior mean."""
    rebuilt: Tensor = autoencoder.decode(autoencoder.encode(pixels).latent_dist.mode()).sample
    return rebuilt.float()
