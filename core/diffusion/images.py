"""The one opener of image files, and the preparation of images for a model. Imports no torch."""

import warnings
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from core.errors import ImageError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "MPO")
"""What is read, by content, whatever a file is called. Pillow knows more, among them EPS: it hands such a file to
Ghostscript, which runs the program that it is. (MPO is the JPEG of some phones.)"""
MIN_SIDE = 16
"""Minimum side in pixels."""
MAX_PIXELS = 25_000_000
"""Maximum number of pixels, checked before an image is decoded into memory: a phone's, of 5712 x 4284. Decoding and
preparing takes at most 16 bytes for each."""
USE = "Use a PNG, JPEG or WebP file."


def open_image(source: str | Path | bytes) -> Image.Image:
    """The image in a file, or in its bytes, known by its header alone: of one of `FORMATS`, neither too small nor too
    large.

    Its pixels are read when they are asked for, and may be damaged; `decoded` reads them. It is a context manager,
    which closes the file.

    Raises:
        ImageError: There is no such file, or it holds no such image.
    """
    name = "The image" if isinstance(source, bytes) else Path(source).name
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # check_size reports it
            image = Image.open(BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS)
    except FileNotFoundError as error:
        raise ImageError(f"There is no file {name}.") from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name} has far too many pixels. Make it smaller first.") from error
    except Exception as error:  # a damaged header can raise anything
        raise ImageError(f"{name} is not an image that can be read. {USE}") from error
    try:
        check_size(*image.size)
    except ImageError:
        image.close()
        raise
    return image


def decoded(image: Image.Image) -> Image.Image:
    """The same image with its pixels in memory; of an animation, the first frame.

    Raises:
        ImageError: They are damaged.
    """
    try:
        image.load()
    except Exception as error:  # each of the decoders has its own
        raise _damaged() from error
    return image


def prepare_image(image: Image.Image | str | Path, size: int) -> Image.Image:
    """A square RGB image of `size` pixels: turned as its EXIF says, on white, centre-cropped, resized.

    Args:
        image: A PIL image of any mode, or the path of a file; of an animation, the first frame is used.
        size: Side in pixels.

    Raises:
        ImageError: It is no image, or too small, too large or damaged.
    """
    if isinstance(image, str | Path):
        with open_image(image) as opened:
            return prepare_image(opened, size)
    if not isinstance(image, Image.Image):
        raise ImageError(f"An image is needed (a PIL image or the path of a file), not {type(image).__name__}.")
    check_size(*image.size)
    decoded(image)
    try:
        square = ImageOps.fit(_eight_bits(image), (size, size), Image.Resampling.LANCZOS)
        return _on_white(_turned(square, image))
    except Exception as error:  # of the pixels and of what is written beside them
        raise _damaged() from error


def check_size(width: int, height: int) -> None:
    """Raise an `ImageError` for an image that is too small or too large."""
    if min(width, height) < MIN_SIDE:
        raise ImageError(f"The image has {width} x {height} pixels; at least {MIN_SIDE} on each side are needed.")
    if width * height > MAX_PIXELS:
        raise ImageError(
            f"The image has {width * height / 1e6:.0f} million pixels ({width} x {height}); "
            f"at most {MAX_PIXELS // 10**6} million are read. Make it smaller first."
        )


def is_transparent(image: Image.Image) -> bool:
    """Whether an image has transparency, of whatever kind."""
    return image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info


def _damaged() -> ImageError:
    return ImageError("The image's data is damaged. Save it again as PNG or JPEG.")


def _eight_bits(image: Image.Image) -> Image.Image:
    """RGB or RGBA of 8 bits; PIL's own conversion of deep greyscale clips everything above 255 to white."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.nan_to_num(np.asarray(image, dtype=np.float32))
        top = float(values.max(initial=0.0))
        full = 65535.0 if image.mode.startswith("I;16") or top > 255 else 1.0 if top <= 1 else 255.0
        values *= 255 / full
        np.rint(values, out=values)
        np.clip(values, 0, 255, out=values)
        image = Image.fromarray(values.astype(np.uint8))
        del values
    mode = "RGBA" if is_transparent(image) else "RGB"
    return image if image.mode == mode else image.convert(mode)


def _turned(square: Image.Image, original: Image.Image) -> Image.Image:
    """The central square as the original's EXIF says; turning a large image would take as much memory again."""
    turn = _TURNS.get(original.getexif().get(0x0112, 1))
    return square if turn is None else square.transpose(turn)


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What undoes each orientation of the EXIF standard."""


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode == "RGBA":
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image
