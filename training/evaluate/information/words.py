"""What the words of captions tell that are no nouns: relations, styles, and words that tell nothing.

Mutual information, conditional mutual information and cross-attention of every word of held-out painted scenes, beside
the bits that the grammar lets it have. Published as a claim about photographs, without figures: that information finds
abstract words better than attention does (Kong et al. 2024, arXiv 2310.07972).
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
from training.evaluate.common.maps import attention_at
from training.evaluate.common.masks import Resampled, repeats, resampled_words, weighted_pearson
from training.evaluate.common.proportions import with_interval
from training.evaluate.picturebook import NO_TARGET
from training.picturebook.world.captions import Caption, log2_word_given_rest
from training.picturebook.world.scenes import CELL, Scene, caption_of, make_scene, paint
from training.picturebook.world.world import NOUN_INDEX, NOUNS, OBJECT_INDEX

CMI, MI, ATTENTION = "CMI", "MI", "attention"
MEASURES = (CMI, MI, ATTENTION)
GIVEN: Mapping[str, Given] = {CMI: "rest", MI: "nothing"}
THING, PLACE, STYLE, RELATION, OTHER = "object", "background", "style", "relation", "other"
KINDS = (THING, PLACE, STYLE, RELATION, OTHER)
"""The other words follow from the rest, or tell nothing of a picture: articles, prepositions, `and`, `of`, `style`."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """How much is measured."""

    n_scenes: int = 64
    """Held-out true scenes."""
    n_points: int = 8
    """Noise samples in a replicate."""
    n_replicates: int = 3
    """Replicates a scene, and as many noise samples in all for attention."""
    batch_size: int = 32
    """Most latents in a U-Net call."""
    n_bootstrap: int = 2000
    """Resamples of the scenes for each interval."""


QUICK = Settings(n_scenes=4, n_points=4, n_replicates=2)
"""Shows that it works; its figures mean little."""


class Told(NamedTuple):
    """A word of a picture, and what each measure makes of it."""

    image: int
    """Number of the picture."""
    kind: str
    """One of `KINDS`."""
    grammar: float
    """Bits that it can tell given the rest."""
    totals: dict[str, float]
    """Bits, or the share of attention, by measure."""
    lift: dict[str, float]
    """How much denser its map is on the caption's things than on the whole picture, by measure."""


class Bench:
    """The scenes and their words: measured once, when first asked for."""

    def __init__(self, model: Diffuser, settings: Settings) -> None:
        self._model, self.settings = model, settings

    @cached_property
    def words(self) -> list[Told]:
        """The words of all pictures."""
        found: list[Told] = []
        for number in range(self.settings.n_scenes):
            if number % 8 == 0:
                log.info("words: scene %d of %d", number, self.settings.n_scenes)
            found += measure(self._model, number, make_scene(number, "test"), self.settings)
        return found

    def mean(self, words: Sequence[Told], values: Sequence[float]) -> Resampled:
        """The mean of a figure a word, drawn anew by pictures."""
        found: list[list[float]] = [[] for _ in range(self.settings.n_scenes)]
        for word, value in zip(words, values, strict=True):
            found[word.image].append(value)
        return resampled_words(found, self.settings.n_bootstrap)

    def weights(self, words: Sequence[Told]) -> Floats:
        """[1 + n, words] how often each counts: once, and in pictures drawn anew."""
        drawn = repeats([word.image for word in words], self.settings.n_scenes, self.settings.n_bootstrap)
        return np.concatenate([np.ones((1, len(words))), drawn])

    @property
    def note(self) -> str:
        """How it was measured."""
        settings = self.settings
        return (
            f"All words of {settings.n_scenes} held-out painted scenes; {settings.n_replicates} replicates of "
            f"{settings.n_points} noises each, and as many noises for attention (mean over all blocks, flat noise "
            "schedule; its share is that of each position's attention). In brackets: 95 % intervals over pictures."
        )


def measure(model: Diffuser, number: int, scene: Scene, settings: Settings) -> list[Told]:
    """One scene's words."""
    caption, painting = caption_of(scene), paint(scene)
    prompt, words = caption.text, distinct_words(caption.text)
    x = model.encode(Image.fromarray(painting.image))
    seed, n = scene.seed[-1], settings.n_points * settings.n_replicates
    ours = replace(sampler_for(model, None), n_points=settings.n_points, min_replicates=settings.n_replicates)
    bits = {
        name: core.attribute(model, x, prompt, given=given, rel_error=NO_TARGET, sampler=ours, seed=seed).maps
        for name, given in GIVEN.items()
    }
    seen = attention_at(model, x, prompt, words, Sampler(n_points=n), seed, settings.batch_size)
    shares = seen.double().numpy() / (n * len(cross_attention_blocks(model.unet)))
    maps = {**bits, ATTENTION: shares}
    objects = share_of_objects(np.asarray(painting.labels), caption)
    return [
        Told(
            number,
            kind_of(caption, word),
            -log2_word_given_rest(caption, word),
            {name: float(of[i].mean() if name == ATTENTION else of[i].sum()) for name, of in maps.items()},
            {name: lift(of[i], objects) for name, of in maps.items()},
        )
        for i, word in enumerate(words)
    ]


def kind_of(caption: Caption, word: str) -> str:
    """Which slot of the caption chose the word."""
    if word in caption.words:
        return THING
    if word == caption.background_word:
        return PLACE
    if caption.style_named and word == caption.story.style:
        return STYLE
    return RELATION if word == caption.story.relation else OTHER


def share_of_objects(labels: Ints, caption: Caption) -> Floats:
    """[h, w] share of each latent cell's pixels that show one of the caption's things."""
    classes = [OBJECT_INDEX[name] for noun in caption.story.nouns for name in NOUNS[NOUN_INDEX[noun]].objects]
    rows, columns = (n // CELL for n in labels.shape)
    shown: Floats = np.isin(labels, classes).reshape(rows, CELL, columns, CELL).mean((1, 3))
    return shown


def lift(map_: Floats, area: Floats) -> float:
    """How many times denser a map [h, w] is on an area, given as shares of cells, than on the whole."""
    whole = map_.sum() * area.mean()
    return float((map_ * area).sum() / whole) if whole > 0 else np.nan


def auroc(scores: Floats, positive: Bools, weights: Floats) -> Floats:
    """[n] how often a positive scores above a negative (half for a tie), under each row of weights [n, m]."""
    above, below = scores[positive], scores[~positive]
    wins = (above[:, None] > below) + (above[:, None] == below) / 2
    of_above, of_below = weights[:, positive], weights[:, ~positive]
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(((of_above @ wins) * of_below).sum(1) / (of_above.sum(1) * of_below.sum(1)))


def kinds(bench: Bench) -> Table:
    """What each kind of word tells by each measure."""
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
        "Grammar: the mean surprisal of a word given the rest of the caption, in bits: the most that it can tell a "
        "picture, on average. Other words can tell none: what MI and attention give them is not theirs.",
        bench.note,
    )
    return Table("kinds", "What words tell, by kind of word", rows, notes)


def statement(bench: Bench) -> Table:
    """How well each measure tells words that say something from words that do not."""
    words = bench.words
    kinds_ = np.array([word.kind for word in words])
    grammar = np.array([word.grammar for word in words])
    weights = bench.weights(words)
    abstract = (kinds_ == STYLE) | (kinds_ == RELATION)
    asked = {"things and places": ~abstract, "styles and relations": abstract | (kinds_ == OTHER)}
    rows: list[dict[str, Cell]] = []
    for name in MEASURES:
        totals = np.array([word.totals[name] for word in words])
        row: dict[str, Cell] = {"measure": name}
        for told, among in asked.items():
            row[f"{told} above other words"] = _cell(auroc(totals[among], kinds_[among] != OTHER, weights[:, among]))
        row["correlation with the grammar's bits"] = _cell(weighted_pearson(totals, grammar, weights))
        rows.append(row)
    notes = (
        "Above: how often a word of those kinds gets more than another word, of whatever picture; 0.5 is chance.",
        bench.note,
    )
    return Table("statement", "Words that say something, told from words that do not", rows, notes)


def where(bench: Bench) -> Table:
    """Where the maps of words that are no nouns lie."""
    rows: list[dict[str, Cell]] = []
    for kind in (RELATION, STYLE, OTHER, THING):
        words = [word for word in bench.words if word.kind == kind]
        row: dict[str, Cell] = {"word": kind}
        for name in MEASURES:
            row[name] = with_interval(bench.mean(words, [word.lift[name] for word in words]).estimate)
        rows.append(row)
    notes = (
        "How many times denser a word's map is on the caption's things than on the whole picture: 1 is a flat map. A "
        "relation is told by where its two things are; a style by the whole picture.",
        bench.note,
    )
    return Table("where", "Maps of words on the things of the picture", rows, notes)


PARTS = (kinds, statement, where)
"""In this order."""


def _cell(figures: Floats) -> str:
    return with_interval(Resampled(float(figures[0]), figures[1:]).estimate)
