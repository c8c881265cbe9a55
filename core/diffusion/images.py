"""Preparation of user images for a model. Imports no torch."""

import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from core.errors import ImageError

MIN_SIDE = 16
"""Minimum side in pixels."""
MAX_PIXELS = 50_000_000
"""Maximum number of pixels, checked before an image is decoded into memory."""


def prepare_image(image: Image.Image | str | Path, size: int) -> Image.Image:
    """A square RGB image of `size` pixels: turned as its EXIF says, on white, centre-cropped, resized.

    Args:
        image: A PIL image of any mode, or the path of a file; of an animation, the first frame is used.
        size: Side in pixels.

    Raises:
        ImageError: It is no image, or too small, too large or damaged.
    """
    if isinstance(image, str | Path):
        image = _open(Path(image))
    if not isinstance(image, Image.Image):
        raise ImageError(f"An image is needed (a PIL image or the path of a file), not {type(image).__name__}.")
    check_size(*image.size)
    try:
        image = ImageOps.exif_transpose(image)
        rgb = _on_white(image)
    except (OSError, SyntaxError, ValueError) as error:
        raise ImageError(f"The image's data is damaged ({error}). Save it again as PNG or JPEG.") from error
    return ImageOps.fit(rgb, (size, size), Image.Resampling.LANCZOS)


def check_size(width: int, height: int) -> None:
    """Raise an `ImageError` for an image that is too small or too large."""
    if min(width, height) < MIN_SIDE:
        raise ImageError(f"The image has {width} x {height} pixels; at least {MIN_SIDE} on each side are needed.")
    if width * height > MAX_PIXELS:
        raise ImageError(
            f"The image has {width * height / 1e6:.0f} million pixels ({width} x {height}); "
            f"at most {MAX_PIXELS // 10**6} million are read. Make it smaller first."
        )


def _open(path: Path) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # check_size reports it
            return Image.open(path)
    except FileNotFoundError as error:
        raise ImageError(f"There is no file {path}.") from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"{path.name} has far too many pixels. Make it smaller first.") from error
    except (UnidentifiedImageError, OSError) as error:
        raise ImageError(f"{path.name} is not an image that can be read. Use PNG, JPEG or WebP.") from error


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "I;16", "I;16B", "I;16L", "F"):
        image = _eight_bits(image)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Deep greyscale to 8 bits; PIL's own conversion clips everything above 255 to white."""
    values = np.asarray(image).astype(np.float64)
    top = values.max(initial=0.0)
    full = 65535.0 if image.mode.startswith("I;16") or top > 255 else 1.0 if top <= 1 else 255.0
    return Image.fromarray((values / full * 255).round().clip(0, 255).astype(np.uint8))
