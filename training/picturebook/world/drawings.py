"""The drawings: three artists' emoji, fetched once, kept in the package as small WebP files.

`python -m training.picturebook.world.drawings` fetches them again with npm, or reads the three unpacked packages in
`--from FOLDER`; training itself needs no network.
"""

import argparse
import logging
import subprocess
import tarfile
import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from training.picturebook.world.world import ARTISTS, OBJECTS

FOLDER = Path(__file__).parents[1] / "data" / "drawings"
SIZE = 64
"""Side of a kept drawing in pixels."""

logger = logging.getLogger(__name__)


class Source(NamedTuple):
    """Where one artist's drawings come from."""

    package: str
    """npm package and version."""
    path: str
    """File of one drawing inside it, with the code point to fill in."""


SOURCES: dict[str, Source] = {
    "noto": Source("emoji-datasource-google@16.0.0", "package/img/google/64/{}.png"),
    "twemoji": Source("emoji-datasource-twitter@16.0.0", "package/img/twitter/64/{}.png"),
    "fluent": Source("@lobehub/fluent-emoji-3d@1.1.0", "package/assets/{}.webp"),
}


@cache
def drawing(object_name: str, artist: str, size: int) -> npt.NDArray[np.float32]:
    """One drawing as premultiplied RGBA in 0..1, shape [size, size, 4]."""
    image = Image.open(FOLDER / artist / f"{object_name}.webp").convert("RGBA")
    rgba: npt.NDArray[np.float32] = np.asarray(image, dtype=np.float32) / np.float32(255)
    rgba[..., :3] *= rgba[..., 3:]
    if size != SIZE:
        # Premultiplied before resizing, so that the colour of transparent pixels does not bleed into the rim.
        planes = [Image.fromarray(rgba[..., c]).resize((size, size), Image.Resampling.LANCZOS) for c in range(4)]
        rgba = np.stack([np.asarray(plane, dtype=np.float32) for plane in planes], axis=-1)
        rgba = rgba.clip(0, 1).astype(np.float32)
    rgba.flags.writeable = False
    return rgba


def crop_to_square(image: Image.Image, size: int) -> Image.Image:
    """The drawing without its empty margin, centred in a transparent square of `size` pixels."""
    image = image.convert("RGBA")
    image = image.crop(image.getchannel("A").point(lambda alpha: 255 * (alpha > 8)).getbbox())
    scale = size / max(image.size)
    image = image.resize(
        (max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.LANCZOS
    )
    square = Image.new("RGBA", (size, size))
    square.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
    return square


def fetch(folder: Path) -> None:
    """Download and unpack the three packages into `folder/<artist>` with npm."""
    for artist, source in SOURCES.items():
        target = folder / artist
        target.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "pack", "--silent", source.package], cwd=target, check=True, stdout=subprocess.DEVNULL)
        with tarfile.open(next(target.glob("*.tgz"))) as archive:
            archive.extractall(target, filter="data")
        logger.info("fetched %s", source.package)


def keep(folder: Path) -> None:
    """Crop, resize and store the drawings of every object from the packages under `folder/<artist>`."""
    for artist in ARTISTS:
        for drawn in OBJECTS:
            source = folder / artist / SOURCES[artist].path.format(drawn.codepoint)
            target = FOLDER / artist / f"{drawn.name}.webp"
            target.parent.mkdir(parents=True, exist_ok=True)
            with Image.open(source) as image:
                crop_to_square(image, SIZE).save(target, lossless=True, quality=100, method=6, exact=False)
    logger.info("kept %d drawings in %s", len(ARTISTS) * len(OBJECTS), FOLDER)


def main() -> None:
    """Fetch and keep the drawings."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--from", dest="folder", type=Path, help="folder with the packages unpacked, one an artist")
    folder: Path | None = parser.parse_args().folder
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if folder is not None:
        keep(folder)
        return
    with tempfile.TemporaryDirectory() as temporary:
        fetch(Path(temporary))
        keep(Path(temporary))


if __name__ == "__main__":
    main()
