"""What each latent of a tally is called, and whether that is more than chance.

A latent's class and threshold are those of the highest IoU on the first split. They become its label if their IoU on
the other split is more than comes about where pictures are paired with other pictures' masks and put through the very
same choice: more than positions alone can tell. How much more is measured in the spread of the latent's own permuted
values (with a constant added to the spread: Tusher et al. 2001, "Significance analysis of microarrays"), which makes
latents comparable, so that the permuted values of all of them together give p-values, and the procedure of Benjamini
and Hochberg the labels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from core.arrays import Bools, Floats, Ints
from core.concepts.io import Candidate, Kind, LabelledLatent, Scores
from training.labels.tally import FiringStatistics

FALSE_DISCOVERY_RATE = 0.05
"""Of the labels."""
MIN_IMAGES = 5
"""A latent that fires in fewer pictures of either split gets no label: nothing could bear it out."""
STYLE_AUROC = 0.75
"""Least held-out AUROC of a concept that is called by a style: three times in four its mean tells the style."""
CONTEXT_FREE_SHARE = 0.5
"""A concept of whose variance position explains more is context-free ..."""
CONTEXT_FREE_RATE = 0.01
"""... if it fires on at least this share of the cells."""
PRESENT = 1 / 256
"""A class is in a picture if it covers at least this share of it."""
N_RUNNER_UPS = 3
"""Classes named beside the best one."""


class Choice(NamedTuple):
    """The class and threshold of every latent, chosen on the first split."""

    classes: Tensor
    """[d_sae] of the highest IoU there."""
    levels: Tensor
    """[d_sae] level from which on a value counts as active."""
    iou: Tensor
    """[d_sae] on the first split."""
    held_out: Tensor
    """[d_sae] on the second split."""


class Overlaps(NamedTuple):
    """Overlaps of latents and classes by threshold, for one pairing of pictures and masks."""

    both: Tensor
    """[levels, d_sae, splits, K] float64 cells from a level on and of a class."""
    active: Tensor
    """[levels, d_sae, splits, 1] cells from a level on."""
    there: Tensor
    """[splits, K] cells of a class."""

    @property
    def iou(self) -> Tensor:
        """[levels, d_sae, splits, K] intersection over union."""
        return self.both / (self.active + self.there - self.both).clamp(min=1)


@dataclass(frozen=True)
class ImageAttributes:
    """What is known of the pictures of a tally, in its order."""

    split: Ints
    """[N] 0: choose, 1: hold out."""
    areas: Floats
    """[N, K] share of the picture that each class covers."""
    styles: Bools
    """[N, n_styles] whether the prompt has each style word."""


@dataclass(frozen=True)
class LabelVocabulary:
    """What latents can be called."""

    classes: tuple[str, ...]
    """Names of the K classes."""
    backgrounds: frozenset[str]
    """Those that are places; the others are objects."""
    styles: tuple[str, ...]
    """Style words."""


class Aurocs(NamedTuple):
    """How well the mean over a picture tells which pictures have a property."""

    auroc: Floats
    """[properties, d_sae] probability that a picture with it has the higher mean; 0.5 where all or none have it."""
    p_value: Floats
    """[properties, d_sae] of that or more where the mean tells nothing (Mann and Whitney)."""


def overlaps(tally: FiringStatistics, pairing: int = 0) -> Overlaps:
    """The overlaps of a tally for a pairing; 0 is that of pictures with their own masks."""
    return Overlaps(
        tally.hits[:, :, :, pairing].double().flip(0).cumsum(0).flip(0),
        tally.area.double().flip(0).cumsum(0).flip(0)[..., None],
        tally.cells.double(),
    )


def choose(found: Overlaps) -> Choice:
    """The class and threshold of the highest IoU on the first split, and what they come to on the second."""
    iou = found.iou
    n_classes = iou.shape[3]
    best, at = iou[:, :, 0].movedim(0, 1).flatten(1).max(1)  # [d_sae, levels x K]
    levels, classes = at // n_classes, at % n_classes
    return Choice(classes, levels, best, iou[levels, torch.arange(len(best)), 1, classes])


def p_values(real: Floats, permuted: Floats, candidates: Bools) -> Floats:
    """[d_sae] how often as much above its own chance level as `real` [d_sae] comes about in `permuted` [P, d_sae].

    Latents that are no candidates have 1 and are left out of what comes about by chance.
    """
    n = len(permuted)
    real, permuted, out = real[candidates], permuted[:, candidates], np.ones(len(real))
    if not len(real):
        return out
    total, squares = permuted.sum(0), (permuted**2).sum(0)
    spread = permuted.std(0, ddof=1)
    fudge = np.median(spread) + 1e-9
    # Each permuted value is measured against the others of its latent, as the real one is against all of them.
    mean = (total - permuted) / (n - 1)
    variance = (squares - permuted**2 - (n - 1) * mean**2) / (n - 2)
    null = np.sort(((permuted - mean) / (np.sqrt(variance.clip(0)) + fudge)).ravel())
    excess = (real - total / n) / (spread + fudge)
    out[candidates] = (1 + len(null) - np.searchsorted(null, excess, side="left")) / (1 + len(null))
    return out


def benjamini_hochberg(p: Floats, rate: float = FALSE_DISCOVERY_RATE) -> Bools:
    """Which p-values stand, so that of those on average at most this share is false."""
    order = np.argsort(p)
    passed = p[order] <= rate * np.arange(1, len(p) + 1) / len(p)
    stands = np.zeros(len(p), dtype=bool)
    if passed.any():
        stands[order[: np.flatnonzero(passed)[-1] + 1]] = True
    return stands


def aurocs(means: Floats, properties: Bools) -> Aurocs:
    """How well means [N, d_sae] tell properties [N, n]."""
    n = len(means)
    ranks, ties = np.empty(means.shape), np.empty(means.shape[1])
    for latent, column in enumerate(means.T):
        _, inverse, counts = np.unique(column, return_inverse=True, return_counts=True)
        ranks[:, latent] = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
        ties[latent] = (counts**3.0 - counts).sum()
    with_it = properties.sum(0)[:, None].astype(np.float64)
    pairs = with_it * (n - with_it)
    told = np.maximum(pairs, 1)
    auroc = np.where(pairs > 0, (properties.T @ ranks - with_it * (with_it + 1) / 2) / told, 0.5)
    deviation = np.sqrt((n + 1 - ties / max(n * (n - 1), 1)).clip(0) / (12 * told))
    z = (auroc - 0.5) / np.maximum(deviation, 1e-12)
    return Aurocs(auroc, np.vectorize(lambda one: math.erfc(one / math.sqrt(2)) / 2, otypes=[float])(z))


def name_latents(tally: FiringStatistics, facts: ImageAttributes, names: LabelVocabulary) -> list[LabelledLatent]:
    """What each latent is called, of what kind it is, and what was measured of it."""
    found = overlaps(tally)
    choice = choose(found)
    permuted = np.stack([choose(overlaps(tally, p)).held_out.numpy() for p in range(1, tally.hits.shape[3])])
    means = tally.means.double().numpy()
    active = np.stack([(means[facts.split == split] > 0).sum(0) for split in (0, 1)])
    candidates: Bools = active.min(0) >= MIN_IMAGES
    p = p_values(choice.held_out.numpy(), permuted, candidates)
    stands = benjamini_hochberg(p) & (choice.iou.numpy() > 0)
    styles = _styles(means, facts, candidates)
    held_out = facts.split == 1
    presence = aurocs(means[held_out], facts.areas[held_out] >= PRESENT).auroc
    of_class = presence[choice.classes.numpy(), np.arange(len(p))]
    n_active = tally.area.sum((0, 2)).double()
    rate = n_active / tally.n_cells.sum().clamp(min=1)
    some, weight = n_active.clamp(min=1), tally.value_sum.clamp(min=1e-30)
    rows = torch.arange(len(p))
    both, level_area = found.both[choice.levels, rows, 1, choice.classes], found.active[choice.levels, rows, 1, 0]
    figures = {
        "iou": choice.iou,
        "held_out_iou": choice.held_out,
        "precision": both / level_area.clamp(min=1),
        "recall": both / found.there[1, choice.classes].clamp(min=1),
        "chance_iou": torch.from_numpy(permuted.mean(0)),
        "p_value": torch.from_numpy(p),
        "threshold": tally.threshold(choice.levels),
        "firing_rate": rate,
        "mean": tally.value_sum / some,
        "p99": tally.quantile(0.99),
        "spread": (tally.spread_sum / weight).sqrt(),
        "typical_t": tally.time_sum / weight,
        "position_share": tally.position_share(),
        "style_auroc": torch.from_numpy(styles.auroc),
    }
    fired = n_active > 0
    columns = {name: torch.where(fired, value, 0).tolist() for name, value in figures.items()}
    columns["p_value"] = p.tolist()
    runner_ups = _runner_ups(found, choice, names.classes)
    named = []
    for i in range(len(p)):
        best, style = names.classes[int(choice.classes[i])], names.styles[styles.which[i]] if names.styles else ""
        kind: Kind = "unlabelled"
        if columns["position_share"][i] > CONTEXT_FREE_SHARE and columns["firing_rate"][i] >= CONTEXT_FREE_RATE:
            kind = "context-free"
        elif styles.stands[i] and (not stands[i] or styles.auroc[i] > of_class[i]):
            kind = "style"
        elif stands[i]:
            kind = "background" if best in names.backgrounds else "object"
        label = {"style": style, "object": best, "background": best}.get(kind, "")
        own = {name: values[i] for name, values in columns.items()}
        scores = Scores(best if fired[i] else "", style=style if fired[i] else "", runner_ups=runner_ups[i], **own)
        named.append(LabelledLatent(label, kind, scores))
    return named


class _Styles(NamedTuple):
    """The style of every latent, chosen on the first split."""

    which: Ints
    """[d_sae] index of the style."""
    auroc: Floats
    """[d_sae] on the second split."""
    stands: Bools
    """[d_sae] whether that is high, and more than chance."""


def _styles(means: Floats, facts: ImageAttributes, candidates: Bools) -> _Styles:
    n_latents = means.shape[1]
    if not facts.styles.shape[1]:
        return _Styles(np.zeros(n_latents, dtype=np.int64), np.zeros(n_latents), np.zeros(n_latents, dtype=bool))
    first, second = (aurocs(means[facts.split == split], facts.styles[facts.split == split]) for split in (0, 1))
    which, rows = first.auroc.argmax(0), np.arange(n_latents)
    auroc, p = second.auroc[which, rows], np.where(candidates, second.p_value[which, rows], 1)
    return _Styles(which, auroc, benjamini_hochberg(p) & (auroc >= STYLE_AUROC))


def _runner_ups(found: Overlaps, choice: Choice, names: Sequence[str]) -> list[tuple[Candidate, ...]]:
    """The next best classes of each latent, each at its own best threshold."""
    iou = found.iou
    best, levels = iou[:, :, 0].max(0)  # [d_sae, K]
    best[torch.arange(len(best)), choice.classes] = 0
    values, classes = best.topk(min(N_RUNNER_UPS, best.shape[1]))
    held_out = iou[:, :, 1].gather(0, levels[None])[0].gather(1, classes)
    return [
        tuple(Candidate(names[c], v, h) for v, c, h in zip(*row, strict=True) if v > 0)
        for row in zip(values.tolist(), classes.tolist(), held_out.tolist(), strict=True)
    ]
