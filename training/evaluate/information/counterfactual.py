"""Whether a word's information foretells what becomes of a picture when the word is left out or is another.

The picture's noise is found by running the sampler backwards, and the picture is drawn from it again, without guidance,
with the prompt and with the prompt changed (after Kong et al. 2024, arXiv 2310.07972, section 4.3). Beside conditional
mutual information: cross-attention, and the information of the same kind of word in another picture, which knows
nothing of this one.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
from PIL import Image

import core
from core.arrays import Floats
from core.diffusion.diffuser import Diffuser
from core.diffusion.text import delete_words, replace_word
from core.information.measuring import sampler_for
from core.information.quadrature import Sampler
from training.common.report import Cell, Table
from training.evaluate.common.maps import attended_redraw, attention_at, information
from training.evaluate.common.masks import (
    Estimate,
    Resampled,
    repeats,
    resampled,
    resampled_words,
    weighted_pearson,
)
from training.evaluate.common.proportions import with_interval
from training.evaluate.information.captions import OPPOSITE, any_of
from training.picturebook.world.captions import Caption
from training.picturebook.world.scenes import Scene, caption_of, make_scene, paint
from training.picturebook.world.world import BACKGROUNDS, NOUNS, STYLES

CMI = "CMI"
ALONG_SAMPLER = "cross-attention along the sampler"
AT_FLAT = "cross-attention, flat noise schedule"
OF_ANOTHER = "CMI of another picture"
"""The control."""
PREDICTORS = (CMI, ALONG_SAMPLER, AT_FLAT, OF_ANOTHER)
CHANGES = ("left out", "swapped")
KINDS = ("object", "background", "style", "relation")
ALL = "all four"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """How much is measured."""

    n_scenes: int = 100
    """Held-out true scenes."""
    n_points: int = 8
    """Noise samples in a replicate."""
    n_replicates: int = 4
    """Replicates a scene, and as many noise samples in all for attention."""
    num_inference_steps: int | None = None
    """Steps backwards and forwards; None: the model's own."""
    n_fixed_point_iterations: int = 4
    """Evaluations for each step backwards."""
    batch_size: int = 32
    """Most latents in a U-Net call."""
    n_bootstrap: int = 2000
    """Resamples of the scenes for each interval."""


QUICK = Settings(n_scenes=5, n_points=4, num_inference_steps=10, n_fixed_point_iterations=2)
"""Shows that it works; its figures mean little."""


class Changed(NamedTuple):
    """A word of a picture: what was foretold of it, and what its change changed."""

    image: int
    """Number of the picture."""
    kind: str
    """One of `KINDS`."""
    foretold: Mapping[str, Floats]
    """[h, w] by predictor, the control excepted."""
    change: Mapping[str, Floats]
    """[h, w] squared difference of latents, summed over channels, by one of `CHANGES`."""


class Returned(NamedTuple):
    """How a picture came back from its noise."""

    error: float
    """Distance of the latents from the picture's own, over their length."""
    length: float
    """Of the picture's own latents."""


class Bench:
    """The pictures and their changes: made once, when first asked for."""

    def __init__(self, model: Diffuser, settings: Settings) -> None:
        self._model, self.settings = model, settings

    @cached_property
    def measured(self) -> tuple[list[Changed], list[Returned]]:
        """The words of all pictures, and how each picture came back."""
        words: list[Changed] = []
        back: list[Returned] = []
        for number in range(self.settings.n_scenes):
            if number % 10 == 0:
                log.info("changes: scene %d of %d", number, self.settings.n_scenes)
            changed, returned = measure(self._model, number, make_scene(number, "test"), self.settings)
            words += changed
            back.append(returned)
        return words, back

    def words(self, kind: str) -> list[Changed]:
        """The words of a kind, or all."""
        return [word for word in self.measured[0] if kind in (word.kind, ALL)]

    def images(self, kind: str, change: str, predictor: str) -> Resampled:
        """Pearson correlation of sums over the picture, a word at a time, drawn anew by pictures."""
        words = self.words(kind)
        x = np.array([told.sum() for told in foretold(words, predictor)])
        y = np.array([word.change[change].sum() for word in words])
        weights = repeats([word.image for word in words], self.settings.n_scenes, self.settings.n_bootstrap)
        return Resampled(float(weighted_pearson(x, y, np.ones((1, len(words))))[0]), weighted_pearson(x, y, weights))

    def pixels(self, kind: str, change: str, predictor: str) -> Resampled:
        """Mean over words of the correlation inside the map."""
        found: list[list[float]] = [[] for _ in range(self.settings.n_scenes)]
        words = self.words(kind)
        for word, told in zip(words, foretold(words, predictor), strict=True):
            one = np.ones((1, told.size))
            found[word.image].append(float(weighted_pearson(told.ravel(), word.change[change].ravel(), one)[0]))
        return resampled_words(found, self.settings.n_bootstrap)

    @property
    def note(self) -> str:
        """How it was measured."""
        settings = self.settings
        steps = settings.num_inference_steps or self._model.spec.num_inference_steps
        return (
            f"{settings.n_scenes} held-out painted scenes, {steps} steps back to their noise by {settings.n_fixed_point_iterations} "
            "evaluations each, and forth again without guidance. Change: the squared difference of the latents of what "
            "came back and of what came under the changed prompt. Swapped: for another thing, place or style, or for "
            f"the opposite relation. CMI: {settings.n_replicates} replicates of {settings.n_points} noises; attention "
            "under the flat noise schedule: as many noises. The control: CMI of the same kind of word in the next "
            "picture that has one. In brackets: 95 % intervals over pictures."
        )


def measure(model: Diffuser, number: int, scene: Scene, settings: Settings) -> tuple[list[Changed], Returned]:
    """One picture's words."""
    caption = caption_of(scene)
    others = others_of(caption, np.random.default_rng([*scene.seed, 6]))
    prompt, words = caption.text, list(others)
    x = model.encode(Image.fromarray(paint(scene).image))
    inversion = core.invert(
        model,
        x,
        prompt,
        num_inference_steps=settings.num_inference_steps,
        n_fixed_point_iterations=settings.n_fixed_point_iterations,
    )
    prompts = {
        "left out": [delete_words(prompt, [word]) for word in words],
        "swapped": [replace_word(prompt, word, to) for word, (_, to) in others.items()],
    }
    along, latents = attended_redraw(model, inversion, words, [text for change in CHANGES for text in prompts[change]])
    squared = (latents[1:] - latents[0]).double().square().sum(1).cpu().numpy()
    changes = dict(zip(CHANGES, squared.reshape(len(CHANGES), len(words), *squared.shape[1:]), strict=True))
    seed, n = scene.seed[-1], settings.n_points * settings.n_replicates
    ours = replace(sampler_for(model, None), n_points=settings.n_points, min_replicates=settings.n_replicates)
    maps = {
        CMI: information(model, x, prompt, words, ours, seed),
        ALONG_SAMPLER: along,
        AT_FLAT: attention_at(model, x, prompt, words, Sampler(n_points=n), seed, settings.batch_size),
    }
    plain = {name: told.double().numpy() for name, told in maps.items()}
    length = float(x.norm())
    found = [
        Changed(
            number,
            kind,
            {name: told[i] for name, told in plain.items()},
            {change: by_word[i] for change, by_word in changes.items()},
        )
        for i, (kind, _) in enumerate(others.values())
    ]
    return found, Returned(float((latents[0] - x[0]).norm()) / length, length)


def others_of(caption: Caption, rng: np.random.Generator) -> dict[str, tuple[str, str]]:
    """Of each word that a slot of the caption chose: its kind, and another word that could stand there."""
    story = caption.story
    found = {
        word: ("object", any_of(rng, [noun.name for noun in NOUNS if noun.name not in story.nouns]))
        for word in caption.words
    }
    if caption.background_word is not None:
        found[caption.background_word] = (
            "background",
            any_of(rng, [p.name for p in BACKGROUNDS if p.name != story.background]),
        )
    if caption.style_named:
        found[story.style] = "style", any_of(rng, [style for style in STYLES[1:] if style != story.style])
    if story.relation is not None:
        found[story.relation] = "relation", OPPOSITE[story.relation]
    return found


def foretold(words: Sequence[Changed], predictor: str) -> list[Floats]:
    """[h, w] what was foretold of each word; by the control, of the next picture's word of its kind."""
    if predictor != OF_ANOTHER:
        return [word.foretold[predictor] for word in words]
    found = []
    for word in words:
        alike = [other for other in words if other.kind == word.kind and other.image != word.image]
        later = [other for other in alike if other.image > word.image]
        found.append((later or alike)[0].foretold[CMI] if alike else np.zeros_like(word.foretold[CMI]))
    return found


def _table(bench: Bench, name: str, title: str, level: str, published: str) -> Table:
    rows: list[dict[str, Cell]] = []
    for change in CHANGES:
        for kind in (*KINDS, ALL):
            words = bench.words(kind)
            if not words:
                continue
            told = {by: getattr(bench, level)(kind, change, by) for by in PREDICTORS}
            row: dict[str, Cell] = {"word": kind, "is": change, "words": float(len(words))}
            row |= {by: _cell(figure.estimate, ".2f") for by, figure in told.items()}
            row["CMI less attention along the sampler"] = _cell(told[CMI].less(told[ALONG_SAMPLER]), "+.2f")
            rows.append(row)
    return Table(name, title, rows, (published, bench.note))


def images(bench: Bench) -> Table:
    """How much of the picture will change."""
    published = "Published, on photographs: CMI .34, attention along the sampler .24 (Kong et al. 2024)."
    title = "How much a changed word changes a picture, foretold: correlation over pictures"
    return _table(bench, "images", title, "images", published)


def pixels(bench: Bench) -> Table:
    """Where it will change."""
    published = "Published, on photographs: CMI .27, attention along the sampler .21 (Kong et al. 2024)."
    title = "Where a changed word changes a picture, foretold: correlation inside the map, mean over words"
    return _table(bench, "pixels", title, "pixels", published)


def returned(bench: Bench) -> Table:
    """What the way back and forth loses, beside what changed words change."""
    back = bench.measured[1]
    rows: list[dict[str, Cell]] = [
        {
            "under": "the same prompt: the way's own error",
            "distance": _distance(np.array([r.error for r in back]), bench),
        }
    ]
    for change in CHANGES:
        for kind in KINDS:
            if not (words := bench.words(kind)):
                continue
            apart = [np.sqrt(word.change[change].sum()) / back[word.image].length for word in words]
            rows.append({"under": f"{kind} {change}", "distance": _distance(np.array(apart), bench)})
    note = "Distance: of latents, over the length of the picture's own. The error: from the picture's own latents."
    return Table("returned", "How far the picture moves", rows, (note, bench.note))


def _cell(figure: Estimate, form: str) -> str | None:
    """Nothing where too few words have a correlation."""
    return with_interval(figure, form) if np.isfinite(figure.value) else None


def _distance(values: Floats, bench: Bench) -> str:
    return with_interval(resampled(values[:, None], bench.settings.n_bootstrap).estimate, ".3f")


PARTS = (images, pixels, returned)
"""In this order."""
