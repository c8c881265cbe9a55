"""How well maps of words find what the words name: mean IoU with the true masks of held-out painted scenes, and with a
segmenter's masks of generated pictures.

The whole image, cross-attention along the sampler and under the information noise schedule, conditional mutual
information as published and as `core.attribute` samples it, and attention and information together (after Kong et al.
2024, arXiv 2310.07972, table 2, whose threshold was chosen on the pictures that it was scored on; not so here).
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from core.arrays import Floats
from core.diffusion.diffuser import Diffuser
from core.information.measuring import sampler_for
from core.information.quadrature import Sampler
from core.segmentation.semantic import Segmenter, load_segmenter
from training.common.report import Cell, Table
from training.evaluate.common.judges import MIN_AREA
from training.evaluate.common.maps import (
    attended_drawing,
    attention_along_sampler,
    attention_at,
    enlarged,
    in_its_range,
    information,
)
from training.evaluate.common.masks import Resampled, resampled_words
from training.picturebook.world.captions import Caption
from training.picturebook.world.scenes import Scene, caption_of, make_scene, paint
from training.picturebook.world.world import LABELS, NOUN_INDEX, NOUNS, OBJECT_INDEX

THRESHOLDS = np.linspace(0.05, 0.95, 19)
"""Tried, in shares of a map's range."""

WHOLE = "whole image"
ALONG_SAMPLER = "cross-attention along the sampler"
AT_LOGISTIC = "cross-attention, published noise schedule"
AT_FLAT = "cross-attention, flat noise schedule"
AT_OURS = "cross-attention, our noise schedule"
CMI_KONG = "CMI as published"
CMI = "CMI"
BOTH = "CMI and attention"
METHODS = (WHOLE, ALONG_SAMPLER, AT_LOGISTIC, AT_FLAT, AT_OURS, CMI_KONG, CMI, BOTH)

Source = Literal["painted", "drawn"]
"""Of pictures: held-out painted scenes with their true masks, or what the model draws of the same captions."""
SOURCES: Mapping[Source, str] = {"painted": "true scenes", "drawn": "generated pictures"}
"""What tables call them."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """How much is measured."""

    n_scenes: int = 64
    """Held-out pictures on which the maps are scored, painted and drawn each."""
    n_fit: int = 32
    """Other held-out pictures, on which thresholds are chosen."""
    n_points: int = 8
    """Noise samples in a replicate."""
    n_replicates: int = 4
    """Replicates a picture, and as many noise samples in all for attention."""
    num_inference_steps: int | None = None
    """Steps of the sampler along which attention is read; None: the model's own."""
    batch_size: int = 32
    """Most latents in a U-Net call."""
    n_bootstrap: int = 2000
    """Resamples of the pictures for each interval."""


QUICK = Settings(n_scenes=3, n_fit=2, n_points=4, num_inference_steps=10)
"""Shows that it works; its figures mean little."""


class Subject(NamedTuple):
    """A picture whose words are looked for."""

    caption: Caption
    x: Tensor
    """[1, C, h, w] its latents."""
    labels: Tensor
    """[H, W] class of each pixel."""
    along: Tensor
    """[W, h, w] attention to the words along the sampler."""
    seed: int


class Scored(NamedTuple):
    """A picture's words with their maps by every method."""

    kinds: tuple[str, ...]
    """[W] what each word names: a thing or the place."""
    truth: Tensor
    """[W, H, W'] bool: the pixels that show it."""
    maps: Mapping[str, Tensor]
    """By method: [W, h, w]."""
    evals: Mapping[str, int]
    """By method: U-Net evaluations for all words."""


class Bench:
    """The pictures and their maps: made once, when first asked for."""

    def __init__(self, model: Diffuser, settings: Settings) -> None:
        self._model, self.settings = model, settings
        self._scored: dict[Source, tuple[list[Scored], list[Scored]]] = {}

    def scored(self, source: Source) -> tuple[list[Scored], list[Scored]]:
        """The pictures that are scored, and those on which thresholds are chosen."""
        if source not in self._scored:
            n, n_all = self.settings.n_scenes, self.settings.n_scenes + self.settings.n_fit
            found = []
            for seed in range(n_all):
                if seed % 8 == 0:
                    log.info("localisation: %s picture %d of %d", source, seed, n_all)
                scene = make_scene(seed, "test")
                subject = self._paint(scene) if source == "painted" else self._draw(scene)
                found.append(measure(self._model, subject, self.settings))
            self._scored[source] = found[:n], found[n:]
        return self._scored[source]

    def _paint(self, scene: Scene) -> Subject:
        """The scene's own painting, with its true masks."""
        caption, painting, words = caption_of(scene), paint(scene), list(targets_of(caption_of(scene)))
        x = self._model.encode(Image.fromarray(painting.image))
        along = attention_along_sampler(self._model, x, caption.text, words, _n_steps(self._model, self.settings))
        return Subject(caption, x, torch.from_numpy(painting.labels).long(), along, scene.seed[-1])

    def _draw(self, scene: Scene) -> Subject:
        """What the model draws of the scene's caption, with the segmenter's masks."""
        caption, seed, n_steps = caption_of(scene), scene.seed[-1], _n_steps(self._model, self.settings)
        drawn, along = attended_drawing(self._model, caption.text, list(targets_of(caption)), seed, n_steps)
        labels = self._segmenter.segment([drawn.image]).label_map()[0]
        return Subject(caption, drawn.latents, labels, along, seed)

    @cached_property
    def _segmenter(self) -> Segmenter:
        return load_segmenter(device="cpu")

    def ious(self, source: Source, method: str, kind: str) -> Resampled:
        """Mean IoU of a method over the words of a kind, at the threshold that suits the other pictures."""
        scored, fit = self.scored(source)
        threshold = best_threshold(fit, method, kind)
        ious = [word_ious(image, method, kind, threshold).tolist() for image in scored]
        return resampled_words(ious, self.settings.n_bootstrap)

    def evals(self, source: Source, method: str) -> float:
        """Mean U-Net evaluations a picture."""
        return float(np.mean([image.evals[method] for image in self.scored(source)[0]]))

    @property
    def note(self) -> str:
        """How it was measured."""
        settings = self.settings
        return (
            f"{settings.n_scenes} held-out captions; thresholds chosen on {settings.n_fit} others, by method and kind. "
            "A map is enlarged to the picture, bilinearly, and cut at a share of its range; IoU in pixels, a word at a "
            "time, mean over words that are there. In brackets: 95 % intervals over pictures."
        )


def _n_steps(model: Diffuser, settings: Settings) -> int:
    return settings.num_inference_steps or model.spec.num_inference_steps


def measure(model: Diffuser, subject: Subject, settings: Settings) -> Scored:
    """One picture's maps."""
    caption, x, seed = subject.caption, subject.x, subject.seed
    targets = targets_of(caption)
    words = list(targets)
    n = settings.n_points * settings.n_replicates
    along = 2 * _n_steps(model, settings)
    evals = {WHOLE: 0, ALONG_SAMPLER: along, AT_LOGISTIC: n, AT_FLAT: n, AT_OURS: n, CMI: n * (len(words) + 1)}
    published = as_kong(evals[CMI], len(words))
    evals[CMI_KONG] = 3 * len(words) * published.n_points * published.min_replicates
    ours = replace(sampler_for(model, None), n_points=settings.n_points, min_replicates=settings.n_replicates)
    maps = {
        WHOLE: torch.ones(len(words), *model.latent_shape[1:]),
        ALONG_SAMPLER: subject.along,
        CMI_KONG: information(model, x, caption.text, words, published, seed),
        CMI: information(model, x, caption.text, words, ours, seed),
    }
    for name, density in ((AT_LOGISTIC, Sampler.kong2024()), (AT_FLAT, Sampler()), (AT_OURS, ours)):
        sampler = replace(density, n_points=n, stratified=True, antithetic=True)
        maps[name] = attention_at(model, x, caption.text, words, sampler, seed, settings.batch_size)
    maps[BOTH] = (in_its_range(maps[CMI]) * in_its_range(maps[AT_FLAT])).sqrt()
    evals[BOTH] = evals[CMI] + evals[AT_FLAT]
    kinds = tuple("object" if word in caption.words else "background" for word in words)
    return Scored(kinds, masks_of(subject.labels, list(targets.values())), maps, evals)


def masks_of(labels: Tensor, targets: Sequence[Sequence[int]]) -> Tensor:
    """[W, H, W'] where each word's classes are; nowhere where fewer pixels show them than any drawing covers."""
    masks = torch.stack([torch.isin(labels, torch.tensor(classes)) for classes in targets])
    return masks & (masks.sum((1, 2), keepdim=True) >= MIN_AREA)


def targets_of(caption: Caption) -> dict[str, list[int]]:
    """The classes that each word for a thing or the place can name."""
    objects = zip(caption.words, caption.story.nouns, strict=True)
    targets = {word: [OBJECT_INDEX[name] for name in NOUNS[NOUN_INDEX[noun]].objects] for word, noun in objects}
    return (
        targets
        if caption.background_word is None
        else targets | {caption.background_word: [LABELS.index(caption.story.background)]}
    )


def as_kong(n_evals: int, n_words: int) -> Sampler:
    """The published way of sampling with about as many evaluations, three a word and noise.

    The third, of the empty text, enters no map: it is counted, not computed.
    """
    n_noises = max(4, round(n_evals / (3 * n_words) / 4) * 4)
    return replace(Sampler.kong2024(prompts_per_word=2), n_points=n_noises // 2, min_replicates=2)


def best_threshold(images: Sequence[Scored], method: str, kind: str) -> float:
    """The threshold with the highest mean IoU."""
    means = []
    for threshold in THRESHOLDS:
        ious = [iou for image in images for iou in word_ious(image, method, kind, float(threshold))]
        means.append(np.mean(ious) if ious else 0.0)
    return float(THRESHOLDS[int(np.argmax(means))])


def word_ious(image: Scored, method: str, kind: str, threshold: float) -> Floats:
    """IoU of each word of a kind that the picture shows, a word's map cut at a share of its range."""
    rows = [i for i, of in enumerate(image.kinds) if of == kind and image.truth[i].any()]
    if not rows:
        return np.zeros(0)
    truth = image.truth[rows]
    masks = in_its_range(enlarged(image.maps[method][rows], truth.shape[1:])) >= threshold
    both, either = (masks & truth).sum((1, 2)), (masks | truth).sum((1, 2))
    ious: Floats = (both.double() / either).numpy()
    return ious


def iou(bench: Bench) -> Table:
    """Mean IoU by method."""
    rows: list[dict[str, Cell]] = []
    for method in METHODS:
        row: dict[str, Cell] = {"map": method, "U-Net evaluations": bench.evals("painted", method)}
        for source, told in SOURCES.items():
            for kind in ("object", "background"):
                row[f"{kind}s, {told}"] = str(bench.ious(source, method, kind).estimate)
        rows.append(row)
    notes = (
        "True scenes have true masks; generated pictures, of the same captions, those of the embedded segmenter. U-Net "
        "evaluations: a picture, for all its words together. Cross-attention: mean over all blocks; along the sampler: "
        "of true scenes, inversion by DDIM, and the attention of the way back; of generated pictures, that of the "
        "prompted half while they were drawn; by noise schedules: fresh noise on the picture, nothing inverted. CMI as "
        "published: independent draws, three texts a word, at as many evaluations as ours. CMI and attention: the root "
        "of the product of the maps of CMI and of attention under the flat schedule, each in its range.",
        bench.note,
    )
    return Table("iou", "Words found in pictures: mean IoU", rows, notes)


def beside(bench: Bench) -> Table:
    """The combination and CMI beside the others, paired."""
    pairs = [(BOTH, CMI), (BOTH, AT_FLAT), (CMI, CMI_KONG), (CMI, AT_FLAT), (AT_FLAT, ALONG_SAMPLER)]
    rows: list[dict[str, Cell]] = []
    for method, other in pairs:
        row: dict[str, Cell] = {"map": method, "less": other}
        for source, told in SOURCES.items():
            for kind in ("object", "background"):
                apart = bench.ious(source, method, kind).less(bench.ious(source, other, kind))
                row[f"{kind}s, {told}"] = str(apart)
        rows.append(row)
    return Table("beside", "Differences of mean IoU over the same words", rows, (bench.note,))


PARTS = (iou, beside)
"""In this order."""
