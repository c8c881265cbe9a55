"""The gallery of example images that all SAEs of a collection share: WebP sheets, and a list of prompts and seeds.

The files are in the collection's folder `gallery/`: `images.json`, and the sheets `sheet-00.webp`, `sheet-01.webp`, ...
"""

import json
import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from core.errors import ArtifactError
from core.files import write_text
from core.sae.io import read_json

FOLDER = "gallery"
LIST = f"{FOLDER}/images.json"
COLUMNS = 8
"""Images in a row, and rows in a sheet."""
MAX_SIDE = 1024
"""Largest side of an image in pixels."""
QUALITY = 80
"""WebP quality of the sheets."""

Fetch = Callable[[str], Path]
"""Maps the path of a file in a collection to its path on this disk, downloading it if need be."""


class GalleryImage(NamedTuple):
    """What it takes to generate an image of the gallery again."""

    prompt: str
    """Its prompt."""
    seed: int
    """Seed of its initial noise."""


class Gallery:
    """The images, read when they are first used."""

    side: int
    """Side of every image in pixels."""
    entries: tuple[GalleryImage, ...]
    """Prompt and seed of each image."""

    def __init__(self, fetch: Fetch) -> None:
        """Read the list of images; `fetch` finds the collection's files."""
        listed = read_json(fetch(LIST))
        try:
            self.side = int(listed["side"])
            self.entries = tuple(GalleryImage(str(one["prompt"]), int(one["seed"])) for one in listed["images"])
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ArtifactError(f"{fetch(LIST)}: {error} is missing or invalid.") from error
        if not 1 <= self.side <= MAX_SIDE:
            raise ArtifactError(f"{fetch(LIST)}: side is {self.side}; images have 1 to {MAX_SIDE} pixels.")
        self._fetch = fetch
        self._sheet = lru_cache(maxsize=16)(self._read_sheet)

    def __len__(self) -> int:
        return len(self.entries)

    def image(self, number: int) -> Image.Image:
        """An image, RGB.

        Raises:
            IndexError: There is no image of this number.
        """
        if not 0 <= number < len(self):
            raise IndexError(f"There is no image {number}: the gallery has images 0 to {len(self) - 1}.")
        sheet, cell = divmod(number, COLUMNS * COLUMNS)
        x, y = cell % COLUMNS * self.side, cell // COLUMNS * self.side
        return self._sheet(sheet).crop((x, y, x + self.side, y + self.side))

    def _read_sheet(self, sheet: int) -> Image.Image:
        path = self._fetch(_sheet_name(sheet))
        try:
            with Image.open(path, formats=("WEBP",)) as stored:
                image = stored.convert("RGB")
        except Exception as error:  # decoders raise anything for damaged data
            raise ArtifactError(f"The images in {path} cannot be read: {error}") from error
        in_sheet = min(COLUMNS**2, len(self) - sheet * COLUMNS**2)
        if image.width < COLUMNS * self.side or image.height < math.ceil(in_sheet / COLUMNS) * self.side:
            raise ArtifactError(f"{path} is too small for its images of {self.side} pixels: it is of another gallery.")
        return image


def write_gallery(root: Path, images: Sequence[Image.Image], entries: Sequence[GalleryImage], side: int) -> None:
    """Write images, `side` pixels square, and their entries as a collection's gallery, replacing the old one."""
    folder = root / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    (root / LIST).unlink(missing_ok=True)
    for old in folder.glob("sheet-*.webp"):
        old.unlink()
    per_sheet = COLUMNS * COLUMNS
    for number in range(math.ceil(len(images) / per_sheet)):
        some = images[number * per_sheet : (number + 1) * per_sheet]
        sheet = Image.new("RGB", (COLUMNS * side, math.ceil(len(some) / COLUMNS) * side))
        for cell, image in enumerate(some):
            small = image.convert("RGB").resize((side, side), Image.Resampling.LANCZOS)
            sheet.paste(small, (cell % COLUMNS * side, cell // COLUMNS * side))
        sheet.save(root / _sheet_name(number), quality=QUALITY, method=6)
    write_text(root / LIST, json.dumps({"side": side, "images": [one._asdict() for one in entries]}, indent=1) + "\n")


def _sheet_name(number: int) -> str:
    return f"{FOLDER}/sheet-{number:02d}.webp"
