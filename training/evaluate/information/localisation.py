"""How well the maps of words localise what the words name: mean IoU with the true masks of held-out painted scenes, and
with a segmenter's masks of generated images.

Compared are conditional mutual information (CMI) as `core.attribute` estimates it and as Kong et al. 2024 (arXiv
2310.07972) do, cross-attention along the sampler and on fresh noise under several noise schedules, CMI and attention
combined, and the whole image as a baseline. After Kong et al., table 2; but each map's threshold is chosen here on
other images than those it is scored on.
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
from training.evaluate.common.evaluation import Evaluation
from training.evaluate.common.judges import MIN_AREA
from training.evaluate.common.maps import (
    attended_drawing,
    attention_along_sampler,
    attention_at,
    enlarged,
    information,
    normalised,
)
from training.evaluate.common.masks import Resampled, resampled_words
from training.picturebook.world.captions import Caption
from training.picturebook.world.scenes import Scene, caption_of, make_scene, paint
from training.picturebook.world.world import LABELS, NOUN_INDEX, NOUNS, OBJECT_INDEX

THRESHOLDS = np.linspace(0.05, 0.95, 19)
"""Thresholds tried, as fractions of a map's range."""

WHOLE = "whole image"
ALONG_SAMPLER = "cross-attention along the sampler"
AT_LOGISTIC = "cross-attention, logistic noise schedule"
AT_FLAT = "cross-attention, flat noise schedule"
AT_OURS = "cross-attention, our noise schedule"
CMI_KONG = "CMI, Kong et al. 2024"
CMI = "CMI"
BOTH = "CMI and attention"
METHODS = (WHOLE, ALONG_SAMPLER, AT_LOGISTIC, AT_FLAT, AT_OURS, CMI_KONG, CMI, BOTH)

Source = Literal["painted", "drawn"]
"""Held-out painted scenes with their true masks, or images the model generates of the same captions."""
SOURCES: Mapping[Source, str] = {"painted": "painted scenes", "drawn": "generated images"}
"""Their names in tables."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LocalisationSettings:
    """How much is measured."""

    n_scenes: int = 64
    """Held-out captions on whose painted and generated images the maps are scored."""
    n_fit: int = 32
    """Other held-out captions, on whose images thresholds are chosen."""
    n_points: int = 8
    """Noise samples in a replicate."""
    n_replicates: int = 4
    """Replicates per image; attention uses as many noise samples in all."""
    num_inference_steps: int | None = None
    """Steps of the sampler along which attention is read; None for the model's default."""
    batch_size: int = 32
    """Most latents in a U-Net call."""
    n_bootstrap: int = 2000
    """Bootstrap resamples of the images for each interval."""


QUICK = LocalisationSettings(n_scenes=3, n_fit=2, n_points=4, num_inference_steps=10)
"""A smoke test; its figures mean little."""


class Subject(NamedTuple):
    """An image whose words are localised."""

    caption: Caption
    x: Tensor
    """[1, C, h, w] its latents."""
    labels: Tensor
    """[H, W] class of each pixel."""
    along: Tensor
    """[W, h, w] attention to the words along the sampler."""
    seed: int
    """Seed of the noise samples."""


class Scored(NamedTuple):
    """An image's words with their maps by every method."""

    kinds: tuple[str, ...]
    """[W] what each word names: `object` or `background`."""
    truth: Tensor
    """[W, H, W'] bool: its pixels."""
    maps: Mapping[str, Tensor]
    """By method: [W, h, w]."""
    evals: Mapping[str, int]
    """By method: U-Net evaluations for all words together."""


class LocalisationBench:
    """The images and the maps of their words; made once, on first use."""

    def __init__(self, model: Diffuser, settings: LocalisationSettings) -> None:
        self._model, self.settings = model, settings
        self._scored: dict[Source, tuple[list[Scored], list[Scored]]] = {}

    def scored(self, source: Source) -> tuple[list[Scored], list[Scored]]:
        """The images that are scored, and those on which thresholds are chosen."""
        if source not in self._scored:
            n, n_all = self.settings.n_scenes, self.settings.n_scenes + self.settings.n_fit
            found = []
            for seed in range(n_all):
                if seed % 8 == 0:
                    log.info("localisation: %s image %d of %d", source, seed, n_all)
                scene = make_scene(seed, "test")
                subject = self._paint(scene) if source == "painted" else self._draw(scene)
                found.append(measure(self._model, subject, self.settings))
            self._scored[source] = found[:n], found[n:]
        return self._scored[source]

    def _paint(self, scene: Scene) -> Subject:
        """The painted scene with its true masks."""
        caption, painting, words = caption_of(scene), paint(scene), list(targets_of(caption_of(scene)))
        x = self._model.encode(Image.fromarray(painting.image))
        along = attention_along_sampler(self._model, x, caption.text, words, _n_steps(self._model, self.settings))
        return Subject(caption, x, torch.from_numpy(painting.labels).long(), along, scene.seed[-1])

    def _draw(self, scene: Scene) -> Subject:
        """An image generated from the scene's caption, with the segmenter's masks."""
        caption, seed, n_steps = caption_of(scene), scene.seed[-1], _n_steps(self._model, self.settings)
        drawn, along = attended_drawing(self._model, caption.text, list(targets_of(caption)), seed, n_steps)
        labels = self._segmenter.segment([drawn.image]).label_map()[0]
        return Subject(caption, drawn.latents, labels, along, seed)

    @cached_property
    def _segmenter(self) -> Segmenter:
        return load_segmenter(device="cpu")

    def ious(self, source: Source, method: str, kind: str) -> Resampled:
        """Mean IoU of a method over the words of a kind, at the threshold that is best on the other images."""
        scored, fit = self.scored(source)
        threshold = best_threshold(fit, method, kind)
        ious = [word_ious(image, method, kind, threshold).tolist() for image in scored]
        return resampled_words(ious, self.settings.n_bootstrap)

    def evals(self, source: Source, method: str) -> float:
        """Mean U-Net evaluations per image."""
        return float(np.mean([image.evals[method] for image in self.scored(source)[0]]))

    @property
    def note(self) -> str:
        """How it was measured."""
        settings = self.settings
        return (
            f"{settings.n_scenes} held-out captions; thresholds chosen on {settings.n_fit} others, by method and kind. "
            "Maps are enlarged to the image bilinearly and cut at a fraction of their range; IoU in pixels, mean over "
            "the words whose objects are present. 95 % intervals over images in brackets."
        )


def _n_steps(model: Diffuser, settings: LocalisationSettings) -> int:
    return settings.num_inference_steps or model.spec.num_inference_steps


def measure(model: Diffuser, subject: Subject, settings: LocalisationSettings) -> Scored:
    """The maps of one image's words."""
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
    maps[BOTH] = (normalised(maps[CMI]) * normalised(maps[AT_FLAT])).sqrt()
    evals[BOTH] = evals[CMI] + evals[AT_FLAT]
    kinds = tuple("object" if word in caption.words else "background" for word in words)
    return Scored(kinds, masks_of(subject.labels, list(targets.values())), maps, evals)


def masks_of(labels: Tensor, targets: Sequence[Sequence[int]]) -> Tensor:
    """[W, H, W'] [W, H, W'] masks of each word's classes; empty if they cover less than `MIN_AREA` pixels."""
    masks = torch.stack([torch.isin(labels, torch.tensor(classes)) for classes in targets])
    return masks & (masks.sum((1, 2), keepdim=True) >= MIN_AREA)


def targets_of(caption: Caption) -> dict[str, list[int]]:
    """The classes each word for an object or the background can name."""
    objects = zip(caption.words, caption.story.nouns, strict=True)
    targets = {word: [OBJECT_INDEX[name] for name in NOUNS[NOUN_INDEX[noun]].objects] for word, noun in objects}
    return (
        targets
        if caption.background_word is None
        else targets | {caption.background_word: [LABELS.index(caption.story.background)]}
    )


def as_kong(n_evals: int, n_words: int) -> Sampler:
    """The sampling of Kong et al. 2024 with about `n_evals` evaluations, three per word and noise sample.

    The third, of the empty prompt, enters no map: it is counted, not computed.
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
    """IoU of each word of a kind that the image shows, its map cut at a fraction of its range."""
    rows = [i for i, of in enumerate(image.kinds) if of == kind and image.truth[i].any()]
    if not rows:
        return np.zeros(0)
    truth = image.truth[rows]
    masks = normalised(enlarged(image.maps[method][rows], truth.shape[1:])) >= threshold
    both, either = (masks & truth).sum((1, 2)), (masks | truth).sum((1, 2))
    ious: Floats = (both.double() / either).numpy()
    return ious


def iou(bench: LocalisationBench) -> Table:
    """Mean IoU by method."""
    rows: list[dict[str, Cell]] = []
    for method in METHODS:
        row: dict[str, Cell] = {"map": method, "U-Net evaluations": bench.evals("painted", method)}
        for source, title in SOURCES.items():
            for kind in ("object", "background"):
                row[f"{kind}s, {title}"] = str(bench.ious(source, method, kind).estimate)
        rows.append(row)
    notes = (
        "Masks: the true ones of painted scenes, and the embedded segmenter's of generated images. U-Net evaluations: "
        "per image, for all its words together. Cross-attention: mean over all blocks. Along the sampler: of painted "
        "scenes, while they are regenerated from their inverted noise; of generated images, in the conditional branch "
        "while they were sampled. Noise schedules: on fresh noise, without inversion. Kong et al. 2024: independent "
        "draws, three prompts per word, about as many evaluations. CMI and attention: geometric mean of the maps of "
        "CMI and of attention under the flat schedule, each scaled to its range.",
        bench.note,
    )
    return Table("iou", "Localisation of words: mean IoU", rows, notes)


def differences(bench: LocalisationBench) -> Table:
    """Paired differences between methods."""
    pairs = [(BOTH, CMI), (BOTH, AT_FLAT), (CMI, CMI_KONG), (CMI, AT_FLAT), (AT_FLAT, ALONG_SAMPLER)]
    rows: list[dict[str, Cell]] = []
    for method, other in pairs:
        row: dict[str, Cell] = {"map": method, "minus": other}
        for source, title in SOURCES.items():
            for kind in ("object", "background"):
                apart = bench.ious(source, method, kind).minus(bench.ious(source, other, kind))
                row[f"{kind}s, {title}"] = str(apart)
        rows.append(row)
    return Table("differences", "Differences of mean IoU over the same words", rows, (bench.note,))


EVALUATION = Evaluation(
    name="localisation",
    title="Localisation of words",
    description=__doc__,
    settings=LocalisationSettings(),
    quick=QUICK,
    bench=lambda subject, settings: LocalisationBench(subject.model, settings),
    parts=(iou, differences),
)
