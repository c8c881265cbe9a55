"""The pictures that the examples of all SAEs of a collection share: WebP sheets, and a list of prompts and seeds.

In the collection's folder `gallery/`: `images.json`, and `sheet-00.webp` and so on, each rows of pictures.
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
"""Pictures in a row, and rows in a sheet."""
QUALITY = 80

Fetch = Callable[[str], Path]
"""From a file's path under a collection's root to where it is on this disk."""


class GalleryImage(NamedTuple):
    """What it takes to draw a picture again."""

    prompt: str
    """What it was drawn from."""
    seed: int
    """Seed of its noise."""


class Gallery:
    """The pictures, read when they are first looked at."""

    side: int
    """Of every picture, in pixels."""
    drawn: tuple[GalleryImage, ...]
    """Prompt and seed of each picture."""

    def __init__(self, fetch: Fetch) -> None:
        """Read the list; `fetch` finds the collection's files."""
        told = read_json(fetch(LIST))
        try:
            self.side = int(told["side"])
            self.drawn = tuple(GalleryImage(str(one["prompt"]), int(one["seed"])) for one in told["images"])
        except (KeyError, TypeError) as error:
            raise ArtifactError(f"{fetch(LIST)} lacks or misstates {error}.") from error
        self._fetch = fetch
        self._sheet = lru_cache(maxsize=16)(self._read_sheet)

    def __len__(self) -> int:
        return len(self.drawn)

    def image(self, number: int) -> Image.Image:
        """A picture, RGB.

        Raises:
            IndexError: There is no such picture.
        """
        if not 0 <= number < len(self):
            raise IndexError(f"There is no picture {number}: the gallery has 0 to {len(self) - 1}.")
        sheet, site = divmod(number, COLUMNS * COLUMNS)
        x, y = site % COLUMNS * self.side, site // COLUMNS * self.side
        return self._sheet(sheet).crop((x, y, x + self.side, y + self.side))

    def _read_sheet(self, sheet: int) -> Image.Image:
        path = self._fetch(_sheet_name(sheet))
        try:
            with Image.open(path) as stored:
                return stored.convert("RGB")
        except OSError as error:
            raise ArtifactError(f"The pictures in {path} cannot be read: {error}") from error


def write_gallery(root: Path, images: Sequence[Image.Image], drawn: Sequence[GalleryImage], side: int) -> None:
    """Write pictures, `side` pixels square, into a collection's gallery; sheets of an older one go."""
    folder = root / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    (root / LIST).unlink(missing_ok=True)
    for old in folder.glob("sheet-*.webp"):
        old.unlink()
    per_sheet = COLUMNS * COLUMNS
    for number in range(math.ceil(len(images) / per_sheet)):
        some = images[number * per_sheet : (number + 1) * per_sheet]
        sheet = Image.new("RGB", (COLUMNS * side, math.ceil(len(some) / COLUMNS) * side))
        for site, image in enumerate(some):
            small = image.convert("RGB").resize((side, side), Image.Resampling.LANCZOS)
            sheet.paste(small, (site % COLUMNS * side, site // COLUMNS * side))
        sheet.save(root / _sheet_name(number), quality=QUALITY, method=6)
    write_text(root / LIST, json.dumps({"side": side, "images": [one._asdict() for one in drawn]}, indent=1) + "\n")


def _sheet_name(number: int) -> str:
    return f"{FOLDER}/sheet-{number:02d}.webp"
