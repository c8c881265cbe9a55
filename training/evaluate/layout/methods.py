"""Methods that predict where a caption's objects will be, from the same runs of the sampler: concepts and baselines.

Whatever has to be fitted is fitted on other images than it is scored on.
"""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

import core
from core.activations.hooks import ActivationKey
from core.concepts.layout import PRIOR_WEIGHT, Concepts, Method, Reader, make_reader
from core.diffusion.sampling import Branch
from core.sae.autoencoder import SparseAutoencoder
from core.segmentation.grids import class_masks, majority
from training.evaluate.common.evaluation import shared_saes
from training.evaluate.common.masks import best_threshold, score_masks
from training.evaluate.layout.images import LayoutImages, M, senses_of
from training.evaluate.layout.probe import fit_probe
from training.picturebook.world.captions import Caption
from training.picturebook.world.world import LABELS, OBJECTS

PRIOR_STRENGTH = 2.0
"""Weight of the mean mask of all objects in the prior of each, in images."""

Slot = tuple[str, Branch]
"""A hookpoint and a branch."""
Read = Mapping[Slot, tuple[SparseAutoencoder, Concepts]]
"""SAEs for all times with their concept tables."""


class Baseline(NamedTuple):
    """A method of layout prediction."""

    name: str
    uses_prompt_classes: bool
    """Whether it chooses among the objects that the prompt names."""
    hookpoint: str
    """The hookpoint on whose grid it predicts."""
    branch: Branch | None
    """The branch it reads; None if it reads none."""
    masks: Callable[[LayoutImages, int], Tensor]
    """[N, M, h, w] bool: the cells predicted at a step for each of the captions' objects."""


Labels = Callable[[LayoutImages, int], Tensor]
"""[N, h, w] class of each cell at a step, -1 for none."""
Scores = Callable[[LayoutImages, int], Tensor]
"""[N, K + 1, h, w] score of each class of `LABELS` at a step; the last is that of no class."""
ObjectScores = Callable[[LayoutImages, int], Tensor]
"""[N, M, h, w] score of each of the captions' objects at a step; minus infinity where a caption has fewer."""


def baselines(fit: LayoutImages, read: Read, steps: Sequence[int]) -> Iterator[Baseline]:
    """All methods; what has to be fitted is fitted on `fit`, separately for each step."""
    for hookpoint in fit.truth:
        yield from _without_updates(fit, hookpoint, steps)
    for hookpoint, branch in {(key.hookpoint, key.branch): None for key in fit.updates}:
        yield from _from_updates(fit, hookpoint, branch, read, steps)


def _without_updates(fit: LayoutImages, hookpoint: str, steps: Sequence[int]) -> Iterator[Baseline]:
    def baseline(name: str, uses_prompt_classes: bool, masks: Labels, branch: Branch | None = None) -> Baseline:
        return Baseline(name, uses_prompt_classes, hookpoint, branch, masks)

    yield baseline("true masks on the grid", True, _of_labels(lambda of, _: of.labels[hookpoint]))
    yield baseline("second segmenter", False, _of_labels(lambda of, _: of.second[hookpoint]))
    yield baseline("segmented preview", False, _of_labels(lambda of, step: of.previews[hookpoint, step]))
    for name, group in (("prior of each object", _noun), ("prior of each role", _role)):
        scores = prior(fit, hookpoint, group)
        yield baseline(name, True, _above_threshold(fit, hookpoint, scores, steps))
    attention = _above_threshold(fit, hookpoint, lambda of, step: of.attention[hookpoint, step], steps)
    yield baseline("cross-attention", True, attention, "cond")


def _from_updates(
    fit: LayoutImages, hookpoint: str, branch: Branch, read: Read, steps: Sequence[int]
) -> Iterator[Baseline]:
    scored = {"linear probe": _probed(fit, hookpoint, branch, steps)}
    if (hookpoint, branch) in read:
        sae, concepts = read[hookpoint, branch]
        for method in get_args(Method):
            scored[f"concepts, {method}"] = _read(hookpoint, branch, sae, make_reader(concepts, method))
    for name, scores in scored.items():
        yield Baseline(name, False, hookpoint, branch, _of_labels(_best(scores)))
        if name == "concepts, dictionary":  # as in the paper: one mask per noun, by a threshold on its cosine
            named = _above_threshold(fit, hookpoint, _of_objects(scores), steps)
        else:
            named = _of_labels(_best(_among_named(scores)))
        yield Baseline(name, True, hookpoint, branch, named)


def _of_labels(labels: Labels) -> Labels:
    """Masks of the captions' objects in label maps."""
    return lambda images, step: class_masks(labels(images, step), images.targets)


def _best(scores: Scores) -> Labels:
    return lambda images, step: majority(scores(images, step))


def _among_named(scores: Scores) -> Scores:
    """Scores of the objects that a caption names and of all backgrounds; minus infinity for the rest."""

    def of_named(images: LayoutImages, step: int) -> Tensor:
        allowed = torch.zeros(len(images.captions), len(LABELS) + 1, dtype=torch.bool)
        allowed[:, len(OBJECTS) :] = True
        for i, caption in enumerate(images.captions):
            allowed[i, [object_name for senses in senses_of(caption) for object_name in senses]] = True
        return scores(images, step).masked_fill(~allowed[..., None, None], -torch.inf)

    return of_named


def _of_objects(scores: Scores) -> ObjectScores:
    """Scores of the captions' objects; a homonym has the score of its better sense."""

    def of_objects(images: LayoutImages, step: int) -> Tensor:
        by_class = scores(images, step)
        objects = torch.full((len(by_class), M, *by_class.shape[2:]), -torch.inf)
        for i, caption in enumerate(images.captions):
            for j, senses in enumerate(senses_of(caption)):
                objects[i, j] = by_class[i, senses].amax(0)
        return objects

    return of_objects


def _above_threshold(fit: LayoutImages, hookpoint: str, scores: ObjectScores, steps: Sequence[int]) -> Labels:
    """Masks by the threshold, one per step, that is best on the images of `fit`."""
    at = {step: best_threshold(scores(fit, step), fit.truth[hookpoint]) for step in steps}
    return lambda images, step: score_masks(scores(images, step), at[step])


def _noun(caption: Caption, j: int) -> Hashable:
    return caption.story.nouns[j]


def _role(caption: Caption, j: int) -> Hashable:
    """An object's relation to the others, which predicts its position better than its class does."""
    return caption.story.relation, j if caption.story.relation else len(caption.story.nouns)


def prior(fit: LayoutImages, hookpoint: str, group: Callable[[Caption, int], Hashable]) -> ObjectScores:
    """The mean mask of a group's objects in other images whose captions name them and that show them."""
    truth = fit.truth[hookpoint]
    overall = truth.masks[truth.there].float().mean(0)
    members: dict[Hashable, list[Tensor]] = defaultdict(list)
    for i, j in truth.there.nonzero().tolist():
        members[group(fit.captions[i], j)].append(truth.masks[i, j])
    means = {
        name: (torch.stack(masks).float().sum(0) + PRIOR_STRENGTH * overall) / (len(masks) + PRIOR_STRENGTH)
        for name, masks in members.items()
    }

    def scores(images: LayoutImages, _: int) -> Tensor:
        objects = torch.full((len(images.captions), M, *overall.shape), -torch.inf)
        for i, caption in enumerate(images.captions):
            for j in range(len(caption.story.nouns)):
                objects[i, j] = means.get(group(caption, j), overall)
        return objects

    return scores


def _probed(fit: LayoutImages, hookpoint: str, branch: Branch, steps: Sequence[int]) -> Scores:
    """Logits of a linear probe per step, with class frequencies weighted as in the concepts' readout."""
    labels = fit.labels[hookpoint].flatten(1)
    shares = torch.bincount(labels[labels >= 0], minlength=len(LABELS)) + 1.0
    balance = (PRIOR_WEIGHT - 1) * (shares / shares.sum()).log()

    def positions(images: LayoutImages, step: int) -> Tensor:
        return images.updates[ActivationKey(hookpoint, branch, step)].movedim(1, 3)

    probes = {step: fit_probe(positions(fit, step).flatten(1, 2), labels, len(LABELS)) for step in steps}

    def scores(images: LayoutImages, step: int) -> Tensor:
        logits = probes[step].logits(positions(images, step)) + balance
        return F.pad(logits, (0, 1), value=-torch.inf).movedim(3, 1)

    return scores


def _read(hookpoint: str, branch: Branch, sae: SparseAutoencoder, reader: Reader) -> Scores:
    """A reader's scores in the order of `LABELS`; a class missing from its table is never predicted."""
    n = len(reader.classes)
    order = [reader.classes.index(label) if label in reader.classes else n + 1 for label in LABELS]

    def scores(images: LayoutImages, step: int) -> Tensor:
        update = images.updates[ActivationKey(hookpoint, branch, step)].movedim(1, 3)
        of_table = F.pad(reader.scores(sae.encode(update.flatten(0, 2))), (0, 1), value=-torch.inf)
        return of_table[:, [*order, n]].view(*update.shape[:3], -1).movedim(3, 1)

    return scores


def read_collection(root: Path) -> Read:
    """The SAEs for all times in a collection, with their concept tables."""
    return {
        (sae_id.hookpoint, sae_id.branch): (core.load_sae(root, *sae_id), core.load_concepts(root, *sae_id))
        for sae_id in shared_saes(root)
    }
