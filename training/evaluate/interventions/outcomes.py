"""Outcomes of edits: whether the request succeeded, what else changed, and whether the image is still in distribution.

Everything is judged by the second segmenter and the style classifier; the concepts were labelled with the first
segmenter.
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
"""Nearest unedited images over which the distance is averaged."""
QUANTILE = 0.99
"""Share of unedited images that count as in distribution."""


class EditOutcome(NamedTuple):
    """Judgement of one image."""

    success: bool
    """The object's centre is in its quarter (an absent object is a failure), or the style is the target, or the object
    is gone."""
    present: bool
    """Whether the object is in the image."""
    low: float
    """Root mean square change elsewhere, as a share of the value range: of means over cells."""
    high: float
    """The same of everything finer."""
    layout: float
    """Mean IoU over classes with the unedited image, elsewhere; NaN where that has no class."""
    cleared: float
    """Share of the object's former area that now shows a background rather than an object."""
    out_of_distribution: bool
    """Whether it is further from unedited images than 99 % of them are from each other."""


class JudgeOutputs(NamedTuple):
    """Outputs of the judges for N images."""

    labels: Tensor
    """[N, H, W] classes by the second segmenter."""
    styles: tuple[str, ...]
    """Style of each image."""
    pixels: Tensor
    """[N, 3, H, W] from 0 to 1."""
    features: Tensor
    """[N, F] features of the first segmenter's encoder."""

    def rows(self, rows: Sequence[int]) -> "JudgeOutputs":
        """The outputs for some of the images."""
        picked = list(rows)
        return JudgeOutputs(
            self.labels[picked], tuple(self.styles[i] for i in picked), self.pixels[picked], self.features[picked]
        )

    @classmethod
    def joined(cls, parts: Sequence["JudgeOutputs"]) -> "JudgeOutputs":
        """The outputs for the images of all."""
        return cls(
            torch.cat([part.labels for part in parts]),
            tuple(style for part in parts for style in part.styles),
            torch.cat([part.pixels for part in parts]),
            torch.cat([part.features for part in parts]),
        )


class Judge:
    """Judges edited images against unedited ones."""

    def __init__(self, judges: Judges, package: Path) -> None:
        self._segmenter = list(judges.segmenters.values())[1]
        self._styles = judges.style_classifier
        first = AutoModelForSemanticSegmentation.from_pretrained(package / "segmenter")
        self._encoder = first.base_model.eval().requires_grad_(False)
        self._reference = self._centre = self._scale = torch.empty(0)
        self._limit = 0.0

    def fit(self, unedited: Sequence[Image.Image]) -> None:
        """Set the limit of the distribution from unedited images of many captions."""
        features = self.look(unedited).features
        self._centre, self._scale = features.mean(0), features.std(0).clamp_min(1e-6)
        self._reference = self._scaled(features)
        distances = torch.cdist(self._reference, self._reference)
        distances.fill_diagonal_(torch.inf)
        self._limit = float(self._nearest(distances).quantile(QUANTILE))

    @torch.no_grad()
    def look(self, images: Sequence[Image.Image]) -> JudgeOutputs:
        """Outputs of the judges for some images."""
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

    def judge(self, requests: Sequence[Request], new: JudgeOutputs, old: JudgeOutputs) -> list[EditOutcome]:
        """Outcomes of edited images `new`, given the unedited images `old` of the same captions and seeds."""
        outside = self._out_of_distribution(new.features)
        return [
            EditOutcome(
                success=succeeded(one, new.labels[i], new.styles[i]),
                present=_centre(one.object_name, new.labels[i]) is not None,
                **_changes(new, old, i, elsewhere(one, old.labels[i])),
                cleared=cleared(one, new.labels[i], old.labels[i]),
                out_of_distribution=outside[i],
            )
            for i, one in enumerate(requests)
        ]

    def _out_of_distribution(self, features: Tensor) -> list[bool]:
        distances = torch.cdist(self._scaled(features), self._reference)
        outside: list[bool] = (self._nearest(distances) > self._limit).tolist()
        return outside

    @staticmethod
    def _nearest(distances: Tensor) -> Tensor:
        """Mean distance to the nearest neighbours; an image itself is left out by an infinite distance."""
        return distances.topk(N_NEIGHBOURS, largest=False).values.mean(1)

    def _scaled(self, features: Tensor) -> Tensor:
        return (features - self._centre) / self._scale


def succeeded(one: Request, labels: Tensor, style: str) -> bool:
    """Whether an image shows what was requested."""
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
    """[H, W] what should not change: everything for a style; else neither where the object was nor its target."""
    if one.kind == "styling":
        return torch.ones_like(labels, dtype=torch.bool)
    if one.kind == "removing":
        return labels != _object(one.object_name)
    height, width = labels.shape
    region = RegionMask(one.target, height).grid(height, width).view(height, width) > 0
    return ~region & (labels != _object(one.object_name))


def cleared(one: Request, new: Tensor, old: Tensor) -> float:
    """Share of the object's former area that shows a background; NaN if it was absent."""
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
