"""The layout predicted from an image's codes at every step, and its agreement with the final image."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from core.arrays import Floats, Ints
from core.concepts.layout import read_code
from core.concepts.table import ConceptTable
from core.concepts.trace import CodeTrace, SaeSite
from core.segmentation.grids import cell_counts, class_masks, majority, mask_iou
from core.segmentation.semantic import Segmenter
from core.ui.backend.dictionary import ConceptDictionary
from core.ui.concepts.results import default_first

Labels = Ints

_NONE = 0x40
"""Character of a cell without a class; the classes' characters follow it. layout.js uses the same."""


class Readout(NamedTuple):
    """One way to predict the layout: from which codes, and among which classes."""

    site: SaeSite
    """Block and branch."""
    uses_prompt_classes: bool
    """Whether only the objects named in the prompt, and all backgrounds, can be predicted."""

    @property
    def key(self) -> str:
        """The page's key for it."""
        return f"{self.site.hookpoint}|{self.site.branch}|{'prompt' if self.uses_prompt_classes else 'any'}"


class PredictedLayout(NamedTuple):
    """The layouts that one readout predicts, over the S steps."""

    labels: Labels
    """[S, h, w] class indices, -1 for none."""
    ious: Floats
    """[S, M] IoU with the final image of the objects in the prompt; NaN for an object that fills no cell of it."""

    @property
    def mean(self) -> Floats:
        """[S] mean IoU over the objects that are present; NaN if none is."""
        present = self.ious[:, self.present]
        return present.mean(1) if present.shape[1] else np.full(len(self.ious), np.nan)

    @property
    def present(self) -> list[bool]:
        """[M] whether each object fills a cell of the final image."""
        return [bool(np.isfinite(of_object).all()) for of_object in self.ious.T]

    @property
    def text(self) -> str:
        """The labels, one character per cell."""
        return "".join(chr(_NONE + 1 + label) for label in self.labels.flatten().tolist())


@dataclass(frozen=True, eq=False)
class LayoutReading:
    """All that the tab shows of an image."""

    classes: tuple[str, ...]
    """Names of the K classes."""
    candidate_classes: tuple[str, ...]
    """The objects named in the prompt, and all backgrounds; empty if the prompt names no object."""
    objects: tuple[int, ...]
    """The M classes that words of the prompt mean in this image; empty if it cannot be segmented."""
    final: Labels | None
    """[H, W] classes of the final image."""
    backgrounds: frozenset[str]
    """The classes that are backgrounds."""
    predicted: Mapping[Readout, PredictedLayout]
    """By readout, the default first."""


def read_scene(dictionary: ConceptDictionary, trace: CodeTrace, prompt: str, final: Labels | None) -> LayoutReading:
    """Predict the layout at every step with every readout. All tables of a collection have the same classes."""
    tables = list(dictionary.tables.values())
    classes, backgrounds = tables[0].class_names, background_names(tables)
    named = [senses for senses in named_classes(prompt, tables[0]) if not backgrounds.intersection(senses)]
    mentioned = {sense for senses in named for sense in senses}
    candidates = tuple(name for name in classes if name in mentioned | backgrounds) if named else ()
    objects = () if final is None else tuple(dict.fromkeys(_largest_sense(final, classes, senses) for senses in named))
    sites = [site for site in default_first(trace.sites()) if site in dictionary.readers]
    readouts = [Readout(site, limited) for limited in (True, False) for site in sites if candidates or not limited]
    predicted = {
        readout: _predict(
            dictionary, trace, readout.site, candidates if readout.uses_prompt_classes else None, objects, final
        )
        for readout in readouts
    }
    return LayoutReading(classes, candidates, objects, final, frozenset(backgrounds), predicted)


def background_names(tables: Iterable[ConceptTable]) -> set[str]:
    """The classes that label a background concept in any of the tables."""
    return {str(label) for table in tables for label in table.frame["label"][table.frame["kind"] == "background"]}


def named_classes(prompt: str, table: ConceptTable) -> list[tuple[str, ...]]:
    """For each word of a prompt that names a class, the classes it can mean, in the order of the prompt."""
    meant: dict[str, list[str]] = {}
    for name in table.class_names:
        for word in dict.fromkeys((name, *table.info.words.get(name, ()))):
            meant.setdefault(word.casefold(), []).append(name)
    found = ((re.search(rf"(?<!\w){re.escape(word)}(s|es)?(?!\w)", prompt.casefold()), word) for word in meant)
    found_at = sorted((match.start(), word) for match, word in found if match)
    return list(dict.fromkeys(tuple(meant[word]) for _, word in found_at))


def final_labels(segmenter: Segmenter, image: Image.Image, classes: Sequence[str]) -> Labels:
    """[H, W] indices into `classes` of what the segmenter finds in an image; -1 for none of them."""
    labels = segmenter.segment([image]).label_map()[0].cpu()
    known = [classes.index(name) if name in classes else -1 for name in segmenter.class_names()]
    return np.asarray(torch.tensor([*known, -1])[labels].numpy(), dtype=np.int64)


def _largest_sense(final: Labels, classes: Sequence[str], senses: Sequence[str]) -> int:
    """The meaning of a word that fills most of the image."""
    return max((classes.index(sense) for sense in senses), key=lambda number: int((final == number).sum()))


def _predict(
    dictionary: ConceptDictionary,
    trace: CodeTrace,
    site: SaeSite,
    candidate_classes: Sequence[str] | None,
    objects: Sequence[int],
    final: Labels | None,
) -> PredictedLayout:
    reader, grid = dictionary.readers[site], trace.grids[site.hookpoint]
    layouts = [
        read_code(trace.code(site, step), grid, reader, candidate_classes=candidate_classes)
        for step in range(trace.n_steps)
    ]
    numbers = np.array([*(reader.classes.index(name) for name in layouts[0].classes), -1])
    labels = np.stack([numbers[layout.labels] for layout in layouts])
    return PredictedLayout(labels, _ious(labels, objects, final))


def _ious(labels: Labels, objects: Sequence[int], final: Labels | None) -> Floats:
    """[S, M] as in `python -m training evaluate layout`: against the majority class of each cell's pixels."""
    if final is None or not objects:
        return np.empty((len(labels), 0))
    truth = majority(cell_counts(torch.from_numpy(final)[None], int(final.max()) + 1, *labels.shape[1:]))
    targets = torch.tensor([objects])
    masks = class_masks(torch.from_numpy(labels), targets.expand(len(labels), -1))
    of_truth = class_masks(truth, targets).expand(len(labels), -1, -1, -1)
    return np.asarray(mask_iou(masks, of_truth).numpy())
