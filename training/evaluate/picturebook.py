"""How good the embedded model is: whether its images show what held-out captions say, according to two independent
judges, next to the judges' own accuracy on painted scenes; and how many bits its words carry about painted scenes, next
to the most they can carry on average.
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
from training.evaluate.common.evaluation import Evaluation
from training.evaluate.common.judges import ImageReading, Judges, draw, load_judges, look
from training.evaluate.common.proportions import Proportion, Z, proportion
from training.evaluate.common.scenes import NO_TARGET, held_out_scenes
from training.picturebook.models.autoencoder import psnr, to_pixels
from training.picturebook.models.judges import mean_iou, overlap
from training.picturebook.world.captions import Caption, log2_word_given_rest
from training.picturebook.world.scenes import caption_of, paint
from training.picturebook.world.world import LABELS


@dataclass(frozen=True)
class PicturebookSettings:
    """How much is measured."""

    n_captions: int = 600
    """Held-out captions that are sampled, and painted scenes on which the judges are tested."""
    n_bits: int = 100
    """Held-out painted scenes whose words are measured in bits."""


QUICK = PicturebookSettings(n_captions=48, n_bits=4)
"""A smoke test; its figures mean little."""

BITS_SAMPLER = Sampler(n_points=4, min_replicates=4)
"""Coarse for one scene, unbiased for the mean over many scenes."""


@dataclass(frozen=True)
class PicturebookBench:
    """The model and its judges."""

    model: Diffuser
    judges: Judges
    settings: PicturebookSettings


class Question(NamedTuple):
    """A yes-or-no question about an image of a caption."""

    name: str
    target: float | None
    """Proportion of correct images the model should reach."""
    applies: Callable[[Caption], bool]
    """Whether it applies to a caption."""
    answer: Callable[[ImageReading, Caption], bool]
    """Whether an image is correct."""


def _all_there(reading: ImageReading, caption: Caption) -> bool:
    return all(reading.find(noun) is not None for noun in caption.story.nouns)


def _related(reading: ImageReading, caption: Caption) -> bool:
    relation = caption.story.relation
    return relation is not None and reading.relation_holds(relation, *caption.story.nouns)


def _objects(n: int) -> Callable[[Caption], bool]:
    return lambda caption: len(caption.story.nouns) == n


QUESTIONS = (
    Question("one object present", 0.90, _objects(1), _all_there),
    Question("both of two objects present", 0.70, _objects(2), _all_there),
    Question("all of three objects present", None, _objects(3), _all_there),
    Question("relation correct", 0.65, lambda caption: caption.story.relation is not None, _related),
    Question("left or right correct", None, lambda caption: caption.story.relation in ("left", "right"), _related),
    Question("above or below correct", None, lambda caption: caption.story.relation in ("above", "below"), _related),
    Question(
        "background correct",
        0.95,
        lambda caption: caption.background_word is not None,
        lambda reading, caption: reading.background == caption.story.background,
    ),
    Question(
        "style correct",
        0.90,
        lambda caption: caption.style_named,
        lambda reading, caption: reading.style == caption.story.style,
    ),
)


def outcomes(question: Question, captions: Sequence[Caption], readings: Sequence[ImageReading]) -> list[bool]:
    """The answers for the images to whose captions the question applies."""
    return [question.answer(s, c) for s, c in zip(readings, captions, strict=True) if question.applies(c)]


def swapped(caption: Caption) -> Caption:
    """The caption with its two objects exchanged: a good image of it shows the wrong relation."""
    story = caption.story
    return replace(caption, story=replace(story, nouns=story.nouns[::-1]), words=caption.words[::-1])


def drawing(bench: PicturebookBench) -> Table:
    """How often the model's images show what their captions say."""
    model, judges, settings = bench.model, bench.judges, bench.settings
    scenes = held_out_scenes(settings.n_captions)
    captions = [caption_of(scene) for scene in scenes]
    seeds = list(range(len(captions)))
    drawn = look(judges, list(draw(model, [caption.text for caption in captions], seeds)))
    related = [i for i, caption in enumerate(captions) if caption.story.relation is not None]
    other_way = [swapped(captions[i]).text for i in related]
    drawn_swapped = look(judges, list(draw(model, other_way, [seeds[i] for i in related])))
    painted = look(judges, [Image.fromarray(paint(scene).image) for scene in scenes])
    rows, details = [], {}
    for question in QUESTIONS:
        first, second = (outcomes(question, captions, readings) for readings in drawn.values())
        row: dict[str, Cell] = {"": question.name, "target": _percent(question.target), "captions": len(first)}
        row |= {f"generated, by {name}": str(proportion(r)) for name, r in zip(drawn, (first, second), strict=True)}
        row["judges agree"] = str(proportion(a == b for a, b in zip(first, second, strict=True)))
        row["chance"] = str(_chance(question, captions, related, drawn_swapped, drawn))
        for name, readings in painted.items():
            row[f"painted scenes, by {name}"] = str(proportion(outcomes(question, captions, readings)))
        details[question.name] = [proportion(first).value, proportion(second).value]
        rows.append(row)
    notes = (
        "Chance: for relations, the image of the caption with its two objects exchanged; otherwise the image of the "
        "next caption to which the question applies. By the first judge.",
        f"An object is present if a judge gives it at least half the area of the smallest drawing. {len(captions)} "
        "captions, image i from seed i. 95 % intervals in brackets.",
    )
    return Table("drawing", "Images of held-out captions", rows, notes, details)


def _chance(
    question: Question,
    captions: Sequence[Caption],
    related: Sequence[int],
    drawn_swapped: dict[str, list[ImageReading]],
    drawn: dict[str, list[ImageReading]],
) -> Proportion:
    judge = next(iter(drawn))
    if question.answer is _related:
        return proportion(outcomes(question, [captions[i] for i in related], drawn_swapped[judge]))
    pairs = [(c, s) for c, s in zip(captions, drawn[judge], strict=True) if question.applies(c)]
    return proportion(question.answer(pairs[i - 1][1], caption) for i, (caption, _) in enumerate(pairs))


def judging(bench: PicturebookBench) -> Table:
    """How accurate the judges are on painted scenes, before and after the autoencoder, and its reconstruction error."""
    model, judges, settings = bench.model, bench.judges, bench.settings
    scenes = held_out_scenes(settings.n_captions)
    counts: dict[tuple[str, bool], torch.Tensor] = defaultdict(lambda: torch.zeros(len(LABELS), 3, dtype=torch.float64))
    errors = []
    for start in range(0, len(scenes), 32):
        paintings = [paint(scene) for scene in scenes[start : start + 32]]
        images = [Image.fromarray(painting.image) for painting in paintings]
        labels = torch.from_numpy(np.stack([painting.labels for painting in paintings])).long()
        decoded = model.decode(torch.cat([model.encode(image) for image in images]))
        pixels, back = (to_pixels(np.stack([np.asarray(image) for image in part])) for part in (images, decoded))
        errors += [psnr(a, b) for a, b in zip(pixels, back, strict=True)]
        for name, segmenter in judges.segmenters.items():
            for through, part in ((False, images), (True, decoded)):
                counts[name, through] += overlap(segmenter.segment(part).label_map(), labels)
    rows: list[dict[str, Cell]] = [
        {"": f"mean IoU of {name}", "target": 0.8, "painted scenes": mean_iou(counts[name, False]),
         "after the autoencoder": mean_iou(counts[name, True])}
        for name in judges.segmenters
    ]  # fmt: skip
    rows.append({"": "PSNR of the autoencoder, dB", "target": 22.0, "painted scenes": None,
                 "after the autoencoder": float(np.mean(errors))})  # fmt: skip
    notes = (f"{len(scenes)} held-out scenes; mean IoU over all {len(LABELS)} objects and backgrounds.",)
    return Table("judging", "Judges and autoencoder on painted scenes", rows, notes)


def bits(bench: PicturebookBench) -> Table:
    """Bits that words carry about held-out painted scenes, and the most they can carry on average."""
    by_kind: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    for scene in held_out_scenes(bench.settings.n_bits):
        caption = caption_of(scene)
        kinds = kinds_of(caption)
        image = Image.fromarray(paint(scene).image)
        found = core.attribute(
            bench.model,
            image,
            caption.text,
            words=list(kinds),
            rel_error=NO_TARGET,
            sampler=BITS_SAMPLER,
            seed=scene.seed[-1],
        )
        for word, direct, orthogonal in zip(found.words, found.direct_bits, found.bits, strict=True):
            ceiling = -log2_word_given_rest(caption, word)
            by_kind[kinds[word]].append((float(direct), float(orthogonal), ceiling))
    rows: list[dict[str, Cell]] = []
    for kind, values in by_kind.items():
        table = np.array(values)
        error = table.std(0, ddof=1) / math.sqrt(len(table)) if len(table) > 1 else np.full(3, math.inf)
        means = table.mean(0)
        row: dict[str, Cell] = {"word": kind, "words": len(table)}
        row |= {
            name: f"{mean:.2f} ± {Z * e:.2f}"
            for name, mean, e in zip(("direct", "orthogonal", "ceiling"), means, error, strict=True)
        }
        row["direct over ceiling"] = float(means[0] / means[2]) if means[2] else None
        rows.append(row)
    notes = (
        "Mean bits of a word given the rest of its caption, on painted scenes (samples of the training distribution), "
        "± the half-width of a 95 % interval. Ceiling: the mean of -log2 p(word | rest) under the grammar, which the "
        "mean direct estimate of a perfect model would not exceed.",
    )
    return Table("bits", "Bits of words on painted scenes", rows, notes)


def kinds_of(caption: Caption) -> dict[str, str]:
    """The kind of each word that fills a slot of the caption: object, background, style or relation."""
    kinds = dict.fromkeys(caption.words, "object")
    if caption.background_word is not None:
        kinds[caption.background_word] = "background"
    if caption.style_named:
        kinds[caption.story.style] = "style"
    if caption.story.relation is not None:
        kinds[caption.story.relation] = "relation"
    return kinds


def _percent(target: float | None) -> str | None:
    return None if target is None else f"{100 * target:.0f} %"


EVALUATION = Evaluation(
    name="picturebook",
    title="The embedded model",
    description=__doc__,
    settings=PicturebookSettings(),
    quick=QUICK,
    bench=lambda subject, settings: PicturebookBench(subject.model, load_judges(subject.package), settings),
    parts=(judging, drawing, bits),
)
