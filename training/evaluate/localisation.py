"""How well maps of words find what the words name: mean IoU with the true masks of held-out painted scenes.

The whole image, cross-attention along the sampler and under the information noise schedule, conditional mutual
information as published and as `core.attribute` samples it, and attention and information together (after Kong et al.
2024, arXiv 2310.07972, table 2, whose threshold was chosen on the pictures that it was scored on; not so here).
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

import core
from core.activations import Key
from core.attention import record_attention, word_maps
from core.diffuser import Diffuser
from core.hookpoints import cross_attention_blocks
from core.information.estimator import noisy
from core.information.quadrature import Sampler, draw
from core.inversion import redraw
from training.evaluate.grids import Floats, Resampled, resampled
from training.evaluate.picturebook import NO_TARGET
from training.picturebook.captions import Caption
from training.picturebook.scenes import Scene, caption_of, make_scene, paint
from training.picturebook.world import LABELS, NOUN_INDEX, NOUNS, THING_INDEX
from training.report import Cell, Table

THRESHOLDS = np.linspace(0.05, 0.95, 19)
"""Tried, in shares of a map's range."""

WHOLE = "whole image"
ALONG_SAMPLER = "cross-attention along the sampler"
AT_LOGISTIC = "cross-attention, published noise schedule"
AT_FLAT = "cross-attention, our noise schedule"
CMI_PUBLISHED = "CMI as published"
CMI = "CMI"
BOTH = "CMI and attention"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """How much is measured."""

    n_scenes: int = 64
    """Held-out true scenes on which the maps are scored."""
    n_fit: int = 32
    """Other held-out scenes, on which thresholds are chosen."""
    n_points: int = 8
    """Noise samples in a replicate."""
    n_replicates: int = 8
    """Replicates a scene, and as many noise samples in all for attention."""
    num_inference_steps: int | None = None
    """Steps of the sampler along which attention is read; None: the model's own."""
    batch_size: int = 32
    """Most latents in a U-Net call."""
    n_bootstrap: int = 2000
    """Resamples of the scenes for each interval."""


QUICK = Settings(n_scenes=4, n_fit=3, n_points=4, n_replicates=4, num_inference_steps=10)
"""Shows that it works; its figures mean little."""


class Scored(NamedTuple):
    """A scene's words with their maps by every method."""

    kinds: tuple[str, ...]
    """[W] what each word names: a thing or the place."""
    truth: Tensor
    """[W, H, W'] bool: the pixels that show it."""
    maps: Mapping[str, Tensor]
    """By method: [W, h, w]."""
    evals: Mapping[str, int]
    """By method: U-Net evaluations for all words."""


class Bench:
    """The scenes and their maps: made once, when first asked for."""

    def __init__(self, model: Diffuser, settings: Settings) -> None:
        self._model, self.settings = model, settings

    @cached_property
    def scored(self) -> list[Scored]:
        """The scenes that are scored."""
        return self._measure(range(self.settings.n_scenes))

    @cached_property
    def fit(self) -> list[Scored]:
        """The scenes on which thresholds are chosen."""
        first = self.settings.n_scenes
        return self._measure(range(first, first + self.settings.n_fit))

    def _measure(self, seeds: range) -> list[Scored]:
        found = []
        for seed in seeds:
            if seed % 8 == 0:
                log.info("localisation: scene %d of %d", seed, self.settings.n_scenes + self.settings.n_fit)
            found.append(measure(self._model, make_scene(seed, "test"), self.settings))
        return found

    def ious(self, method: str, kind: str) -> Resampled:
        """Mean IoU of a method over the words of a kind, at the threshold that suits the other scenes."""
        threshold = best_threshold(self.fit, method, kind)
        rows = [word_ious(scene, method, kind, threshold) for scene in self.scored]
        width = max(1, *(len(row) for row in rows))
        padded = np.array([[*row, *[np.nan] * (width - len(row))] for row in rows])
        return resampled(padded, self.settings.n_bootstrap)

    def evals(self, method: str) -> float:
        """Mean U-Net evaluations a scene."""
        return float(np.mean([scene.evals[method] for scene in self.scored]))

    @property
    def note(self) -> str:
        """How it was measured."""
        settings = self.settings
        return (
            f"{settings.n_scenes} held-out painted scenes; thresholds chosen on {settings.n_fit} others, by method "
            "and kind. A map is enlarged to the picture, bilinearly, and cut at a share of its range; IoU in pixels, a "
            "word at a time, mean over words. In brackets: 95 % intervals over scenes."
        )


METHODS = (WHOLE, ALONG_SAMPLER, AT_LOGISTIC, AT_FLAT, CMI_PUBLISHED, CMI, BOTH)


def measure(model: Diffuser, scene: Scene, settings: Settings) -> Scored:
    """One scene's maps."""
    caption, painting = caption_of(scene), paint(scene)
    targets = targets_of(caption)
    words = list(targets)
    x = model.encode(Image.fromarray(painting.image))
    n = settings.n_points * settings.n_replicates
    n_steps = settings.num_inference_steps or model.spec.num_inference_steps
    evals = {WHOLE: 0, ALONG_SAMPLER: 2 * n_steps, AT_LOGISTIC: n, AT_FLAT: n, CMI: n * (len(words) + 1)}
    published = as_published(evals[CMI], len(words))
    evals[CMI_PUBLISHED] = 3 * len(words) * published.n_points * published.min_replicates
    ours = Sampler(n_points=settings.n_points, min_replicates=settings.n_replicates)
    seed = scene.seed[-1]
    maps = {
        WHOLE: torch.ones(len(words), *model.latent_shape[1:]),
        ALONG_SAMPLER: attention_along_sampler(model, x, caption.text, words, n_steps),
        CMI_PUBLISHED: information(model, x, caption.text, words, published, seed),
        CMI: information(model, x, caption.text, words, ours, seed),
    }
    for name, density in ((AT_LOGISTIC, Sampler.published()), (AT_FLAT, Sampler())):
        sampler = replace(density, n_points=n, stratified=True, antithetic=True)
        maps[name] = attention_at(model, x, caption.text, words, sampler, seed, settings.batch_size)
    maps[BOTH] = (in_its_range(maps[CMI]) * in_its_range(maps[AT_FLAT])).sqrt()
    evals[BOTH] = evals[CMI] + evals[AT_FLAT]
    labels = torch.from_numpy(painting.labels).long()
    truth = torch.stack([torch.isin(labels, torch.tensor(classes)) for classes in targets.values()])
    kinds = tuple("thing" if word in caption.words else "place" for word in words)
    return Scored(kinds, truth, maps, evals)


def targets_of(caption: Caption) -> dict[str, list[int]]:
    """The classes that each word for a thing or the place can name."""
    things = zip(caption.words, caption.story.nouns, strict=True)
    targets = {word: [THING_INDEX[name] for name in NOUNS[NOUN_INDEX[noun]].things] for word, noun in things}
    return (
        targets if caption.place_word is None else targets | {caption.place_word: [LABELS.index(caption.story.place)]}
    )


def as_published(n_evals: int, n_words: int) -> Sampler:
    """The published way of sampling with about as many evaluations, three a word and noise.

    The third, of the empty text, enters no map: it is counted, not computed.
    """
    n_noises = max(4, round(n_evals / (3 * n_words) / 4) * 4)
    return replace(Sampler.published(prompts_per_word=2), n_points=n_noises // 2, min_replicates=2)


def information(model: Diffuser, x: Tensor, prompt: str, words: Sequence[str], sampler: Sampler, seed: int) -> Tensor:
    """[W, h, w] bits of each word given the rest of the prompt."""
    found = core.attribute(model, x, prompt, words=words, rel_error=NO_TARGET, sampler=sampler, seed=seed)
    order = [found.words.index(word) for word in words]
    return torch.from_numpy(found.maps[order]).float()


def attention_along_sampler(model: Diffuser, x: Tensor, prompt: str, words: Sequence[str], n_steps: int) -> Tensor:
    """[W, h, w] mean attention on the way from the picture's noise back to it: as DAAM reads it of true pictures."""
    inversion = core.invert(model, x, prompt, num_inference_steps=n_steps, n_guesses=1)
    seen = _Seen()
    with record_attention(model, cross_attention_blocks(model.unet), sink=seen):
        redraw(model, inversion, [prompt])
    return seen.of_words(model, prompt, words)


def attention_at(
    model: Diffuser, x: Tensor, prompt: str, words: Sequence[str], sampler: Sampler, seed: int, batch_size: int
) -> Tensor:
    """[W, h, w] mean attention over fresh noise at the log-SNRs of one draw of a sampler."""
    samples = draw(sampler, sampler.density(model.schedule.log_snr_range), model.latent_shape, (seed, 0))
    x_a = noisy(x[0], samples.log_snr, samples.noise)
    seen = _Seen()
    with record_attention(model, cross_attention_blocks(model.unet), sink=seen):
        for at in range(0, len(x_a), batch_size):
            part = slice(at, at + batch_size)
            embeddings = model.encode_text([prompt] * len(x_a[part]))
            model.predict_noise(x_a[part], samples.log_snr[part], embeddings)
    return seen.of_words(model, prompt, words)


class _Seen:
    """A sink that adds up attention maps, block by block."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def __call__(self, key: Key, maps: Tensor) -> None:
        before = self._sums.get(key.hookpoint, torch.zeros(()))
        self._sums[key.hookpoint] = before + maps.sum(0).cpu()

    def of_words(self, model: Diffuser, prompt: str, words: Sequence[str]) -> Tensor:
        """[W, h, w] sum over blocks, on the latents' grid."""
        total = torch.zeros(len(words), *model.latent_shape[1:])
        for maps in self._sums.values():
            found = word_maps(model, prompt, maps)
            total += enlarged(found.maps[[found.words.index(word) for word in words]], model.latent_shape[1:])
        return total


def enlarged(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Maps [W, h, w] at another size, bilinearly."""
    return F.interpolate(maps[None], size=tuple(size), mode="bilinear", align_corners=False)[0]


def in_its_range(maps: Tensor) -> Tensor:
    """Each of the maps [W, h, w] from 0 at its least to 1 at its most; 1 where it is everywhere the same."""
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return torch.where(high > low, (maps - low) / (high - low), 1.0)


def best_threshold(scenes: Sequence[Scored], method: str, kind: str) -> float:
    """The threshold with the highest mean IoU."""
    means = []
    for threshold in THRESHOLDS:
        ious = [iou for scene in scenes for iou in word_ious(scene, method, kind, float(threshold))]
        means.append(np.mean(ious) if ious else 0.0)
    return float(THRESHOLDS[int(np.argmax(means))])


def word_ious(scene: Scored, method: str, kind: str, threshold: float) -> Floats:
    """IoU of each word of a kind that the scene has, a word's map cut at a share of its range."""
    rows = [i for i, of in enumerate(scene.kinds) if of == kind and scene.truth[i].any()]
    if not rows:
        return np.zeros(0)
    truth = scene.truth[rows]
    masks = in_its_range(enlarged(scene.maps[method][rows], truth.shape[1:])) >= threshold
    both, either = (masks & truth).sum((1, 2)), (masks | truth).sum((1, 2))
    ious: Floats = (both.double() / either).numpy()
    return ious


def iou(bench: Bench) -> Table:
    """Mean IoU by method."""
    rows: list[dict[str, Cell]] = []
    for method in METHODS:
        row: dict[str, Cell] = {"map": method, "U-Net evaluations": bench.evals(method)}
        row |= {f"{kind}s": str(bench.ious(method, kind).estimate) for kind in ("thing", "place")}
        rows.append(row)
    notes = (
        "U-Net evaluations: a scene, for all its words together. Cross-attention: mean over all blocks; along the "
        "sampler: inversion by DDIM, and the attention of the way back; by noise schedules: fresh noise on the "
        "picture, nothing inverted. CMI as published: independent draws, three texts a word, at as many evaluations as "
        "ours. CMI and attention: the root of the product of the maps of CMI and of attention under our schedule, each "
        "in its range.",
        bench.note,
    )
    return Table("iou", "Words found in true scenes: mean IoU", rows, notes)


def beside(bench: Bench) -> Table:
    """The combination and CMI beside the others, paired."""
    pairs = [(BOTH, CMI), (BOTH, AT_FLAT), (CMI, CMI_PUBLISHED), (CMI, AT_FLAT), (AT_FLAT, ALONG_SAMPLER)]
    rows: list[dict[str, Cell]] = []
    for method, other in pairs:
        row: dict[str, Cell] = {"map": method, "less": other}
        for kind in ("thing", "place"):
            row[f"{kind}s"] = str(bench.ious(method, kind).less(bench.ious(other, kind)))
        rows.append(row)
    return Table("beside", "Differences of mean IoU over the same words", rows, (bench.note,))


PARTS = (iou, beside)
"""In this order."""
