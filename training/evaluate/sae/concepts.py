"""What concepts mean: how many latents got a name, and how pure they are early, in the middle and late.

The papers' figures beside which these stand (Tinaz et al. 2025, arXiv 2504.15473): cohesion of the labels .588, .639,
.664 and similarity between concepts .433, .363, .344 at t = 1, 0.5 and 0, both by Word2Vec. Here a label is like itself
and like no other, so that a figure of one concept's purity has a plain meaning, and chance stands beside it.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from core.concepts.io import KINDS
from core.concepts.table import ConceptTable
from core.diffusion.diffuser import Diffuser
from core.diffusion.schedule import step_at, step_times
from core.sae.autoencoder import SaeId, SparseAutoencoder
from core.segmentation.grids import cell_counts, majority
from core.segmentation.semantic import Segmenter
from training.common.report import Cell, Table
from training.evaluate.common.proportions import Z
from training.labels.sampling import label_maps, sample_and_encode
from training.labels.tally import Entries

MIN_CELLS = 32
"""A concept that is active on fewer cells at a step is left out there."""
NAMED = ("object", "background", "style")
"""Kinds that have a label."""


@dataclass(frozen=True)
class Settings:
    """How much is measured."""

    n_images: int = 512
    """Held-out prompts."""
    times: tuple[float, ...] = (1.0, 0.5, 0.0)
    """Normalised times at which an SAE for all times is looked at."""
    batch_size: int = 32
    """Pictures drawn together; chance pairs each with its neighbour's masks."""


QUICK = Settings(n_images=32, batch_size=16)
"""Shows that it works; its figures mean little."""

Read = Mapping[SaeId, tuple[SparseAutoencoder, ConceptTable]]


@dataclass
class Meetings:
    """On how many cells latents and classes met, picture by picture, as sums."""

    cells: Tensor
    """[d_sae, K] cells on which a latent is above its threshold and the class is."""
    squares: Tensor
    """[d_sae, K] sum over pictures of the squares of such cells."""
    own: Tensor
    """[d_sae] sum over pictures of the squares of all cells on which a latent is above its threshold."""

    @classmethod
    def none(cls, d_sae: int, n_classes: int) -> "Meetings":
        """Before the first picture."""
        double = torch.float64
        by_class = [torch.zeros(d_sae, n_classes, dtype=double) for _ in range(2)]
        return cls(by_class[0], by_class[1], torch.zeros(d_sae, dtype=double))

    def add(self, entries: Entries, classes: Tensor) -> None:
        """Count entries, those above the thresholds, against the classes [B, positions]; -1 is none and not counted."""
        d_sae, n_classes = self.cells.shape
        of = classes[entries.images, entries.positions]
        known = of >= 0
        flat = (entries.images[known] * d_sae + entries.latents[known]) * n_classes + of[known]
        each = torch.bincount(flat, minlength=len(classes) * d_sae * n_classes).double()
        each = each.view(len(classes), d_sae, n_classes)
        self.cells += each.sum(0)
        self.squares += each.square().sum(0)
        self.own += each.sum(2).square().sum(0)

    @property
    def enough(self) -> Tensor:
        """[d_sae] whether a latent met classes on enough cells, and in more than one picture."""
        n = self.cells.sum(1)
        return (n >= MIN_CELLS) & (self.own < n.square())

    @property
    def cohesion(self) -> Tensor:
        """[d_sae] probability that two of a latent's cells, in different pictures, are of one class."""
        same = (self.cells.square() - self.squares).sum(1)
        return same / (self.cells.sum(1).square() - self.own)

    @property
    def likeness(self) -> Tensor:
        """[n, n] cosines between the class shares of the latents that met enough."""
        directions = F.normalize(self.cells[self.enough], dim=1)
        return directions @ directions.T


@dataclass
class Bench:
    """The pictures and what the concepts were on: drawn once, when they are first asked for."""

    model: Diffuser
    segmenter: Segmenter
    prompts: Sequence[str]
    read: Read
    settings: Settings
    chance: dict[tuple[SaeId, float], Meetings] = field(default_factory=dict)

    @cached_property
    def met(self) -> Mapping[tuple[SaeId, float], Meetings]:
        """By SAE and time. `chance` has the same with each picture's masks taken from its neighbour."""
        settings, n_steps = self.settings, self.model.spec.num_inference_steps
        step_of = {time: step_at(time, n_steps) for time in settings.times}
        time_of = {float(step_times(n_steps)[step]): time for time, step in step_of.items()}
        saes = {sae_id: sae for sae_id, (sae, _) in self.read.items()}
        steps = dict.fromkeys(saes, sorted(step_of.values()))
        n_classes = len(self.segmenter.class_names())
        met = {
            (sae_id, time): Meetings.none(sae.cfg.d_sae, n_classes)
            for sae_id, sae in saes.items()
            for time in settings.times
        }
        self.chance = {key: Meetings.none(*of.cells.shape) for key, of in met.items()}
        for start in range(0, len(self.prompts), settings.batch_size):
            part = self.prompts[start : start + settings.batch_size]
            batch = sample_and_encode(self.model, saes, steps, part, range(start, start + len(part)))
            labels = label_maps(self.segmenter, batch.images)
            classes = {h: majority(cell_counts(labels, n_classes, *size)) for h, size in batch.sizes.items()}
            for sae_id, codes_by_step in batch.codes_by_step.items():
                of = classes[sae_id.hookpoint].flatten(1)
                thresholds = torch.from_numpy(self.read[sae_id][1].frame["threshold"].to_numpy(copy=True))
                for step_codes in codes_by_step:
                    above = step_codes.entries.values >= thresholds[step_codes.entries.latents]
                    entries = Entries(*(part[above] for part in step_codes.entries))
                    key = sae_id, time_of[step_codes.t]
                    met[key].add(entries, of)
                    self.chance[key].add(entries, of.roll(1, 0))
        return met


def labelled(bench: Bench) -> Table:
    """How many latents got a name, of which kind, and how well it fits."""
    rows: list[dict[str, Cell]] = []
    for sae_id, (sae, table) in bench.read.items():
        frame = table.frame[table.frame["firing_rate"] > 0]
        kinds = Counter(frame["kind"])
        named = frame[frame["kind"].isin(NAMED)]
        masks = frame[frame["kind"].isin(NAMED[:2])]
        row: dict[str, Cell] = {**_identity(sae_id, sae), "latents": str(sae.cfg.d_sae), "that fire": str(len(frame))}
        row["labelled"] = f"{100 * len(named) / max(len(frame), 1):.0f} %"
        row |= {kind: str(kinds[kind]) for kind in KINDS}
        row["different labels"] = str(named["label"].nunique())
        row["held-out IoU"] = f"{masks['held_out_iou'].median():.2f}" if len(masks) else None
        row["by chance"] = f"{masks['chance_iou'].median():.2f}" if len(masks) else None
        rows.append(row)
    notes = (
        "Labelled: things, places and styles whose held-out score beats that of exchanged masks at a false discovery "
        "rate of 5 %, of the latents that fire at all. IoU: median over things and places.",
        "Context-free: where it fires is told by the position alone.",
    )
    return Table("labelled", "Latents with a name", rows, notes)


def purity(bench: Bench) -> Table:
    """Whether a concept means one thing, and whether concepts mean different things, by time."""
    rows: list[dict[str, Cell]] = []
    details = []
    for sae_id, (sae, _) in bench.read.items():
        cohesion = _identity(sae_id, sae) | {"figure": "cohesion"}
        likeness = _identity(sae_id, sae) | {"figure": "similarity"}
        for time in bench.settings.times:
            met = bench.met[sae_id, time]
            chance = bench.chance[sae_id, time]
            pure, pure_by_chance = (of.cohesion[of.enough] for of in (met, chance))
            alike, alike_by_chance = map(_others, (met.likeness, chance.likeness))
            cohesion |= {f"t = {time:.2f}": _mean(pure, 1), f"chance, {time:.2f}": _mean(pure_by_chance, 1)}
            likeness |= {f"t = {time:.2f}": _mean(alike, 2), f"chance, {time:.2f}": _mean(alike_by_chance, 2)}
            details.append({"path": sae_id.path, "t": time, "n": len(pure), "cohesion": float(pure.mean())})
        rows += [cohesion, likeness]
    notes = (
        f"{len(bench.prompts)} held-out prompts. Cohesion: the probability that two cells on which a concept is above "
        "its threshold, in different pictures, belong to one class; mean over concepts. Similarity: the mean cosine "
        "between the class shares of two concepts. Intervals (95 %) over concepts.",
        f"Of the concepts with at least {MIN_CELLS} cells at that step. Chance: the masks of another picture.",
    )
    return Table("purity", "Concepts over time", rows, notes, {"figures": details})


PARTS = (labelled, purity)
"""In this order."""


def _identity(sae_id: SaeId, sae: SparseAutoencoder) -> dict[str, Cell]:
    return {"hookpoint": sae_id.hookpoint, "branch": sae_id.branch, "k": str(sae.cfg.k)}


def _others(likeness: Tensor) -> Tensor:
    """[n] each one's mean likeness with the others."""
    return (likeness.sum(1) - likeness.diagonal()) / max(len(likeness) - 1, 1)


def _mean(values: Tensor, order: int) -> str:
    """A mean with its interval; `order` is 2 where each value is a mean over pairs, whose other ends vary too."""
    if len(values) < 2:
        return "too few"
    half = Z * order * float(values.std()) / math.sqrt(len(values))
    mean = float(values.mean())
    return f"{mean:.2f} ({mean - half:.2f} to {mean + half:.2f})"
