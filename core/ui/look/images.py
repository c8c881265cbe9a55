"""Pictures as the page sends them: data URLs, and bits as coloured layers."""

import base64
import io

import numpy as np
from PIL import Image

from core.arrays import Floats
from core.ui.look.colours import scale_rgb, signed_rgb

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


def layer(bits: Floats, half_width: Floats, top: float) -> Image.Image:
    """A map [h, w] as an RGBA picture: colour by bits up to `top`; where the error exceeds the value, that of none."""
    share = np.clip(_enlarge(_certain_share(bits, half_width, top)), 0, 1)
    return _seen_through(scale_rgb(share), share)


def signed_layer(bits: Floats, half_width: Floats, top: float) -> Image.Image:
    """The same of a map whose bits have a sign, `top` being the largest either way."""
    share = np.clip(_enlarge(_certain_share(bits, half_width, top)), -1, 1)
    return _seen_through(signed_rgb(share), np.abs(share))


def _certain_share(bits: Floats, half_width: Floats, top: float) -> Floats:
    """[h, w] shares of `top`, none where the error is as large as the value."""
    sure = np.clip(2 * (1 - half_width / np.maximum(np.abs(bits), 1e-12)), 0, 1)
    return np.asarray(np.clip(bits / max(top, 1e-12), -1, 1) * sure)


def _seen_through(rgb: Floats, size: Floats) -> Image.Image:
    """Colours [H, W, 3] as an RGBA picture: where there is little, more of the picture shows through.

    Not more see-through where unsure: a bright picture behind would look like many bits.
    """
    alpha = _SEEN_THROUGH + (1 - _SEEN_THROUGH) * size
    rgba = np.concatenate([rgb, alpha[..., None]], axis=-1)
    return Image.fromarray((rgba * 255).round().astype(np.uint8), "RGBA")


def _enlarge(values: Floats) -> Floats:
    image = Image.fromarray(values.astype(np.float32))
    height, width = values.shape
    scale = _LAYER_SIDE / max(height, width)
    size = (max(round(width * scale), 1), max(round(height * scale), 1))
    return np.asarray(image.resize(size, Image.Resampling.BICUBIC), dtype=np.float64)
