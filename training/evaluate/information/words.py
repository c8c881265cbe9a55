"""Whether measures of a word's contribution tell informative words from others: nouns, styles and relations from
articles, prepositions and conjunctions.

Conditional mutual information (CMI), mutual information (MI) and cross-attention of every word of held-out painted
scenes, next to the bits the word can carry under the grammar. Kong et al. 2024 (arXiv 2310.07972) claim, without
figures, that information finds abstract words better than attention does.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
from PIL import Image

import core
from core.arrays import Bools, Floats, Ints
from core.diffusion.diffuser import Diffuser
from core.diffusion.hookpoints import cross_attention_blocks
from core.diffusion.text import distinct_words
from core.information.measuring import sampler_for
from core.information.quadrature import Sampler
from core.information.results import Given
from training.common.report import Cell, Table
from training.evaluate.common.evaluation import Evaluation
from training.evaluate.common.maps import attention_at
from training.evaluate.common.masks import Resampled, repeats, resampled_words, weighted_pearson
from training.evaluate.common.proportions import with_interval
from training.evaluate.common.scenes import NO_TARGET
from training.picturebook.world.captions import Caption, log2_word_given_rest
from training.picturebook.world.scenes import CELL, Scene, caption_of, make_scene, paint
from training.picturebook.world.world import NOUN_INDEX, NOUNS, OBJECT_INDEX

CMI, MI, ATTENTION = "CMI", "MI", "attention"
MEASURES = (CMI, MI, ATTENTION)
GIVEN: Mapping[str, Given] = {CMI: "rest", MI: "nothing"}
OBJECT, BACKGROUND, STYLE, RELATION, OTHER = "object", "background", "style", "relation", "other"
KINDS = (OBJECT, BACKGROUND, STYLE, RELATION, OTHER)
"""`other`: words that follow from the rest or say nothing about an image: articles, prepositions, `and`, `of`,
`style`."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WordSettings:
    """How much is measured."""

    n_scenes: int = 64
    """Held-out painted scenes."""
    n_points: int = 8
    """Noise samples in a replicate."""
    n_replicates: int = 3
    """Replicates per scene; attention uses as many noise samples in all."""
    batch_size: int = 32
    """Most latents in a U-Net call."""
    n_bootstrap: int = 2000
    """Bootstrap resamples of the scenes for each interval."""


QUICK = WordSettings(n_scenes=4, n_points=4, n_replicates=2)
"""A smoke test; its figures mean little."""


class MeasuredWord(NamedTuple):
    """A word of an image with its figures by each measure."""

    image: int
    """Number of the image."""
    kind: str
    """One of `KINDS`."""
    grammar: float
    """Surprisal in bits given the rest of the caption."""
    totals: dict[str, float]
    """Bits, or share of attention, by measure."""
    lift: dict[str, float]
    """Density of its map on the caption's objects over that on the whole image, by measure."""


class WordBench:
    """The words of the scenes; measured once, on first use."""

    def __init__(self, model: Diffuser, settings: WordSettings) -> None:
        self._model, self.settings = model, settings

    @cached_property
    def words(self) -> list[MeasuredWord]:
        """The words of all images."""
        found: list[MeasuredWord] = []
        for number in range(self.settings.n_scenes):
            if number % 8 == 0:
                log.info("words: scene %d of %d", number, self.settings.n_scenes)
            found += measure(self._model, number, make_scene(number, "test"), self.settings)
        return found

    def mean(self, words: Sequence[MeasuredWord], values: Sequence[float]) -> Resampled:
        """The mean of a figure per word, resampled by image."""
        found: list[list[float]] = [[] for _ in range(self.settings.n_scenes)]
        for word, value in zip(words, values, strict=True):
            found[word.image].append(value)
        return resampled_words(found, self.settings.n_bootstrap)

    def weights(self, words: Sequence[MeasuredWord]) -> Floats:
        """[1 + n, words] how often each word counts: once, and in each resample of the images."""
        drawn = repeats([word.image for word in words], self.settings.n_scenes, self.settings.n_bootstrap)
        return np.concatenate([np.ones((1, len(words))), drawn])

    @property
    def note(self) -> str:
        """How it was measured."""
        settings = self.settings
        return (
            f"All words of {settings.n_scenes} held-out painted scenes; {settings.n_replicates} replicates of "
            f"{settings.n_points} noise samples each, and as many for attention (mean over all blocks, flat noise "
            "schedule; a share of each position's attention). 95 % intervals over images in brackets."
        )


def measure(model: Diffuser, number: int, scene: Scene, settings: WordSettings) -> list[MeasuredWord]:
    """The words of one scene."""
    caption, painting = caption_of(scene), paint(scene)
    prompt, words = caption.text, distinct_words(caption.text)
    x = model.encode(Image.fromarray(painting.image))
    seed, n = scene.seed[-1], settings.n_points * settings.n_replicates
    ours = replace(sampler_for(model, None), n_points=settings.n_points, min_replicates=settings.n_replicates)
    bits = {
        name: core.attribute(model, x, prompt, given=given, rel_error=NO_TARGET, sampler=ours, seed=seed).maps
        for name, given in GIVEN.items()
    }
    attention = attention_at(model, x, prompt, words, Sampler(n_points=n), seed, settings.batch_size)
    shares = attention.double().numpy() / (n * len(cross_attention_blocks(model.unet)))
    maps = {**bits, ATTENTION: shares}
    objects = share_of_objects(np.asarray(painting.labels), caption)
    return [
        MeasuredWord(
            number,
            kind_of(caption, word),
            -log2_word_given_rest(caption, word),
            {name: float(of[i].mean() if name == ATTENTION else of[i].sum()) for name, of in maps.items()},
            {name: lift(of[i], objects) for name, of in maps.items()},
        )
        for i, word in enumerate(words)
    ]


def kind_of(caption: Caption, word: str) -> str:
    """The kind of the slot that the word fills."""
    if word in caption.words:
        return OBJECT
    if word == caption.background_word:
        return BACKGROUND
    if caption.style_named and word == caption.story.style:
        return STYLE
    return RELATION if word == caption.story.relation else OTHER


def share_of_objects(labels: Ints, caption: Caption) -> Floats:
    """[h, w] share of each latent cell's pixels that show one of the caption's objects."""
    classes = [OBJECT_INDEX[name] for noun in caption.story.nouns for name in NOUNS[NOUN_INDEX[noun]].objects]
    rows, columns = (n // CELL for n in labels.shape)
    shown: Floats = np.isin(labels, classes).reshape(rows, CELL, columns, CELL).mean((1, 3))
    return shown


def lift(map_: Floats, area: Floats) -> float:
    """Density of a map [h, w] on an area, given as shares of cells, over its density on the whole."""
    whole = map_.sum() * area.mean()
    return float((map_ * area).sum() / whole) if whole > 0 else np.nan


def auroc(scores: Floats, positive: Bools, weights: Floats) -> Floats:
    """[n] area under the ROC curve (ties count half) under each row of weights [n, m]; NaN without either class.

    Not `scipy.stats.mannwhitneyu`, which takes no weights: here each row weighs the words of one bootstrap resample.
    """
    above, below = scores[positive], scores[~positive]
    wins = (above[:, None] > below) + (above[:, None] == below) / 2
    of_above, of_below = weights[:, positive], weights[:, ~positive]
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(((of_above @ wins) * of_below).sum(1) / (of_above.sum(1) * of_below.sum(1)))


def kinds(bench: WordBench) -> Table:
    """Mean figures of each kind of word by each measure."""
    rows: list[dict[str, Cell]] = []
    for kind in KINDS:
        words = [word for word in bench.words if word.kind == kind]
        row: dict[str, Cell] = {"word": kind, "words": float(len(words))}
        row["grammar"] = with_interval(bench.mean(words, [word.grammar for word in words]).estimate)
        for name in MEASURES:
            figure = bench.mean(words, [word.totals[name] for word in words]).estimate
            row[f"{name}, share" if name == ATTENTION else f"{name}, bits"] = with_interval(figure, ".3g")
        rows.append(row)
    notes = (
        "Grammar: mean surprisal of a word given the rest of the caption, in bits: the most information it can carry "
        "on average. Other words can carry none.",
        bench.note,
    )
    return Table("kinds", "Information and attention by kind of word", rows, notes)


def informative(bench: WordBench) -> Table:
    """How well each measure tells informative words from others."""
    words = bench.words
    kinds_ = np.array([word.kind for word in words])
    grammar = np.array([word.grammar for word in words])
    weights = bench.weights(words)
    abstract = (kinds_ == STYLE) | (kinds_ == RELATION)
    groups = {"objects and backgrounds": ~abstract, "styles and relations": abstract | (kinds_ == OTHER)}
    rows: list[dict[str, Cell]] = []
    for name in MEASURES:
        totals = np.array([word.totals[name] for word in words])
        row: dict[str, Cell] = {"measure": name}
        for title, rows_of in groups.items():
            areas = auroc(totals[rows_of], kinds_[rows_of] != OTHER, weights[:, rows_of])
            row[f"AUROC, {title}"] = _cell(areas)
        row["correlation with surprisal"] = _cell(weighted_pearson(totals, grammar, weights))
        rows.append(row)
    notes = (
        "AUROC: probability that a word of those kinds gets a higher value than one of the other words, over all "
        "images; 0.5 is chance. Correlation: with the word's surprisal under the grammar.",
        bench.note,
    )
    return Table("informative", "Informative words against other words", rows, notes)


def where(bench: WordBench) -> Table:
    """Where the maps of the different kinds of words lie."""
    rows: list[dict[str, Cell]] = []
    for kind in (RELATION, STYLE, OTHER, OBJECT):
        words = [word for word in bench.words if word.kind == kind]
        row: dict[str, Cell] = {"word": kind}
        for name in MEASURES:
            row[name] = with_interval(bench.mean(words, [word.lift[name] for word in words]).estimate)
        rows.append(row)
    notes = (
        "Density of a word's map on the caption's objects over that on the whole image; 1 for a flat map. A relation "
        "shows in the positions of its two objects, a style in the whole image.",
        bench.note,
    )
    return Table("where", "Density of words' maps on objects", rows, notes)


def _cell(figures: Floats) -> str:
    return with_interval(Resampled(float(figures[0]), figures[1:]).estimate)


EVALUATION = Evaluation(
    name="words",
    title="Informative words",
    description=__doc__,
    settings=WordSettings(),
    quick=QUICK,
    bench=lambda subject, settings: WordBench(subject.model, settings),
    parts=(kinds, informative, where),
)
