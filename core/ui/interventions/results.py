"""What edits did to a picture, measured: where things went, what else changed, how far from data it is."""

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
from core.ui.concepts.dictionary import Dictionary
from core.ui.interventions.request import PAINTED, EditRequest, cells_mask
from core.ui.jobs import Redrawn
from core.ui.layout.results import final_labels, named_classes
from core.ui.look.scene import Scene

_LEAST_SHARE = 0.0122
"""Part of a picture that something has to fill to count as there: half of what the embedded model's smallest drawing
does."""


class Moved(NamedTuple):
    """What a wish is about, before and after, as the segmenter sees it."""

    name: str
    there: tuple[bool, bool]
    """Whether it is in the picture at all."""
    area: tuple[float, float]
    """Part of the picture that it fills."""
    inside: tuple[float, float]
    """Part of it that lies in the region; not a number where it is not there."""
    centre_inside: tuple[bool, bool]
    """Whether its centre lies in the region."""


class Result(NamedTuple):
    """One edited picture beside the unedited one."""

    requests: tuple[EditRequest, ...]
    stage: str
    """The stage at which all wishes were tried; empty where each has its own time."""
    image: Image.Image
    change: Floats
    """[H, W] mean over the colours of the absolute difference, in shares of the range of grey."""
    low: float
    """Root mean square of the change elsewhere, in the same unit: of means over 8 x 8 pixels. Not a number where there
    is no elsewhere."""
    high: float
    """The same of what is finer."""
    layout: float
    """Mean overlap (IoU) elsewhere of what is where with the unedited picture; not a number without a segmenter."""
    moved: tuple[Moved | None, ...]
    """One a wish; None where the segmenter cannot tell."""
    out_of_range: OutOfRange
    """How far the edited concepts went from what data have."""


@dataclass(frozen=True, eq=False)
class Outcome:
    """All that the tab shows of one run."""

    scene: Scene
    asked: tuple[EditRequest, ...]
    """As it was asked for; where the stages are compared, each result has it at its own."""
    unedited: Image.Image
    results: tuple[Result, ...]
    """One, or one a stage."""
    segmented: bool
    """Whether a segmenter looked."""


class Plan(NamedTuple):
    """What is to be drawn."""

    asked: tuple[EditRequest, ...]
    stages: tuple[str, ...] = ()
    """At which stages to try it; none: at the wishes' own times."""

    @property
    def rows(self) -> list[tuple[str, tuple[EditRequest, ...]]]:
        """The stage and the wishes of each edited picture."""
        if not self.stages:
            return [("", self.asked)]
        return [(stage, tuple(replace(one, stage=stage, steps=None) for one in self.asked)) for stage in self.stages]


def measure_redrawn(
    scene: Scene, plan: Plan, redrawn: Redrawn, dictionary: Dictionary, segmenter: Segmenter | None
) -> Outcome:
    """Measure the pictures of a run."""
    unedited, *images = redrawn.images
    table = next(iter(dictionary.tables.values()))
    labels = [
        None if segmenter is None else torch.from_numpy(final_labels(segmenter, image, table.class_names))
        for image in redrawn.images
    ]
    known = _known(segmenter, table)
    results = []
    for (stage, requests), image, new, out_of_range in zip(
        plan.rows, images, labels[1:], redrawn.out_of_range, strict=True
    ):
        classes = [_classes(one, dictionary, known) for one in requests]
        where = _elsewhere(requests, classes, labels[0], unedited.size[0])
        difference = _pixels(image) - _pixels(unedited)
        low, high = frequencies(difference, where) if where.any() else (np.nan, np.nan)
        kept = np.nan
        moved: list[Moved | None] = [None] * len(requests)
        if labels[0] is not None and new is not None:
            kept = layout_iou(new, labels[0], where, _least(where)) if where.any() else np.nan
            moved = [
                _moved(one, of_request, labels[0], new) if of_request else None
                for one, of_request in zip(requests, classes, strict=True)
            ]
        change = np.asarray(difference.abs().mean(0).double().numpy())
        results.append(Result(requests, stage, image, change, low, high, kept, tuple(moved), out_of_range))
    return Outcome(scene, plan.asked, unedited, tuple(results), segmenter is not None)


def where_it_is(
    segmenter: Segmenter, image: Image.Image, table: ConceptTable, label: str
) -> tuple[float, float] | None:
    """The centre of what a label means, x and y from 0 to 1; None where it is not in the picture."""
    labels = torch.from_numpy(final_labels(segmenter, image, table.class_names))
    mask = _mask(labels, [table.class_names.index(name) for name in _label_embeddings(label, table)])
    if int(mask.sum()) < _least(mask):
        return None
    y, x = (axis.double().mean() for axis in mask.nonzero().T)
    return float(x) / mask.shape[1], float(y) / mask.shape[0]


def _known(segmenter: Segmenter | None, table: ConceptTable) -> set[str]:
    return set() if segmenter is None else set(segmenter.class_names()) & set(table.class_names)


def _label_embeddings(label: str, table: ConceptTable) -> list[str]:
    return [name for senses in named_classes(label, table) for name in senses]


def _classes(request: EditRequest, dictionary: Dictionary, known: set[str]) -> list[int]:
    """The classes that a wish is about, as far as the segmenter knows them."""
    table = next(iter(dictionary.tables.values()))
    label = request.label
    if request.concepts:
        of_site = dictionary.tables[SaeSite(request.hookpoint, request.branch)]  # type: ignore[arg-type]
        labels = {str(of_site.frame["label"].iat[number]) for number in request.concepts}
        label = labels.pop() if len(labels) == 1 else ""
    return [table.class_names.index(name) for name in _label_embeddings(label, table) if name in known]


def _region(request: EditRequest, size: int) -> Tensor:
    mask = cells_mask(request.cells, size) if request.region == PAINTED else request.region
    return RegionMask(mask, size).grid(size, size).view(size, size) > 0


def _elsewhere(requests: Sequence[EditRequest], classes: Sequence[list[int]], old: Tensor | None, size: int) -> Tensor:
    """[H, W] what should stay: for what is moved or taken away, neither the region nor where it was; else all of it."""
    where = torch.ones(size, size, dtype=torch.bool)
    for request, of_request in zip(requests, classes, strict=True):
        if request.kind == "whole":
            continue
        if request.kind == "move" or not of_request or old is None:
            where &= ~_region(request, size)
        if old is not None:
            where &= ~_mask(old, of_request)
    return where


def _moved(request: EditRequest, classes: list[int], old: Tensor, new: Tensor) -> Moved:
    region = _region(request, len(old))
    seen = [_seen(_mask(labels, classes), region) for labels in (old, new)]
    there, area, inside, centre_inside = zip(*seen, strict=True)
    return Moved(request.what, there, area, inside, centre_inside)


def _seen(mask: Tensor, region: Tensor) -> tuple[bool, float, float, bool]:
    """Whether something is there, the part of the picture that it fills, the part of it inside, and its centre's."""
    area = float(mask.double().mean())
    if int(mask.sum()) < _least(mask):
        return False, area, float("nan"), False
    row, column = mask.nonzero().double().mean(0).round().long().tolist()
    return True, area, float(region[mask].double().mean()), bool(region[row, column])


def _mask(labels: Tensor, classes: Sequence[int]) -> Tensor:
    return torch.isin(labels, torch.tensor(list(classes), dtype=labels.dtype))


def _least(mask: Tensor) -> int:
    return round(_LEAST_SHARE * mask.numel())


def _pixels(image: Image.Image) -> Tensor:
    """[3, H, W] from 0 to 1."""
    return torch.from_numpy(np.asarray(image.convert("RGB"), dtype=np.float32) / 255).permute(2, 0, 1)
