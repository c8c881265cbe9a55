"""What the judges see in images of picturebook's world: which objects, where, on which background, in which style."""

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
"""Pixels an object must cover to count as present: half the area of the smallest drawing."""
BATCH = 32
"""Images judged or sampled together."""


@dataclass(frozen=True)
class Judges:
    """The networks that judge images."""

    segmenters: dict[str, Segmenter]
    """By name; each judges independently."""
    style_classifier: ResNetForImageClassification
    """Logits of `STYLES`."""


class ImageReading(NamedTuple):
    """What one segmenter and the style classifier see in one image."""

    areas: Tensor
    """[labels] pixels of each class."""
    centres: Tensor
    """[labels, 2] mean x and y of each class in pixels; NaN where it is absent."""
    style: str
    """The most probable style."""

    @property
    def background(self) -> str:
        """The background with the most pixels."""
        return BACKGROUNDS[int(self.areas[len(OBJECTS) :].argmax())].name

    def find(self, noun: str) -> tuple[float, float] | None:
        """x and y of the noun's object; None if it is absent. A homonym is whichever of its objects covers more."""
        senses = (OBJECT_INDEX[name] for name in NOUNS[NOUN_INDEX[noun]].objects)
        label = max(senses, key=lambda i: int(self.areas[i]))
        if self.areas[label] < MIN_AREA:
            return None
        x, y = self.centres[label].tolist()
        return x, y

    def relation_holds(self, relation: Relation, first: str, second: str) -> bool:
        """Whether both objects are present and the first is more on that side of the second than on any other."""
        a, b = self.find(first), self.find(second)
        if a is None or b is None:
            return False
        dx, dy = b[0] - a[0], b[1] - a[1]
        along, across = (dx, dy) if relation in ("left", "right") else (dy, dx)
        return (along if relation in ("left", "above") else -along) > abs(across)


def load_judges(package: Path) -> Judges:
    """Load the judges from the package folder."""
    return Judges(
        segmenters={
            "SegFormer": load_segmenter(package / "segmenter", device="cpu"),
            "UPerNet": load_segmenter(package / "second_segmenter", device="cpu"),
        },
        style_classifier=ResNetForImageClassification.from_pretrained(package / "style_classifier").eval(),
    )


@torch.no_grad()
def look(judges: Judges, images: Sequence[Image.Image]) -> dict[str, list[ImageReading]]:
    """What each segmenter sees in each image."""
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
    """Sample an image of each caption in batches, with the model's default settings."""
    for start in range(0, len(captions), BATCH):
        rows = slice(start, start + BATCH)
        *_, last = model.sample(captions[rows], seeds=seeds[rows])
        yield from model.decode(last.x)


def measure(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Pixels of each class in a label map [H, W], and the mean of their x and y, as in `ImageReading`."""
    y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in labels.shape), indexing="ij")
    flat = labels.flatten()
    areas = torch.bincount(flat, minlength=len(LABELS))
    sums = [torch.bincount(flat, weights=axis.flatten(), minlength=len(LABELS)) for axis in (x, y)]
    return areas, torch.stack(sums, dim=1) / areas[:, None]
