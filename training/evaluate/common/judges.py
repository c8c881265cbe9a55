"""What judges see in pictures of the picture book: which things, where, in which place, in which style."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import ResNetForImageClassification

from core.diffusion.diffuser import Diffuser
from core.segmentation.semantic import Segmenter, load_segmenter
from training.picturebook.models.autoencoder import to_pixels
from training.picturebook.world.captions import Relation
from training.picturebook.world.world import BACKGROUNDS, LABELS, NOUN_INDEX, NOUNS, OBJECT_INDEX, OBJECTS, STYLES

MIN_AREA = 200
"""Pixels from which on a thing counts as there: half of what the smallest drawing covers."""
BATCH = 32


@dataclass(frozen=True)
class Judges:
    """The networks that grade pictures."""

    segmenters: dict[str, Segmenter]
    """By name: each grades alone."""
    style_classifier: ResNetForImageClassification


class ImageReading(NamedTuple):
    """What one segmenter and the style classifier see in one picture."""

    areas: Tensor
    """[labels] pixels of each."""
    centres: Tensor
    """[labels, 2] mean x and y of each in pixels; not a number where there is none."""
    style: str

    @property
    def background(self) -> str:
        """The place of most pixels."""
        return BACKGROUNDS[int(self.areas[len(OBJECTS) :].argmax())].name

    def find(self, noun: str) -> tuple[float, float] | None:
        """Where the noun's thing is, x and y; None where it is not. A homonym is either of its things."""
        object_name = max(
            (OBJECT_INDEX[name] for name in NOUNS[NOUN_INDEX[noun]].objects), key=lambda i: int(self.areas[i])
        )
        if self.areas[object_name] < MIN_AREA:
            return None
        x, y = self.centres[object_name].tolist()
        return x, y

    def relation_holds(self, relation: Relation, first: str, second: str) -> bool:
        """Whether both are there and the first stands so to the second, more to that side than to another."""
        a, b = self.find(first), self.find(second)
        if a is None or b is None:
            return False
        dx, dy = b[0] - a[0], b[1] - a[1]
        along, across = (dx, dy) if relation in ("left", "right") else (dy, dx)
        return (along if relation in ("left", "above") else -along) > abs(across)


def load_judges(package: Path) -> Judges:
    """The judges in the package folder."""
    return Judges(
        segmenters={
            "SegFormer": load_segmenter(package / "segmenter", device="cpu"),
            "UPerNet": load_segmenter(package / "second_segmenter", device="cpu"),
        },
        style_classifier=ResNetForImageClassification.from_pretrained(package / "style_classifier").eval(),
    )


@torch.no_grad()
def look(judges: Judges, images: Sequence[Image.Image]) -> dict[str, list[ImageReading]]:
    """What each segmenter sees in each picture."""
    readings: dict[str, list[ImageReading]] = {name: [] for name in judges.segmenters}
    for start in range(0, len(images), BATCH):
        part = images[start : start + BATCH]
        pixels = to_pixels(np.stack([np.asarray(image) for image in part]))
        styles = [STYLES[i] for i in judges.style_classifier(pixels).logits.argmax(-1).tolist()]
        for name, segmenter in judges.segmenters.items():
            maps = segmenter.segment(part).label_map()
            readings[name] += [ImageReading(*measure(map_), style) for map_, style in zip(maps, styles, strict=True)]
    return readings


def draw(model: Diffuser, captions: Sequence[str], seeds: Sequence[int]) -> Iterator[Image.Image]:
    """A picture of each caption, with the model's own settings, many at a time."""
    for start in range(0, len(captions), BATCH):
        rows = slice(start, start + BATCH)
        *_, last = model.sample(captions[rows], seeds=seeds[rows])
        yield from model.decode(last.x)


def measure(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Pixels of each label in a map [H, W], and the mean of their x and y: the first two fields of a `Sight`."""
    y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in labels.shape), indexing="ij")
    flat = labels.flatten()
    areas = torch.bincount(flat, minlength=len(LABELS))
    sums = [torch.bincount(flat, weights=axis.flatten(), minlength=len(LABELS)) for axis in (x, y)]
    return areas, torch.stack(sums, dim=1) / areas[:, None]
