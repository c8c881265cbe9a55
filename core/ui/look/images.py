"""Images as the page sends them: data URLs, and maps of bits as coloured overlays."""

import base64
import io

import numpy as np
from PIL import Image

from core.arrays import Floats
from core.ui.look.colours import scale_rgb, signed_rgb

_LAYER_SIDE = 160
"""Side to which a map is interpolated before it is coloured, so that only values are mixed, not colours."""
_FULL_ALPHA_FROM = 0.35
"""From this share of the largest value on, a map hides the image; below, it fades until zero is transparent."""


def data_url(image: Image.Image, quality: int | None = None) -> str:
    """A WebP data URL; lossless unless a quality is given."""
    buffer = io.BytesIO()
    if quality is None:
        image.save(buffer, "WEBP", lossless=True, method=2)
    else:
        image.save(buffer, "WEBP", quality=quality, method=2)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def layer(bits: Floats, half_width: Floats, top: float) -> Image.Image:
    """A map [h, w] of bits as an RGBA image: coloured up to `top`, and like zero where the error exceeds the value."""
    share = np.clip(_enlarge(_certain_share(bits, half_width, top)), 0, 1)
    return _with_alpha(scale_rgb(share), share)


def signed_layer(bits: Floats, half_width: Floats, top: float) -> Image.Image:
    """A signed map [h, w] of bits as an RGBA image; `top` is the largest absolute value."""
    share = np.clip(_enlarge(_certain_share(bits, half_width, top)), -1, 1)
    return _with_alpha(signed_rgb(share), np.abs(share))


def _certain_share(bits: Floats, half_width: Floats, top: float) -> Floats:
    """[h, w] fractions of `top`, zero where the error is as large as the value."""
    certain = np.clip(2 * (1 - half_width / np.maximum(np.abs(bits), 1e-12)), 0, 1)
    return np.asarray(np.clip(bits / max(top, 1e-12), -1, 1) * certain)


def _with_alpha(rgb: Floats, size: Floats) -> Image.Image:
    """Colours [H, W, 3] as an RGBA image that fades where `size` is small: zero, or uncertain, is transparent."""
    alpha = np.clip(size / _FULL_ALPHA_FROM, 0, 1) ** 1.5
    rgba = np.concatenate([rgb, alpha[..., None]], axis=-1)
    return Image.fromarray((rgba * 255).round().astype(np.uint8), "RGBA")


def _enlarge(values: Floats) -> Floats:
    image = Image.fromarray(values.astype(np.float32))
    height, width = values.shape
    scale = _LAYER_SIDE / max(height, width)
    size = (max(round(width * scale), 1), max(round(height * scale), 1))
    return np.asarray(image.resize(size, Image.Resampling.BICUBIC), dtype=np.float64)
