"""How good the embedded model is: what it draws of captions whose combinations never met in training, by two judges,
whose own errors on true scenes stand beside; and how many bits its words tell true scenes, beside their ceiling.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

import core
from core.diffusion.diffuser import Diffuser
from core.information.quadrature import Sampler
from training.common.report import Cell, Table
from training.evaluate.common.judges import ImageReading, Judges, draw, look
from training.evaluate.common.proportions import Proportion, proportion
from training.picturebook.models.autoencoder import psnr, to_pixels
from training.picturebook.models.judges import mean_iou, overlap
from training.picturebook.world.captions import Caption, log2_word_given_rest
from training.picturebook.world.scenes import Scene, caption_of, make_scene, paint
from training.picturebook.world.world import LABELS


@dataclass(frozen=True)
class Settings:
    """How much is measured."""

    n_captions: int = 600
    """Held-out captions drawn, and true scenes that the judges are graded on."""
    n_bits: int = 100
    """Held-out true scenes whose words are measured in bits."""


QUICK = Settings(n_captions=48, n_bits=4)
"""Shows that it works; its figures mean little."""

BITS_SAMPLER = Sampler(n_points=4, min_replicates=4)
"""Coarse for one scene, unbiased for the mean over many."""
NO_TARGET = 1e9
"""Relative error at which attribution stops at its first look."""


class Question(NamedTuple):
    """One that a caption asks of a picture."""

    name: str
    floor: float | None
    """Share of right answers that the model should reach."""
    asks: Callable[[Caption], bool]
    """Whether a caption asks it."""
    answer: Callable[[ImageReading, Caption], bool]
    """Whether a picture is right."""


def _all_there(reading: ImageReading, caption: Caption) -> bool:
    return all(reading.find(noun) is not None for noun in caption.story.nouns)


def _related(reading: ImageReading, caption: Caption) -> bool:
    relation = caption.story.relation
    return relation is not None and reading.relation_holds(relation, *caption.story.nouns)


def _objects(n: int) -> Callable[[Caption], bool]:
    return lambda caption: len(caption.story.nouns) == n


QUESTIONS = (
    Question("one thing there", 0.90, _objects(1), _all_there),
    Question("both of two there", 0.70, _objects(2), _all_there),
    Question("all of three there", None, _objects(3), _all_there),
    Question("relation right", 0.65, lambda caption: caption.story.relation is not None, _related),
    Question("left or right", None, lambda caption: caption.story.relation in ("left", "right"), _related),
    Question("above or below", None, lambda caption: caption.story.relation in ("above", "below"), _related),
    Question(
        "place right",
        0.95,
        lambda caption: caption.background_word is not None,
        lambda reading, caption: reading.background == caption.story.background,
    ),
    Question(
        "style right",
        0.90,
        lambda caption: caption.style_named,
        lambda reading, caption: reading.style == caption.story.style,
    ),
)


def outcomes(question: Question, captions: Sequence[Caption], readings: Sequence[ImageReading]) -> list[bool]:
    """The answers of the pictures whose captions ask the question."""
    return [question.answer(s, c) for s, c in zip(readings, captions, strict=True) if question.asks(c)]


def held_out_scenes(n: int) -> list[Scene]:
    """Scenes whose combinations of nouns, place and style never met in training."""
    return [make_scene(seed, "test") for seed in range(n)]


def swapped(caption: Caption) -> Caption:
    """The caption with its two things exchanged: drawn well, it is wrong about the relation."""
    story = caption.story
    return replace(caption, story=replace(story, nouns=story.nouns[::-1]), words=caption.words[::-1])


def drawing(model: Diffuser, judges: Judges, settings: Settings) -> Table:
    """What the model draws, graded."""
    scenes = held_out_scenes(settings.n_captions)
    captions = [caption_of(scene) for scene in scenes]
    seeds = list(range(len(captions)))
    drawn = look(judges, list(draw(model, [caption.text for caption in captions], seeds)))
    asking = [i for i, caption in enumerate(captions) if caption.story.relation is not None]
    other_way = [swapped(captions[i]).text for i in asking]
    drawn_swapped = look(judges, list(draw(model, other_way, [seeds[i] for i in asking])))
    painted = look(judges, [Image.fromarray(paint(scene).image) for scene in scenes])
    rows, details = [], {}
    for question in QUESTIONS:
        first, second = (outcomes(question, captions, readings) for readings in drawn.values())
        row: dict[str, Cell] = {"": question.name, "floor": _percent(question.floor), "asked": len(first)}
        row |= {f"drawn, by {name}": str(proportion(r)) for name, r in zip(drawn, (first, second), strict=True)}
        row["the two agree"] = str(proportion(a == b for a, b in zip(first, second, strict=True)))
        row["chance"] = str(_chance(question, captions, asking, drawn_swapped, drawn))
        for name, readings in painted.items():
            row[f"true scenes, by {name}"] = str(proportion(outcomes(question, captions, readings)))
        details[question.name] = [proportion(first).value, proportion(second).value]
        rows.append(row)
    notes = (
        "Chance: for relations, the picture of the caption with its two things exchanged; for all else, the picture of "
        "the next caption that asks the same. By the first judge.",
        f"A thing is there when a judge gives it at least the area of half the smallest drawing. {len(captions)} "
        "captions, picture i from seed i. In brackets: 95 % intervals.",
    )
    return Table("drawing", "What the embedded model draws of held-out captions", rows, notes, details)


def _chance(
    question: Question,
    captions: Sequence[Caption],
    asking: Sequence[int],
    drawn_swapped: dict[str, list[ImageReading]],
    drawn: dict[str, list[ImageReading]],
) -> Proportion:
    judge = next(iter(drawn))
    if question.answer is _related:
        return proportion(outcomes(question, [captions[i] for i in asking], drawn_swapped[judge]))
    pairs = [(c, s) for c, s in zip(captions, drawn[judge], strict=True) if question.asks(c)]
    return proportion(question.answer(pairs[i - 1][1], caption) for i, (caption, _) in enumerate(pairs))


def judging(model: Diffuser, judges: Judges, settings: Settings) -> Table:
    """How well the judges see true scenes, as they are and after the autoencoder, and how well that keeps them."""
    scenes = held_out_scenes(settings.n_captions)
    counts: dict[tuple[str, bool], torch.Tensor] = defaultdict(lambda: torch.zeros(len(LABELS), 3, dtype=torch.float64))
    errors = []
    for start in range(0, len(scenes), 32):
        paintings = [paint(scene) for scene in scenes[start : start + 32]]
        images = [Image.fromarray(painting.image) for painting in paintings]
        labels = torch.from_numpy(np.stack([painting.labels for painting in paintings])).long()
        kept = model.decode(torch.cat([model.encode(image) for image in images]))
        pixels, back = (to_pixels(np.stack([np.asarray(image) for image in part])) for part in (images, kept))
        errors += [psnr(a, b) for a, b in zip(pixels, back, strict=True)]
        for name, segmenter in judges.segmenters.items():
            for through, part in ((False, images), (True, kept)):
                counts[name, through] += overlap(segmenter.segment(part).label_map(), labels)
    rows: list[dict[str, Cell]] = [
        {"": f"mean IoU of {name}", "floor": 0.8, "true scenes": mean_iou(counts[name, False]),
         "after the autoencoder": mean_iou(counts[name, True])}
        for name in judges.segmenters
    ]  # fmt: skip
    rows.append({"": "PSNR of the autoencoder, dB", "floor": 22.0, "true scenes": None,
                 "after the autoencoder": float(np.mean(errors))})  # fmt: skip
    notes = (f"{len(scenes)} held-out scenes; mean IoU over all {len(LABELS)} things and places.",)
    return Table("judging", "The judges and the autoencoder on true scenes", rows, notes)


def bits(model: Diffuser, _judges: Judges, settings: Settings) -> Table:
    """Bits that words tell held-out true scenes, beside the most that they can tell on average."""
    found: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    for scene in held_out_scenes(settings.n_bits):
        caption = caption_of(scene)
        kinds = kinds_of(caption)
        image = Image.fromarray(paint(scene).image)
        told = core.attribute(
            model,
            image,
            caption.text,
            words=list(kinds),
            rel_error=NO_TARGET,
            sampler=BITS_SAMPLER,
            seed=scene.seed[-1],
        )
        for word, direct, orthogonal in zip(told.words, told.direct_bits, told.bits, strict=True):
            ceiling = -log2_word_given_rest(caption, word)
            found[kinds[word]].append((float(direct), float(orthogonal), ceiling))
    rows: list[dict[str, Cell]] = []
    for kind, values in found.items():
        table = np.array(values)
        error = table.std(0, ddof=1) / math.sqrt(len(table)) if len(table) > 1 else np.full(3, math.inf)
        means = table.mean(0)
        row: dict[str, Cell] = {"word": kind, "words": len(table)}
        row |= {
            name: f"{mean:.2f} ± {1.96 * e:.2f}"
            for name, mean, e in zip(("direct", "orthogonal", "ceiling"), means, error, strict=True)
        }
        row["direct over ceiling"] = float(means[0] / means[2]) if means[2] else None
        rows.append(row)
    notes = (
        "Mean bits of a word given the rest of its caption, on painted scenes (samples of the distribution that the "
        "model was trained on). Ceiling: the mean of -log2 p(word | rest) under the grammar; the mean of the direct "
        "estimate of a perfect model would not exceed it.",
    )
    return Table("bits", "Bits that words tell true scenes", rows, notes)


def kinds_of(caption: Caption) -> dict[str, str]:
    """What the words that a slot chose are: thing, place, style or relation."""
    kinds = dict.fromkeys(caption.words, "object")
    if caption.background_word is not None:
        kinds[caption.background_word] = "background"
    if caption.style_named:
        kinds[caption.story.style] = "style"
    if caption.story.relation is not None:
        kinds[caption.story.relation] = "relation"
    return kinds


def _percent(floor: float | None) -> str | None:
    return None if floor is None else f"{100 * floor:.0f} %"


PARTS = (judging, drawing, bits)
"""In this order."""
