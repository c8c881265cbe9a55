"""What an edited picture is beside the unedited one: is the wish fulfilled, what else changed, is it still a picture.

Everything is judged by the second segmenter and the style classifier; the concepts' labels came from the first one.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForSemanticSegmentation

from core.edits.metrics import frequencies, layout_iou
from core.edits.regions import RegionMask
from training.evaluate.common.judges import BATCH, MIN_AREA, Judges, measure
from training.evaluate.interventions.arms import Request
from training.picturebook.models.autoencoder import to_pixels
from training.picturebook.world.world import NOUN_INDEX, NOUNS, OBJECT_INDEX, OBJECTS, STYLES

N_NEIGHBOURS = 3
QUANTILE = 0.99
"""Share of unedited pictures that are no artifacts."""


class EditOutcome(NamedTuple):
    """One picture, as it was judged."""

    fulfilled: bool
    """The wish: the thing's centre is in its quarter, an absent thing being a failure; or the style is the wished one;
    or the thing is gone."""
    there: bool
    """Whether the thing is in the picture."""
    low: float
    """Root mean square change, in shares of the range of grey, of what else there is: of the means over cells."""
    high: float
    """The same of all that is finer."""
    layout: float
    """Mean over classes of the intersection over union with the unedited picture, of what else there is; not a number
    where that has no class."""
    cleared: float
    """Share of where the thing was that shows a place now, rather than a thing."""
    odd: bool
    """Whether it is further from unedited pictures than 99 % of them."""


class JudgeOutputs(NamedTuple):
    """What the judges make of pictures."""

    labels: Tensor
    """[N, H, W] by the second segmenter."""
    styles: tuple[str, ...]
    pixels: Tensor
    """[N, 3, H, W] from 0 to 1."""
    features: Tensor
    """[N, F] of the encoder of the first segmenter."""

    def rows(self, rows: Sequence[int]) -> "JudgeOutputs":
        """Of some of the pictures."""
        picked = list(rows)
        return JudgeOutputs(
            self.labels[picked], tuple(self.styles[i] for i in picked), self.pixels[picked], self.features[picked]
        )

    @classmethod
    def joined(cls, looks: Sequence["JudgeOutputs"]) -> "JudgeOutputs":
        """Of the pictures of all."""
        return cls(
            torch.cat([look.labels for look in looks]),
            tuple(style for look in looks for style in look.styles),
            torch.cat([look.pixels for look in looks]),
            torch.cat([look.features for look in looks]),
        )


class Judge:
    """The judges, and how far unedited pictures are from each other."""

    def __init__(self, judges: Judges, package: Path) -> None:
        self._segmenter = list(judges.segmenters.values())[1]
        self._styles = judges.style_classifier
        first = AutoModelForSemanticSegmentation.from_pretrained(package / "segmenter")
        self._encoder = first.base_model.eval().requires_grad_(False)
        self._known = self._centre = self._scale = torch.empty(0)
        self._limit = 0.0

    def know(self, unedited: Sequence[Image.Image]) -> None:
        """Learn what unedited pictures are like: those of all sorts of captions."""
        features = self.look(unedited).features
        self._centre, self._scale = features.mean(0), features.std(0).clamp_min(1e-6)
        self._known = self._scaled(features)
        distances = torch.cdist(self._known, self._known)
        distances.fill_diagonal_(torch.inf)
        self._limit = float(self._nearest(distances).quantile(QUANTILE))

    @torch.no_grad()
    def look(self, images: Sequence[Image.Image]) -> JudgeOutputs:
        """What the judges make of pictures."""
        return JudgeOutputs.joined(
            [self._look(images[start : start + BATCH]) for start in range(0, len(images), BATCH)]
        )

    def _look(self, images: Sequence[Image.Image]) -> JudgeOutputs:
        pixels = to_pixels(np.stack([np.asarray(image) for image in images]))
        hidden = self._encoder(pixels).last_hidden_state.flatten(2)
        styles = self._styles(pixels).logits.argmax(-1).tolist()
        labels = self._segmenter.segment(images).label_map().cpu()
        features = torch.cat([hidden.mean(2), hidden.std(2)], dim=1)
        return JudgeOutputs(labels, tuple(STYLES[i] for i in styles), (pixels + 1) / 2, features)

    def judge(self, asked: Sequence[Request], new: JudgeOutputs, old: JudgeOutputs) -> list[EditOutcome]:
        """Pictures beside the unedited ones of the same captions and seeds."""
        odd = self._odd(new.features)
        return [
            EditOutcome(
                fulfilled=fulfilled(one, new.labels[i], new.styles[i]),
                there=_centre(one.object_name, new.labels[i]) is not None,
                **_changes(new, old, i, elsewhere(one, old.labels[i])),
                cleared=cleared(one, new.labels[i], old.labels[i]),
                odd=odd[i],
            )
            for i, one in enumerate(asked)
        ]

    def _odd(self, features: Tensor) -> list[bool]:
        distances = torch.cdist(self._scaled(features), self._known)
        odd: list[bool] = (self._nearest(distances) > self._limit).tolist()
        return odd

    @staticmethod
    def _nearest(distances: Tensor) -> Tensor:
        """Mean distance to the nearest neighbours, a picture itself left out by an infinite distance."""
        return distances.topk(N_NEIGHBOURS, largest=False).values.mean(1)

    def _scaled(self, features: Tensor) -> Tensor:
        return (features - self._centre) / self._scale


def fulfilled(one: Request, labels: Tensor, style: str) -> bool:
    """Whether a picture is as wished."""
    if one.kind == "styling":
        return style == one.target
    centre = _centre(one.object_name, labels)
    if one.kind == "removing":
        return centre is None
    if centre is None:
        return False
    height, width = labels.shape
    vertical, horizontal = one.target.split("-")
    return (centre[1] < height / 2) == (vertical == "top") and (centre[0] < width / 2) == (horizontal == "left")


def elsewhere(one: Request, labels: Tensor) -> Tensor:
    """[H, W] what should stay: all of it for a style; for a thing, neither where it was nor where it should be."""
    if one.kind == "styling":
        return torch.ones_like(labels, dtype=torch.bool)
    if one.kind == "removing":
        return labels != _object(one.object_name)
    height, width = labels.shape
    region = RegionMask(one.target, height).grid(height, width).view(height, width) > 0
    return ~region & (labels != _object(one.object_name))


def cleared(one: Request, new: Tensor, old: Tensor) -> float:
    """How much of where the thing was shows a place; not a number where it was not."""
    return float((new[old == _object(one.object_name)] >= len(OBJECTS)).float().mean())


def _changes(new: JudgeOutputs, old: JudgeOutputs, i: int, where: Tensor) -> dict[str, float]:
    low, high = frequencies(new.pixels[i] - old.pixels[i], where)
    return {"low": low, "high": high, "layout": layout_iou(new.labels[i], old.labels[i], where, MIN_AREA)}


def _object(noun: str) -> int:
    return OBJECT_INDEX[NOUNS[NOUN_INDEX[noun]].objects[0]]


def _centre(noun: str, labels: Tensor) -> tuple[float, float] | None:
    areas, centres = measure(labels)
    if int(areas[_object(noun)]) < MIN_AREA:
        return None
    x, y = centres[_object(noun)].tolist()
    return x, y
