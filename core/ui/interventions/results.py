"""The measured effect of edits: what became of the objects, what else changed, how far it is out of distribution."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from core.arrays import Floats
from core.concepts.table import ConceptTable
from core.concepts.trace import SaeSite
from core.edits.metrics import OutOfRange, frequencies, layout_iou
from core.edits.regions import RegionMask
from core.segmentation.semantic import Segmenter
from core.ui.backend.dictionary import ConceptDictionary
from core.ui.backend.jobs import EditedImages
from core.ui.interventions.request import PAINTED, EditRequest, cells_mask, paint_cells
from core.ui.layout.results import background_names, final_labels, named_classes
from core.ui.look.scene import Scene

_MIN_FRACTION = 0.0122
"""Fraction of the image an object must fill to count as present: half of the embedded model's smallest drawing."""


class ObjectChange(NamedTuple):
    """What an edit is about, before and after, according to the segmenter."""

    name: str
    present: tuple[bool, bool]
    """Whether it is in the image at all."""
    area: tuple[float, float]
    """Fraction of the image that it fills."""
    inside: tuple[float, float]
    """Fraction of it that lies in the region; NaN if it is not present."""
    centre_inside: tuple[bool, bool]
    """Whether its centre lies in the region."""


class EditResult(NamedTuple):
    """One edited image compared with the unedited one."""

    requests: tuple[EditRequest, ...]
    stage: str
    """The stage at which all edits were applied; empty if each has its own."""
    image: Image.Image
    change: Floats
    """[H, W] absolute difference averaged over the colour channels, 0..1."""
    low: float
    """Root mean square change elsewhere of means over 8 x 8 pixels, in the same unit; NaN if there is no elsewhere."""
    high: float
    """Root mean square change elsewhere of finer detail."""
    layout: float
    """Mean IoU elsewhere between the segmentations of both images; NaN without a segmenter."""
    objects: tuple[ObjectChange | None, ...]
    """One per edit; None if the segmenter does not know what it is about."""
    out_of_range: OutOfRange
    """How far the edited concepts left the range seen in data."""
    lost: tuple[str, ...] = ()
    """Other objects that were in the unedited image and are gone, by class."""


@dataclass(frozen=True, eq=False)
class EditComparison:
    """All that the tab shows of one run."""

    scene: Scene
    requests: tuple[EditRequest, ...]
    """As requested; if stages are compared, each result has them at its own stage."""
    unedited: Image.Image
    results: tuple[EditResult, ...]
    """One, or one per stage."""
    segmented: bool
    """Whether there was a segmenter."""


class EditPlan(NamedTuple):
    """What is to be generated."""

    requests: tuple[EditRequest, ...]
    stages: tuple[str, ...] = ()
    """Stages at which to apply the edits; empty: at the edits' own."""

    @property
    def rows(self) -> list[tuple[str, tuple[EditRequest, ...]]]:
        """The stage and the requests of each edited image."""
        if not self.stages:
            return [("", self.requests)]
        return [(stage, tuple(replace(one, stage=stage, steps=None) for one in self.requests)) for stage in self.stages]


def measure_edits(
    scene: Scene, plan: EditPlan, edited: EditedImages, dictionary: ConceptDictionary, segmenter: Segmenter | None
) -> EditComparison:
    """Measure the images of a run."""
    unedited, *images = edited.images
    table = next(iter(dictionary.tables.values()))
    labels = [
        None if segmenter is None else torch.from_numpy(final_labels(segmenter, image, table.class_names))
        for image in edited.images
    ]
    known = _known(segmenter, table)
    results = []
    for (stage, requests), image, new, out_of_range in zip(
        plan.rows, images, labels[1:], edited.out_of_range, strict=True
    ):
        classes = [_classes(one, dictionary, known) for one in requests]
        elsewhere = _elsewhere(requests, classes, labels[0], unedited.size[0])
        difference = _pixels(image) - _pixels(unedited)
        low, high = frequencies(difference, elsewhere) if elsewhere.any() else (np.nan, np.nan)
        layout = np.nan
        objects: list[ObjectChange | None] = [None] * len(requests)
        if labels[0] is not None and new is not None:
            layout = layout_iou(new, labels[0], elsewhere, _min_pixels(elsewhere)) if elsewhere.any() else np.nan
            objects = [
                _object_change(one, of_request, labels[0], new) if of_request else None
                for one, of_request in zip(requests, classes, strict=True)
            ]
        change = np.asarray(difference.abs().mean(0).double().numpy())
        lost = () if labels[0] is None or new is None else _lost(labels[0], new, classes, dictionary)
        results.append(
            EditResult(requests, stage, image, change, low, high, layout, tuple(objects), out_of_range, lost)
        )
    return EditComparison(scene, plan.requests, unedited, tuple(results), segmenter is not None)


class ObjectAt(NamedTuple):
    """What the segmenter finds at a point of an image."""

    label: str
    """Its class, which labels concepts."""
    is_background: bool
    """Whether it is a background."""
    mask: Tensor
    """[H, W] where it is."""

    def cells_moved(self, dx: float, dy: float) -> str:
        """The cells that it covers after a move by fractions of the image's sides; what leaves the image is cut off."""
        height, width = self.mask.shape
        rows, columns = self.mask.nonzero().T
        rows, columns = rows + round(dy * height), columns + round(dx * width)
        inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
        moved = torch.zeros_like(self.mask)
        moved[rows[inside], columns[inside]] = True
        return paint_cells(moved.numpy())


def object_at(segmenter: Segmenter, scene: Scene, dictionary: ConceptDictionary, x: float, y: float) -> ObjectAt | None:
    """What is at a point of a scene's image, x and y in 0..1; None if nothing there has concepts."""
    tables = list(dictionary.tables.values())
    labels = torch.from_numpy(final_labels(segmenter, scene.image, tables[0].class_names))
    height, width = labels.shape
    number = int(labels[min(int(y * height), height - 1), min(int(x * width), width - 1)])
    if number < 0 or not any((table.frame["label"] == tables[0].class_names[number]).any() for table in tables):
        return None
    label = tables[0].class_names[number]
    return ObjectAt(label, label in background_names(tables), labels == number)


def where_it_is(
    segmenter: Segmenter, image: Image.Image, table: ConceptTable, label: str
) -> tuple[float, float] | None:
    """The centre of what a label means, x and y in 0..1; None if it is not in the image."""
    labels = torch.from_numpy(final_labels(segmenter, image, table.class_names))
    mask = _mask(labels, [table.class_names.index(name) for name in _class_names(label, table)])
    if int(mask.sum()) < _min_pixels(mask):
        return None
    y, x = (axis.double().mean() for axis in mask.nonzero().T)
    return float(x) / mask.shape[1], float(y) / mask.shape[0]


def _lost(old: Tensor, new: Tensor, classes: Sequence[Sequence[int]], dictionary: ConceptDictionary) -> tuple[str, ...]:
    """Objects that no edit is about and that are in the old image but not in the new one."""
    tables = list(dictionary.tables.values())
    backgrounds, edited = background_names(tables), {number for of_request in classes for number in of_request}
    present = [
        {
            number
            for number, name in enumerate(tables[0].class_names)
            if name not in backgrounds and int((labels == number).sum()) >= _min_pixels(labels)
        }
        for labels in (old, new)
    ]
    return tuple(tables[0].class_names[number] for number in sorted(present[0] - present[1] - edited))


def _known(segmenter: Segmenter | None, table: ConceptTable) -> set[str]:
    return set() if segmenter is None else set(segmenter.class_names()) & set(table.class_names)


def _class_names(label: str, table: ConceptTable) -> list[str]:
    return [name for senses in named_classes(label, table) for name in senses]


def _classes(request: EditRequest, dictionary: ConceptDictionary, known: set[str]) -> list[int]:
    """Indices of the classes that a request is about, as far as the segmenter knows them."""
    table = next(iter(dictionary.tables.values()))
    label = request.label
    if request.concepts:
        of_site = dictionary.tables[SaeSite(request.hookpoint, request.branch)]  # type: ignore[arg-type]
        labels = {str(of_site.frame["label"].iat[number]) for number in request.concepts}
        label = labels.pop() if len(labels) == 1 else ""
    return [table.class_names.index(name) for name in _class_names(label, table) if name in known]


def _region(request: EditRequest, size: int) -> Tensor:
    mask = cells_mask(request.cells, size) if request.region == PAINTED else request.region
    return RegionMask(mask, size).grid(size, size).view(size, size) > 0


def _elsewhere(requests: Sequence[EditRequest], classes: Sequence[list[int]], old: Tensor | None, size: int) -> Tensor:
    """[H, W] mask of what should stay: outside the region and where the object was; everything for a global edit."""
    mask = torch.ones(size, size, dtype=torch.bool)
    for request, of_request in zip(requests, classes, strict=True):
        if request.kind == "global":
            continue
        if request.kind == "move" or not of_request or old is None:
            mask &= ~_region(request, size)
        if old is not None:
            mask &= ~_mask(old, of_request)
    return mask


def _object_change(request: EditRequest, classes: list[int], old: Tensor, new: Tensor) -> ObjectChange:
    region = _region(request, len(old))
    found = [_measure_mask(_mask(labels, classes), region) for labels in (old, new)]
    present, area, inside, centre_inside = zip(*found, strict=True)
    return ObjectChange(request.what, present, area, inside, centre_inside)


def _measure_mask(mask: Tensor, region: Tensor) -> tuple[bool, float, float, bool]:
    """Whether something is present, its fraction of the image, its fraction inside the region, and its centre's."""
    area = float(mask.double().mean())
    if int(mask.sum()) < _min_pixels(mask):
        return False, area, float("nan"), False
    row, column = mask.nonzero().double().mean(0).round().long().tolist()
    return True, area, float(region[mask].double().mean()), bool(region[row, column])


def _mask(labels: Tensor, classes: Sequence[int]) -> Tensor:
    return torch.isin(labels, torch.tensor(list(classes), dtype=labels.dtype))


def _min_pixels(mask: Tensor) -> int:
    return round(_MIN_FRACTION * mask.numel())


def _pixels(image: Image.Image) -> Tensor:
    """[3, H, W] from 0 to 1."""
    return torch.from_numpy(np.asarray(image.convert("RGB"), dtype=np.float32) / 255).permute(2, 0, 1)
