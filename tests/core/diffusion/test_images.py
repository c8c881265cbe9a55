import io
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from core.diffusion.images import MAX_PIXELS, open_image, prepare_image
from core.errors import ImageError

ROOT = Path(__file__).parents[3]


def test_landscape_is_cropped_at_the_centre() -> None:
    image = Image.new("RGB", (300, 100), "blue")
    image.paste("red", (100, 0, 200, 100))
    square = prepare_image(image, 64)
    assert square.size == (64, 64)
    assert square.mode == "RGB"
    assert np.asarray(square)[32, 32].tolist() == [255, 0, 0]
    assert (np.asarray(square)[:, 3:-3, 2] < 9).all()


def test_transparent_becomes_white_whatever_the_colour_below() -> None:
    for image in (Image.new("RGBA", (32, 32), (255, 0, 0, 0)), Image.new("LA", (32, 32), (0, 0))):
        assert np.asarray(prepare_image(image, 16)).min() == 255
    palette = Image.new("P", (32, 32), 0)
    palette.info["transparency"] = 0
    assert np.asarray(prepare_image(palette, 16)).min() == 255


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV", "I", "F", "I;16"])
def test_any_mode_becomes_rgb(mode: str) -> None:
    assert prepare_image(Image.new(mode, (40, 40)), 16).mode == "RGB"


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    values = np.asarray(prepare_image(Image.fromarray(ramp), 64))[..., 0]
    assert values.min() < 3
    assert abs(float(values.mean()) - 127.5) < 2


def test_exif_rotation_is_applied(tmp_path: Path) -> None:
    image = Image.new("RGB", (64, 64), "white")
    image.paste("black", (0, 0, 64, 32))  # black above
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    image.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    turned = np.asarray(prepare_image(tmp_path / "turned.jpg", 64))
    assert turned[5].mean() > 200
    assert turned[60].mean() < 50


def test_an_animation_gives_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert np.asarray(prepare_image(tmp_path / "moving.gif", 16))[8, 8].tolist() == [255, 0, 0]


def test_errors_about_bad_images_say_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "words.png").write_text("not a picture")
    with pytest.raises(ImageError, match=r"words\.png is not an image.*PNG"):
        prepare_image(tmp_path / "words.png", 64)
    with pytest.raises(ImageError, match="There is no file"):
        prepare_image(tmp_path / "none.png", 64)
    with pytest.raises(ImageError, match="at least 16 on each side"):
        prepare_image(Image.new("RGB", (1, 1)), 64)
    with pytest.raises(ImageError, match="not int"):
        prepare_image(3, 64)  # type: ignore[arg-type]
    Image.new("RGB", (64, 64), "red").save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:60])
    with pytest.raises(ImageError, match=r"damaged|not a picture"):
        prepare_image(tmp_path / "cut.png", 64)


def test_a_huge_image_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    side = int(MAX_PIXELS**0.5) + 500
    Image.new("1", (side, side)).save(tmp_path / "huge.png")
    with pytest.raises(ImageError, match=r"million pixels.*Make it smaller"):
        prepare_image(tmp_path / "huge.png", 64)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\n{ } loop\n%%EOF\n"
"""A program that never ends."""


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_a_program_called_an_image_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def started(*arguments: Any, **options: Any) -> None:
        raise AssertionError(f"a process was started: {arguments} {options}")

    for name in ("Popen", "call", "check_call", "run"):
        monkeypatch.setattr(subprocess, name, started)
    (tmp_path / "cat.png").write_bytes(EPS)
    with pytest.raises(ImageError, match=r"cat\.png is not an image.*PNG"):
        prepare_image(tmp_path / "cat.png", 64)
    with pytest.raises(ImageError, match="The image is not an image"):
        open_image(EPS)


@pytest.mark.parametrize("kind", ["ICO", "PPM", "TGA", "PCX", "SGI", "DDS", "IM", "JPEG2000", "QOI"])
def test_only_the_listed_formats_are_read(tmp_path: Path, kind: str) -> None:
    """By content: Pillow's other decoders are less tried, and each has exceptions of its own."""
    (tmp_path / "cat.png").write_bytes(encoded(Image.new("RGB", (64, 64)), kind))
    with pytest.raises(ImageError, match="not an image that can be read"):
        prepare_image(tmp_path / "cat.png", 64)


def images_of_all_kinds() -> dict[str, bytes]:
    image = Image.effect_noise((64, 64), 80).convert("RGB")
    others, exif = [image.rotate(90), image.rotate(45)], Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "x" * 50
    deep = Image.fromarray(np.full((64, 64), 40000, np.uint16))
    nowhere = Image.fromarray(np.full((64, 64), np.nan, np.float32))
    return {
        "png": encoded(image, "PNG", exif=exif),
        "deep": encoded(deep, "PNG"),
        "palette": encoded(image.convert("P"), "PNG", transparency=3),
        "two colours": encoded(image.convert("1"), "PNG", transparency=0),
        "moving png": encoded(image, "PNG", save_all=True, append_images=others),
        "jpeg": encoded(image, "JPEG", exif=exif),
        "cmyk": encoded(image.convert("CMYK"), "JPEG"),
        "mpo": encoded(image, "MPO", save_all=True, append_images=others),
        "webp": encoded(image, "WEBP", save_all=True, append_images=others),
        "gif": encoded(image, "GIF", save_all=True, append_images=others),
        "tiff": encoded(image, "TIFF"),
        "tiff of several": encoded(
            Image.new("L", (64, 64), 9), "TIFF", save_all=True, append_images=[Image.new("L", (9, 9))]
        ),
        "tiff lzw": encoded(image, "TIFF", compression="tiff_lzw"),
        "not a number": encoded(nowhere, "TIFF"),
        "bmp": encoded(image, "BMP"),
    }


def damaged(data: bytes, rng: random.Random) -> bytes:
    """A few bytes changed, left out or put in between, most of them in the header."""
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 4, 16])):
        at = rng.randrange(max(1, min(len(changed), rng.choice([64, 200, len(data)]))))
        new = rng.choice([b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\0\0\x20\0", rng.randbytes(1), b""])
        changed[at : at + rng.choice([0, 1, len(new)])] = new
        if rng.random() < 0.1:
            del changed[rng.randrange(1, len(data)) :]
    return bytes(changed)


@pytest.mark.filterwarnings("ignore")  # Pillow's own, about damaged metadata
@pytest.mark.parametrize("kind", images_of_all_kinds())
def test_whatever_is_wrong_with_a_file_is_told_in_a_sentence(tmp_path: Path, kind: str) -> None:
    data, rng, path = images_of_all_kinds()[kind], random.Random(kind), tmp_path / "cat.png"
    path.write_bytes(data)
    assert prepare_image(path, 32).size == (32, 32)
    refusals = []
    for _ in range(60):
        path.write_bytes(damaged(data, rng))
        try:
            assert prepare_image(path, 32).mode == "RGB"
        except ImageError as error:
            refusals.append(str(error))
    assert refusals
    for text in refusals:
        assert re.fullmatch(r"(The image|cat\.png)\b.*\.", text)
        assert "Error" not in text


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_undone(orientation: int) -> None:
    image = Image.effect_noise((40, 40), 90).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = encoded(image, "PNG", exif=exif)
    with open_image(buffer) as opened:
        turned = prepare_image(opened, 40)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(buffer)))
    assert np.array_equal(np.asarray(turned), np.asarray(expected))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of memory is read from /proc")
@pytest.mark.parametrize("mode", ["RGBA", "I;16", "P", "LA"])
def test_the_largest_image_takes_a_bounded_amount_of_memory(tmp_path: Path, mode: str) -> None:
    side = int(MAX_PIXELS**0.5)
    Image.new(mode, (side, side)).save(tmp_path / "large.png", **({"transparency": 0} if mode == "P" else {}))
    code = (
        "import sys; from core.diffusion.images import prepare_image; from PIL import Image\n"
        "def peak(): return next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('VmHWM'))\n"
        "prepare_image(Image.new('RGB', (64, 64)), 64); before = peak(); prepare_image(sys.argv[1], 64)\n"
        "print(1024 * (peak() - before))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "large.png")],
        capture_output=True, encoding="utf-8", check=True, cwd=ROOT,
    )  # fmt: skip
    assert int(done.stdout) < 17 * side * side
