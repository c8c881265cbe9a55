"""Pictures as the page sends them: data URLs, and bits as coloured layers."""

import base64
import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from core.ui.colours import scale_rgb

_LAYER_SIDE = 160
"""Pixels to which a map is interpolated before it is coloured, so that no colours are mixed across the scale."""
_SEEN_THROUGH = 0.65
"""Opacity of a cell without bits, as a part of that of the largest."""


def data_url(image: Image.Image, quality: int | None = None) -> str:
    """A WebP data URL; lossless unless a quality is given."""
    buffer = io.BytesIO()
    if quality is None:
        image.save(buffer, "WEBP", lossless=True, method=2)
    else:
        image.save(buffer, "WEBP", quality=quality, method=2)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def layer(bits: NDArray[np.float64], half_width: NDArray[np.float64], top: float) -> Image.Image:
    """A map [h, w] as an RGBA picture: colour by bits up to `top`; where the error exceeds the value, that of none."""
    sure = np.clip(2 * (1 - half_width / np.maximum(bits, 1e-12)), 0, 1)
    # Not see-through where unsure: a bright picture behind would look like many bits.
    share = _enlarge(np.clip(bits / max(top, 1e-12), 0, 1) * sure)
    # Where a word told little, more of the picture shows through.
    alpha = _SEEN_THROUGH + (1 - _SEEN_THROUGH) * share
    rgba = np.concatenate([scale_rgb(share), alpha[..., None]], axis=-1)
    return Image.fromarray((rgba * 255).round().astype(np.uint8), "RGBA")


def _enlarge(values: NDArray[np.float64]) -> NDArray[np.float64]:
    image = Image.fromarray(values.astype(np.float32))
    height, width = values.shape
    scale = _LAYER_SIDE / max(height, width)
    size = (max(round(width * scale), 1), max(round(height * scale), 1))
    return np.clip(np.asarray(image.resize(size, Image.Resampling.BICUBIC), dtype=np.float64), 0, 1)
