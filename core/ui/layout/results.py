"""What a picture's codes foretell of its layout at every step, and how far that agrees with the final picture."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from core.arrays import Floats, Ints
from core.concepts.layout import BRANCH, read_code
from core.concepts.table import ConceptTable
from core.concepts.trace import CodeTrace, SaeSite
from core.segmentation.grids import cell_counts, class_masks, majority, mask_iou
from core.segmentation.semantic import Segmenter
from core.spec import default_hookpoint
from core.ui.concepts.dictionary import Dictionary

Labels = Ints

_NONE = 0x40
"""Character of a cell without a class; those of the classes follow it."""


class Choice(NamedTuple):
    """A way of reading the layout."""

    site: SaeSite
    """Block and branch."""
    told: bool
    """Whether the reader is told which things the prompt names."""

    @property
    def key(self) -> str:
        """A name for the page."""
        return f"{self.site.hookpoint}|{self.site.branch}|{'told' if self.told else 'any'}"


class PredictedLayout(NamedTuple):
    """What one way of reading saw, over the S steps."""

    labels: Labels
    """[S, h, w] index of a class, -1 where there is none."""
    ious: Floats
    """[S, M] with the final picture, by the prompt's things; not a number where a thing fills no cell of it."""

    @property
    def mean(self) -> Floats:
        """[S] over the things that are there; not a number without any."""
        there = self.ious[:, self.there]
        return there.mean(1) if there.shape[1] else np.full(len(self.ious), np.nan)

    @property
    def there(self) -> list[bool]:
        """[M] which things fill a cell of the final picture."""
        return [bool(np.isfinite(of_object).all()) for of_object in self.ious.T]

    @property
    def text(self) -> str:
        """The labels, a character a cell."""
        return "".join(chr(_NONE + 1 + label) for label in self.labels.flatten().tolist())


@dataclass(frozen=True, eq=False)
class Reading:
    """All that the tab shows of a picture."""

    classes: tuple[str, ...]
    """Names of the K classes."""
    among: tuple[str, ...]
    """What a reader is told may be there: the things that the prompt names, and all places; none if it names none."""
    things: tuple[int, ...]
    """The M classes that the words of the prompt mean in this picture; none where it cannot be segmented."""
    final: Labels | None
    """[H, W] classes of the final picture."""
    sites: frozenset[str]
    """Which of the classes are places."""
    foretold: Mapping[Choice, PredictedLayout]
    """Every way of reading; the first is what is shown where nothing is chosen."""


def read_scene(dictionary: Dictionary, trace: CodeTrace, prompt: str, final: Labels | None) -> Reading:
    """Read every step in every way. The tables of a collection have the same classes."""
    tables = list(dictionary.tables.values())
    classes, sites = tables[0].class_names, background_names(tables)
    named = [senses for senses in named_classes(prompt, tables[0]) if not sites.intersection(senses)]
    mentioned = {sense for senses in named for sense in senses}
    among = tuple(name for name in classes if name in mentioned | sites) if named else ()
    things = () if final is None else tuple(dict.fromkeys(_most(final, classes, senses) for senses in named))
    ways = [Choice(site, told) for told in (True, False) for site in _usual_first(trace) if among or not told]
    foretold = {
        way: _predict(dictionary, trace, way.site, among if way.told else None, things, final)
        for way in ways
        if way.site in dictionary.readers
    }
    return Reading(classes, among, things, final, frozenset(sites), foretold)


def background_names(tables: Iterable[ConceptTable]) -> set[str]:
    """The classes that are places, as far as a concept of the tables is labelled with them."""
    return {str(label) for table in tables for label in table.frame["label"][table.frame["kind"] == "background"]}


def named_classes(prompt: str, table: ConceptTable) -> list[tuple[str, ...]]:
    """The classes that each word of a prompt can mean, for the words that mean any, in the order of the prompt."""
    meant: dict[str, list[str]] = {}
    for name in table.class_names:
        for word in dict.fromkeys((name, *table.info.words.get(name, ()))):
            meant.setdefault(word.casefold(), []).append(name)
    found = ((re.search(rf"(?<!\w){re.escape(word)}(s|es)?(?!\w)", prompt.casefold()), word) for word in meant)
    spoken = sorted((match.start(), word) for match, word in found if match)
    return list(dict.fromkeys(tuple(meant[word]) for _, word in spoken))


def final_labels(segmenter: Segmenter, image: Image.Image, classes: Sequence[str]) -> Labels:
    """[H, W] which of the classes the segmenter sees in a picture; -1 where it sees none of them."""
    labels = segmenter.segment([image]).label_map()[0].cpu()
    known = [classes.index(name) if name in classes else -1 for name in segmenter.class_names()]
    return np.asarray(torch.tensor([*known, -1])[labels].numpy(), dtype=np.int64)


def _usual_first(trace: CodeTrace) -> list[SaeSite]:
    """The places of a trace, that which `core.predict_layout` reads by default first."""
    hookpoints = list(dict.fromkeys(site.hookpoint for site in trace.sites()))
    usual = SaeSite(default_hookpoint(hookpoints), BRANCH)
    return sorted(trace.sites(), key=lambda site: site != usual)


def _most(final: Labels, classes: Sequence[str], senses: Sequence[str]) -> int:
    """The sense of a word that fills most of the picture."""
    return max((classes.index(sense) for sense in senses), key=lambda number: int((final == number).sum()))


def _predict(
    dictionary: Dictionary,
    trace: CodeTrace,
    site: SaeSite,
    among: Sequence[str] | None,
    things: Sequence[int],
    final: Labels | None,
) -> PredictedLayout:
    reader, grid = dictionary.readers[site], trace.grids[site.hookpoint]
    layouts = [
        read_code(trace.code(site, step), grid, reader, candidate_classes=among) for step in range(trace.n_steps)
    ]
    numbers = np.array([*(reader.classes.index(name) for name in layouts[0].classes), -1])
    labels = np.stack([numbers[layout.labels] for layout in layouts])
    return PredictedLayout(labels, _ious(labels, things, final))


def _ious(labels: Labels, things: Sequence[int], final: Labels | None) -> Floats:
    """[S, M] as `python -m training evaluate layout` counts them: against the majority of each cell's pixels."""
    if final is None or not things:
        return np.empty((len(labels), 0))
    truth = majority(cell_counts(torch.from_numpy(final)[None], int(final.max()) + 1, *labels.shape[1:]))
    targets = torch.tensor([things])
    masks = class_masks(torch.from_numpy(labels), targets.expand(len(labels), -1))
    of_truth = class_masks(truth, targets).expand(len(labels), -1, -1, -1)
    return np.asarray(mask_iou(masks, of_truth).numpy())
