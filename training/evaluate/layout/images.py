"""Images of captions with what was recorded while they were sampled: all that the layout methods may read."""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from core.activations.attention import record_attention, word_maps
from core.activations.hooks import ActivationKey, record
from core.diffusion.diffuser import Diffuser
from core.segmentation.grids import cell_counts, majority
from core.segmentation.semantic import Segmenter
from training.evaluate.common.judges import MIN_AREA
from training.evaluate.common.masks import Truth, truth_of
from training.picturebook.world.captions import N_OBJECTS_P, Caption
from training.picturebook.world.world import LABELS, NOUN_INDEX, NOUNS, OBJECT_INDEX

M = len(N_OBJECTS_P)
"""Most objects in a caption."""


class LayoutImages(NamedTuple):
    """N generated images, and what was recorded on the way; [h, w] is a hookpoint's grid."""

    captions: tuple[Caption, ...]
    targets: Tensor
    """[N, M] class of each of the captions' objects in the final image; -1 where it is absent."""
    truth: Mapping[str, Truth]
    """By hookpoint: where the captions' objects are in the final images."""
    labels: Mapping[str, Tensor]
    """By hookpoint: [N, h, w] majority class of each cell of the final images."""
    second: Mapping[str, Tensor]
    """The same by another segmenter."""
    previews: Mapping[tuple[str, int], Tensor]
    """The same of the predicted clean image, by hookpoint and step."""
    updates: Mapping[ActivationKey, Tensor]
    """[N, C, h, w] residual updates."""
    attention: Mapping[tuple[str, int], Tensor]
    """By hookpoint and step: [N, M, h, w] attention to the words of the objects, over its maximum."""


def watch(
    model: Diffuser,
    segmenters: Sequence[Segmenter],
    captions: Sequence[Caption],
    first_seed: int,
    steps: Sequence[int],
    batch_size: int,
    num_inference_steps: int | None = None,
) -> Iterator[LayoutImages]:
    """Sample the captions batch by batch. The first segmenter gives the ground truth, the second a reference."""
    for start in range(0, len(captions), batch_size):
        part = tuple(captions[start : start + batch_size])
        seeds = [first_seed + start + i for i in range(len(part))]
        run = model.sample([c.text for c in part], seeds=seeds, num_inference_steps=num_inference_steps)
        clean = {}
        with record(model, steps=steps) as updates, record_attention(model, branches=["cond"], steps=steps) as maps:
            for state in run:
                if state.step_context.step in steps:
                    clean[state.step_context.step] = state.x0
        images = model.decode(state.x)
        true, second = (segmenter.segment(images).label_map().cpu() for segmenter in segmenters)
        grids = {key.hookpoint: tuple(update.shape[2:]) for key, update in updates.items()}
        counts = {name: cell_counts(true, len(LABELS), *grid) for name, grid in grids.items()}
        targets = objects_in(part, true)
        previews = {}
        for step, x0 in clean.items():
            seen = segmenters[0].segment(model.decode(x0)).label_map().cpu()
            for name, grid in grids.items():
                previews[name, step] = majority(cell_counts(seen, len(LABELS), *grid))
        yield LayoutImages(
            captions=part,
            targets=targets,
            truth={name: truth_of(of, targets) for name, of in counts.items()},
            labels={name: majority(of) for name, of in counts.items()},
            second={name: majority(cell_counts(second, len(LABELS), *grid)) for name, grid in grids.items()},
            previews=previews,
            updates={key: update.float().cpu() for key, update in updates.items()},
            attention={
                (name, step): _attention_to_objects(model, part, maps[ActivationKey(name, "cond", step)].cpu())
                for name in grids
                for step in clean
            },
        )


def joined(parts: Sequence[LayoutImages]) -> LayoutImages:
    """All batches as one."""
    first = parts[0]

    def cat(name: str) -> dict[Hashable, Tensor]:
        return {key: torch.cat([getattr(part, name)[key] for part in parts]) for key in getattr(first, name)}

    truth = {
        name: Truth(
            torch.cat([part.truth[name].masks for part in parts]),
            torch.cat([part.truth[name].pixels for part in parts]),
            of.cell_area,
        )
        for name, of in first.truth.items()
    }
    others = {name: cat(name) for name in ("labels", "second", "previews", "updates", "attention")}
    targets = torch.cat([part.targets for part in parts])
    return LayoutImages(tuple(c for part in parts for c in part.captions), targets, truth, **others)  # type: ignore[arg-type]


def objects_in(captions: Sequence[Caption], labels: Tensor) -> Tensor:
    """[N, M] the class of each noun of the captions in label maps [N, H, W]; -1 where it is absent.

    A homonym counts as whichever of its objects covers more. What covers less than `MIN_AREA` is absent.
    """
    targets = torch.full((len(captions), M), -1)
    for i, caption in enumerate(captions):
        areas = torch.bincount(labels[i].flatten() + 1, minlength=len(LABELS) + 1)[1:]
        for j, senses in enumerate(senses_of(caption)):
            most = max(senses, key=lambda object_name: int(areas[object_name]))
            if areas[most] >= MIN_AREA:
                targets[i, j] = most
    return targets


def senses_of(caption: Caption) -> list[list[int]]:
    """The classes that each noun of a caption can be."""
    return [[OBJECT_INDEX[name] for name in NOUNS[NOUN_INDEX[noun]].objects] for noun in caption.story.nouns]


def _attention_to_objects(model: Diffuser, captions: Sequence[Caption], maps: Tensor) -> Tensor:
    """[N, M, h, w] attention to the words of objects, each over its maximum, from maps of tokens [N, tokens, h, w]."""
    objects = torch.full((len(captions), M, *maps.shape[2:]), -torch.inf)
    for i, caption in enumerate(captions):
        words, of_words = word_maps(model, caption.text, maps[i])
        for j, word in enumerate(caption.words):
            objects[i, j] = of_words[words.index(word)] / of_words[words.index(word)].max()
    return objects
