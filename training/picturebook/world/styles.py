"""Styles: filters that turn a plainly painted scene into a watercolour, pixels, sepia, night or a poster.

All act on broad areas and colours, so that they survive an autoencoder with eight channels per 8 x 8 pixels.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter

Pixels = npt.NDArray[np.uint8]
Painter = Callable[[Image.Image, np.random.Generator], Image.Image]


def apply_style(style: str, image: Pixels, rng: np.random.Generator) -> Pixels:
    """The image [H, W, 3] in a style."""
    if style == "plain":
        return image
    return np.asarray(_STYLES[style](Image.fromarray(image), rng))


def _watercolour(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    soft = np.asarray(image.filter(ImageFilter.GaussianBlur(0.9)), dtype=np.float32)
    grid = Image.fromarray(rng.uniform(0.12, 0.48, (9, 9)).astype(np.float32))
    wash = np.asarray(grid.resize(image.size, Image.Resampling.BICUBIC))[..., None]
    paper = np.array((252, 248, 238), dtype=np.float32)
    return Image.fromarray((soft + wash * (paper - soft)).clip(0, 255).astype(np.uint8))


def _pixel(image: Image.Image, rng: np.random.Generator) -> Image.Image:  # noqa: ARG001
    small = image.resize((image.width // 4, image.height // 4), Image.Resampling.BOX)
    return small.point(lambda v: (v // 36) * 36 + 18).resize(image.size, Image.Resampling.NEAREST)


def _sepia(image: Image.Image, rng: np.random.Generator) -> Image.Image:  # noqa: ARG001
    return image.convert("RGB", (0.36, 0.62, 0.14, 12, 0.29, 0.53, 0.12, 2, 0.20, 0.38, 0.09, 0))


def _night(image: Image.Image, rng: np.random.Generator) -> Image.Image:  # noqa: ARG001
    return image.convert("RGB", (0.42, 0.12, 0.02, 0, 0.08, 0.46, 0.08, 4, 0.10, 0.24, 0.40, 64))


def _poster(image: Image.Image, rng: np.random.Generator) -> Image.Image:  # noqa: ARG001
    vivid = image.convert("RGB", (1.50, -0.42, -0.08, 0, -0.20, 1.30, -0.10, 0, -0.20, -0.42, 1.62, 0))
    return vivid.filter(ImageFilter.MedianFilter(3)).point(
        lambda v: 24 if v < 56 else 92 if v < 118 else 160 if v < 182 else 214 if v < 232 else 250
    )


_STYLES: dict[str, Painter] = {
    "watercolour": _watercolour,
    "pixel": _pixel,
    "sepia": _sepia,
    "night": _night,
    "poster": _poster,
}
