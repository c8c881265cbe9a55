"""The autoencoder (VAE) of a Stable Diffusion pipeline: from images to latents and back."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from core.diffusion.images import prepare_image
from core.errors import NotFiniteError
from core.hardware.batch_sizer import REMEDY, BatchSizer, Load, memory_format_for
from core.hardware.finite import NAMES, SAMPLER, check_finite

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

log = logging.getLogger(__name__)

ResultT = TypeVar("ResultT")

_PART = NAMES["vae"]
_MAPS_PER_IMAGE = 6
"""Memory that decoding an image takes, in feature maps of the decoder's last level: 384 MiB for SD v1.4 in float16,
plus the workspace of its convolutions."""


class LatentCodec:
    """Encodes images to latents and decodes them, in the VAE's own dtype."""

    image_size: int
    """Side of the images in pixels."""

    def __init__(self, vae: "AutoencoderKL", latent_side: int, device: torch.device, sizer: BatchSizer) -> None:
        """`sizer` decides how many latents are decoded at once."""
        self._vae, self._device, self._sizer = vae, device, sizer
        self._dtype: torch.dtype = vae.dtype
        self._memory_format = memory_format_for(device)
        self._width, n_levels = int(vae.config.block_out_channels[0]), len(vae.config.block_out_channels)
        self._scaling_factor = float(vae.config.scaling_factor)
        self.image_size = latent_side * 2 ** (n_levels - 1)

    @torch.no_grad()
    def encode(self, image: Image.Image | str | Path) -> Tensor:
        """Latents [1, C, h, w], float32, of an image of any size: the posterior's mean times the scaling factor.

        Raises:
            NotFiniteError: They are not finite in float32 either.
        """
        pixels = np.asarray(prepare_image(image, self.image_size), dtype=np.float32) / 127.5 - 1
        return self._in_range(self._encode, torch.from_numpy(pixels).permute(2, 0, 1)[None])

    def _encode(self, pixels: Tensor) -> Tensor:
        x = pixels.to(self._device, self._dtype, memory_format=self._memory_format)
        load = Load("the encoder", self._dtype)
        mean: Tensor = self._sizer.run(load, 1, 1, lambda _: self._vae.encode(x).latent_dist.mean, remedy=REMEDY)[0]
        check_finite(mean, _PART, self._dtype)
        return mean.float() * self._scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> list[Image.Image]:
        """Images of latents [N, C, h, w], as many at once as fit into memory.

        Raises:
            NotFiniteError: The latents are not finite, or the images in float32 either.
        """
        return self._in_range(self._decode_all, latents)

    def _decode_all(self, latents: Tensor) -> list[Image.Image]:
        load = Load("the decoder", self._dtype)
        estimate = _MAPS_PER_IMAGE * self._width * self.image_size**2 * self._dtype.itemsize
        n = len(latents)
        rows = self._sizer.fits(load, n, estimate, lambda n: self._decode(latents[:n]))
        parts = self._sizer.run(load, n, rows, lambda part: self._decode(latents[part]), remedy=REMEDY)
        return [image for part in parts for image in part]

    def _decode(self, latents: Tensor) -> list[Image.Image]:
        x = latents.to(self._device, self._dtype, memory_format=self._memory_format) / self._scaling_factor
        pixels = self._vae.decode(x, return_dict=False)[0].float()
        is_finite = pixels.isfinite().all()  # read below, after the copy that waits for the device anyway
        values = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        if not is_finite:
            check_finite(latents, SAMPLER, latents.dtype)
            raise NotFiniteError(_PART, self._dtype)
        return [Image.fromarray(value) for value in values]

    def _in_range(self, compute: Callable[[Tensor], ResultT], given: Tensor) -> ResultT:
        """`compute(given)`; if half precision overflows, the autoencoder computes in float32 from then on."""
        try:
            return compute(given)
        except NotFiniteError as error:
            if self._dtype == torch.float32 or error.part != _PART:
                raise
            log.warning(
                "the autoencoder's values are not finite in %s: it computes in float32 from now on", error.dtype
            )
            torch.nn.Module.to(self._vae, torch.float32)
            self._dtype = torch.float32
            return compute(given)
