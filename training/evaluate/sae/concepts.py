"""How many latents get a label, and how pure the labelled concepts are early, in the middle and late in sampling.

Tinaz et al. 2025 (arXiv 2504.15473) report a cohesion of .588, .639 and .664 and a similarity between concepts of .433,
.363 and .344 at t = 1, 0.5 and 0, both by Word2Vec. Here labels are classes of the scenes: two labels are alike if they
are equal, and chance is measured with the masks of other images.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

import core
from core.concepts.io import KINDS
from core.concepts.table import ConceptTable
from core.diffusion.diffuser import Diffuser
from core.diffusion.schedule import step_at, step_times
from core.sae.autoencoder import SaeId, SparseAutoencoder
from core.segmentation.grids import cell_counts, majority
from core.segmentation.semantic import Segmenter, load_segmenter
from training.common.report import Cell, Table
from training.evaluate.common.evaluation import Evaluation, Subject, shared_saes
from training.evaluate.common.proportions import Z
from training.labels.sampling import label_maps, sample_and_encode
from training.labels.tally import Entries

MIN_CELLS = 32
"""Concepts active on fewer cells at a step are left out there."""
NAMED = ("object", "background", "style")
"""Kinds of concepts that have a label."""


@dataclass(frozen=True)
class ConceptSettings:
    """How much is measured."""

    n_images: int = 512
    """Held-out prompts."""
    times: tuple[float, ...] = (1.0, 0.5, 0.0)
    """Normalised times at which concepts are measured."""
    batch_size: int = 32
    """Images sampled together; for chance, each is paired with the masks of its neighbour."""


QUICK = ConceptSettings(n_images=32, batch_size=16)
"""A smoke test; its figures mean little."""

Read = Mapping[SaeId, tuple[SparseAutoencoder, ConceptTable]]


@dataclass
class Cooccurrence:
    """Counts of the cells on which latents and classes occur together, summed over images."""

    cells: Tensor
    """[d_sae, K] cells of the class on which the latent is above its threshold."""
    squares: Tensor
    """[d_sae, K] sum over images of the squared numbers of such cells."""
    own: Tensor
    """[d_sae] sum over images of the squared numbers of all cells on which the latent is above its threshold."""

    @classmethod
    def empty(cls, d_sae: int, n_classes: int) -> "Cooccurrence":
        """Counts of zero."""
        double = torch.float64
        by_class = [torch.zeros(d_sae, n_classes, dtype=double) for _ in range(2)]
        return cls(by_class[0], by_class[1], torch.zeros(d_sae, dtype=double))

    def add(self, entries: Entries, classes: Tensor) -> None:
        """Count entries above the thresholds against the classes [B, positions]; -1 is no class and not counted."""
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
        """[d_sae] whether a latent has enough cells, in more than one image."""
        n = self.cells.sum(1)
        return (n >= MIN_CELLS) & (self.own < n.square())

    @property
    def cohesion(self) -> Tensor:
        """[d_sae] probability that two of a latent's cells, in different images, are of one class."""
        same = (self.cells.square() - self.squares).sum(1)
        return same / (self.cells.sum(1).square() - self.own)

    @property
    def similarity(self) -> Tensor:
        """[n, n] cosines between the class frequencies of the n latents with enough cells."""
        directions = F.normalize(self.cells[self.enough], dim=1)
        return directions @ directions.T


@dataclass
class ConceptBench:
    """The concepts of a collection and the classes they are active on; measured once, on first use."""

    model: Diffuser
    segmenter: Segmenter
    prompts: Sequence[str]
    read: Read
    settings: ConceptSettings
    chance: dict[tuple[SaeId, float], Cooccurrence] = field(default_factory=dict)

    @cached_property
    def counts(self) -> Mapping[tuple[SaeId, float], Cooccurrence]:
        """By SAE and time. `chance` holds the same with each image's masks taken from its neighbour."""
        settings, n_steps = self.settings, self.model.spec.num_inference_steps
        step_of = {time: step_at(time, n_steps) for time in settings.times}
        time_of = {float(step_times(n_steps)[step]): time for time, step in step_of.items()}
        saes = {sae_id: sae for sae_id, (sae, _) in self.read.items()}
        steps = dict.fromkeys(saes, sorted(step_of.values()))
        n_classes = len(self.segmenter.class_names())
        counts = {
            (sae_id, time): Cooccurrence.empty(sae.cfg.d_sae, n_classes)
            for sae_id, sae in saes.items()
            for time in settings.times
        }
        self.chance = {key: Cooccurrence.empty(*of.cells.shape) for key, of in counts.items()}
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
                    counts[key].add(entries, of)
                    self.chance[key].add(entries, of.roll(1, 0))
        return counts


def labelled(bench: ConceptBench) -> Table:
    """How many latents have a label, of which kind, and how well it fits."""
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
        "Labelled: share of the latents that fire at all whose label (object, background or style) scores better on "
        "held-out images than with exchanged masks, at a false discovery rate of 5 %. IoU: median over objects and "
        "backgrounds.",
        "Context-free: latents whose firing is predicted by the position alone.",
    )
    return Table("labelled", "Labelled latents", rows, notes)


def purity(bench: ConceptBench) -> Table:
    """Whether each concept has one meaning, and whether concepts have different meanings, by time."""
    rows: list[dict[str, Cell]] = []
    details = []
    for sae_id, (sae, _) in bench.read.items():
        cohesion = _identity(sae_id, sae) | {"figure": "cohesion"}
        similarity = _identity(sae_id, sae) | {"figure": "similarity"}
        for time in bench.settings.times:
            counts = bench.counts[sae_id, time]
            chance = bench.chance[sae_id, time]
            pure, pure_by_chance = (of.cohesion[of.enough] for of in (counts, chance))
            alike, alike_by_chance = map(_others, (counts.similarity, chance.similarity))
            cohesion |= {f"t = {time:.2f}": _mean(pure, 1), f"chance, {time:.2f}": _mean(pure_by_chance, 1)}
            similarity |= {f"t = {time:.2f}": _mean(alike, 2), f"chance, {time:.2f}": _mean(alike_by_chance, 2)}
            details.append({"path": sae_id.path, "t": time, "n": len(pure), "cohesion": float(pure.mean())})
        rows += [cohesion, similarity]
    notes = (
        f"{len(bench.prompts)} held-out prompts. Cohesion: the probability that two cells on which a concept is above "
        "its threshold, in different images, belong to one class; mean over concepts. Similarity: the mean cosine "
        "between the class frequencies of two concepts. 95 % intervals over concepts.",
        f"Only concepts with at least {MIN_CELLS} cells at that step. Chance: with the masks of another image.",
    )
    return Table("purity", "Purity of concepts over time", rows, notes, {"figures": details})


def _identity(sae_id: SaeId, sae: SparseAutoencoder) -> dict[str, Cell]:
    return {"hookpoint": sae_id.hookpoint, "branch": sae_id.branch, "k": str(sae.cfg.k)}


def _others(similarity: Tensor) -> Tensor:
    """[n] each concept's mean similarity to the others."""
    return (similarity.sum(1) - similarity.diagonal()) / max(len(similarity) - 1, 1)


def _mean(values: Tensor, order: int) -> str:
    """A mean with its interval; `order` is 2 where each value is a mean over pairs, whose other members vary too."""
    if len(values) < 2:
        return "too few"
    half = Z * order * float(values.std()) / math.sqrt(len(values))
    mean = float(values.mean())
    return f"{mean:.2f} ({mean - half:.2f} to {mean + half:.2f})"


def _bench(subject: Subject, settings: ConceptSettings) -> ConceptBench:
    root = subject.saes
    read = {sae_id: (core.load_sae(root, *sae_id), core.load_concepts(root, *sae_id)) for sae_id in shared_saes(root)}
    segmenter = load_segmenter(subject.package / "segmenter")
    return ConceptBench(subject.model, segmenter, subject.prompts, read, settings)


EVALUATION = Evaluation(
    name="concepts",
    title="Concepts",
    description=__doc__,
    settings=ConceptSettings(),
    quick=QUICK,
    bench=_bench,
    parts=(labelled, purity),
    per_collection=True,
    n_prompts=lambda settings: settings.n_images,
)
