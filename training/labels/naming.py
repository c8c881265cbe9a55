"""Labels of latents, tested against chance.

The class and threshold of a latent are those of highest IoU on the first split. They become its label if their IoU on
the held-out split exceeds what the same selection gives when images are paired with the masks of other images, that is,
what positions alone can explain. The excess is measured in units of the standard deviation of the latent's own permuted
values, plus a constant (Tusher et al. 2001, "Significance analysis of microarrays"). That makes latents comparable, so
the permuted values of all latents together give p-values, and the Benjamini-Hochberg procedure selects the labels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import false_discovery_control, mannwhitneyu  # type: ignore[import-untyped]
from torch import Tensor

from core.arrays import Bools, Floats, Ints
from core.concepts.io import Candidate, Kind, LabelledLatent, Scores
from training.labels.tally import FiringStatistics

FALSE_DISCOVERY_RATE = 0.05
"""Expected share of false labels."""
MIN_IMAGES = 5
"""A latent that fires in fewer images of either split gets no label, as it could not be validated."""
STYLE_AUROC = 0.75
"""Minimum held-out AUROC for a style label."""
CONTEXT_FREE_SHARE = 0.5
"""A latent is context-free if position explains more than this share of its variance ..."""
CONTEXT_FREE_RATE = 0.01
"""... and it fires on at least this share of the cells."""
PRESENT = 1 / 256
"""A class is present in an image if it covers at least this share of it."""
N_RUNNER_UPS = 3
"""Number of classes listed after the best one."""


class Choice(NamedTuple):
    """The class and threshold of each latent, chosen on the first split."""

    classes: Tensor
    """[d_sae] class of highest IoU."""
    levels: Tensor
    """[d_sae] level from which a value counts as active."""
    iou: Tensor
    """[d_sae] IoU on the first split."""
    held_out: Tensor
    """[d_sae] IoU on the held-out split."""


class Overlaps(NamedTuple):
    """Overlap of latents and classes by threshold, for one pairing of images and masks."""

    both: Tensor
    """[levels, d_sae, splits, K] float64 cells at or above a level and of a class."""
    active: Tensor
    """[levels, d_sae, splits, 1] cells at or above a level."""
    there: Tensor
    """[splits, K] cells of a class."""

    @property
    def iou(self) -> Tensor:
        """[levels, d_sae, splits, K] intersection over union."""
        return self.both / (self.active + self.there - self.both).clamp(min=1)


@dataclass(frozen=True)
class ImageAttributes:
    """Attributes of the images that were counted, in the order of the counts."""

    split: Ints
    """[N] 0: for choosing labels, 1: held out."""
    areas: Floats
    """[N, K] share of the image that each class covers."""
    styles: Bools
    """[N, n_styles] whether the prompt contains each style word."""


@dataclass(frozen=True)
class LabelVocabulary:
    """The words that latents can be labelled with."""

    classes: tuple[str, ...]
    """Names of the K classes."""
    backgrounds: frozenset[str]
    """Classes that are backgrounds; the others are objects."""
    styles: tuple[str, ...]
    """Style words."""


class Aurocs(NamedTuple):
    """How well the mean over an image predicts binary properties of images."""

    auroc: Floats
    """[properties, d_sae] area under the ROC curve; 0.5 where all images or none have the property."""
    p_value: Floats
    """[properties, d_sae] one-sided p-value of the Mann-Whitney U test."""


def overlaps(tally: FiringStatistics, pairing: int = 0) -> Overlaps:
    """The overlaps for a pairing; 0 pairs images with their own masks, the others are permutations."""
    return Overlaps(
        tally.hits[:, :, :, pairing].double().flip(0).cumsum(0).flip(0),
        tally.area.double().flip(0).cumsum(0).flip(0)[..., None],
        tally.cells.double(),
    )


def choose(found: Overlaps) -> Choice:
    """The class and threshold of highest IoU on the first split, with their IoU on both splits."""
    iou = found.iou
    n_classes = iou.shape[3]
    best, at = iou[:, :, 0].movedim(0, 1).flatten(1).max(1)  # [d_sae, levels x K]
    levels, classes = at // n_classes, at % n_classes
    return Choice(classes, levels, best, iou[levels, torch.arange(len(best)), 1, classes])


def p_values(real: Floats, permuted: Floats, candidates: Bools) -> Floats:
    """[d_sae] p-values of the IoUs `real` [d_sae], given those of permuted masks [P, d_sae], pooled over latents.

    Latents that are no candidates get 1 and do not contribute to the null distribution.
    """
    n = len(permuted)
    real, permuted, out = real[candidates], permuted[:, candidates], np.ones(len(real))
    if not len(real):
        return out
    total, squares = permuted.sum(0), (permuted**2).sum(0)
    spread = permuted.std(0, ddof=1)
    fudge = np.median(spread) + 1e-9
    # Each permuted value is standardised by the others of its latent, as the real one is by all of them.
    mean = (total - permuted) / (n - 1)
    variance = (squares - permuted**2 - (n - 1) * mean**2) / (n - 2)
    null = np.sort(((permuted - mean) / (np.sqrt(variance.clip(0)) + fudge)).ravel())
    excess = (real - total / n) / (spread + fudge)
    out[candidates] = (1 + len(null) - np.searchsorted(null, excess, side="left")) / (1 + len(null))
    return out


def benjamini_hochberg(p: Floats, rate: float = FALSE_DISCOVERY_RATE) -> Bools:
    """Which p-values are significant at a false discovery rate (Benjamini and Hochberg 1995)."""
    significant: Bools = false_discovery_control(p) <= rate
    return significant


def aurocs(means: Floats, properties: Bools) -> Aurocs:
    """AUROCs of means [N, d_sae] as predictors of binary properties [N, n]."""
    auroc = np.full((properties.shape[1], means.shape[1]), 0.5)
    p_value = auroc.copy()
    for row, has_it in enumerate(properties.T):
        if has_it.any() and not has_it.all():
            test = mannwhitneyu(
                means[has_it], means[~has_it], alternative="greater", method="asymptotic", use_continuity=False
            )
            auroc[row] = test.statistic / (has_it.sum() * (~has_it).sum())
            p_value[row] = np.nan_to_num(test.pvalue, nan=0.5)  # NaN where all means are equal
    return Aurocs(auroc, p_value)


def name_latents(tally: FiringStatistics, attributes: ImageAttributes, names: LabelVocabulary) -> list[LabelledLatent]:
    """Label, kind and scores of each latent."""
    found = overlaps(tally)
    choice = choose(found)
    permuted = np.stack([choose(overlaps(tally, p)).held_out.numpy() for p in range(1, tally.hits.shape[3])])
    means = tally.means.double().numpy()
    active = np.stack([(means[attributes.split == split] > 0).sum(0) for split in (0, 1)])
    candidates: Bools = active.min(0) >= MIN_IMAGES
    p = p_values(choice.held_out.numpy(), permuted, candidates)
    stands = benjamini_hochberg(p) & (choice.iou.numpy() > 0)
    styles = _styles(means, attributes, candidates)
    held_out = attributes.split == 1
    presence = aurocs(means[held_out], attributes.areas[held_out] >= PRESENT).auroc
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
    """The style of each latent, chosen on the first split."""

    which: Ints
    """[d_sae] index of the style of highest AUROC."""
    auroc: Floats
    """[d_sae] AUROC on the held-out split."""
    stands: Bools
    """[d_sae] whether that is high and significant."""


def _styles(means: Floats, attributes: ImageAttributes, candidates: Bools) -> _Styles:
    n_latents = means.shape[1]
    if not attributes.styles.shape[1]:
        return _Styles(np.zeros(n_latents, dtype=np.int64), np.zeros(n_latents), np.zeros(n_latents, dtype=bool))
    splits = (attributes.split == 0, attributes.split == 1)
    first, second = (aurocs(means[rows], attributes.styles[rows]) for rows in splits)
    which, rows = first.auroc.argmax(0), np.arange(n_latents)
    auroc, p = second.auroc[which, rows], np.where(candidates, second.p_value[which, rows], 1)
    return _Styles(which, auroc, benjamini_hochberg(p) & (auroc >= STYLE_AUROC))


def _runner_ups(found: Overlaps, choice: Choice, names: Sequence[str]) -> list[tuple[Candidate, ...]]:
    """The next best classes of each latent, each at its best threshold."""
    iou = found.iou
    best, levels = iou[:, :, 0].max(0)  # [d_sae, K]
    best[torch.arange(len(best)), choice.classes] = 0
    values, classes = best.topk(min(N_RUNNER_UPS, best.shape[1]))
    held_out = iou[:, :, 1].gather(0, levels[None])[0].gather(1, classes)
    return [
        tuple(Candidate(names[c], v, h) for v, c, h in zip(*row, strict=True) if v > 0)
        for row in zip(values.tolist(), classes.tolist(), held_out.tolist(), strict=True)
    ]
