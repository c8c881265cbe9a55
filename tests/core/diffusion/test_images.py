from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from core.diffusion.images import MAX_PIXELS, prepare_image
from core.errors import ImageError


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
