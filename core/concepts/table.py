"""Concepts by number, by word, by meaning and by likeness: the table that names the latents of one SAE.

A concept's number means something for its hookpoint, branch and time alone; elsewhere a concept is met by its label.
"""

import difflib
import operator
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from core.arrays import Float32s
from core.concepts.gallery import Fetch, Gallery, GalleryImage
from core.concepts.io import (
    COUNTS,
    EFFECTS,
    EXAMPLES,
    REMEDY,
    TABLE,
    Candidate,
    Counts,
    Examples,
    Kind,
    Scores,
    TableInfo,
    read_counts,
    read_examples,
    read_table,
    weights_sha256,
)
from core.concepts.similarity import SIMILARITY_THRESHOLD, LabelEmbeddings
from core.diffusion.diffuser import Diffuser
from core.diffusion.sampling import Branch
from core.errors import ArtifactError
from core.sae.autoencoder import AllTimes, Code, SaeId
from core.sae.collection import Collection, find_collection, load_sae
from core.sae.io import CONFIG

N_NEAREST = 5
"""Labels offered when a search hits nothing."""


class Example(NamedTuple):
    """A picture in which a concept is strong."""

    gallery_index: int
    """Its number in the gallery."""
    map: Float32s
    """[h, w] the concept's largest value over the steps, at the hookpoint's resolution."""
    peak: float
    """Largest value of the map."""
    gallery: Gallery
    """Where the picture is."""

    @property
    def image(self) -> Image.Image:
        """The picture, RGB."""
        return self.gallery.image(self.gallery_index)

    @property
    def drawn(self) -> GalleryImage:
        """Its prompt and seed."""
        return self.gallery.drawn[self.gallery_index]


class Concept(NamedTuple):
    """One latent, what it is called, and how well."""

    number: int
    """Index of the latent."""
    label: str
    """Empty where nothing stands."""
    kind: Kind
    """What sort of concept it is."""
    scores: Scores
    """What was measured of it."""
    gallery: tuple[Example, ...]
    """Pictures that show it best, strongest first; none where it never fired."""


class Hit(NamedTuple):
    """A concept that a search found."""

    number: int
    label: str
    kind: Kind
    score: float
    """Its held-out IoU; a style's is its held-out AUROC."""
    similarity: float
    """1 where the word itself was found, else the cosine of the word and the label."""


@dataclass(frozen=True)
class Search:
    """What a search found; its length and its items are those of the hits."""

    hits: tuple[Hit, ...]
    """Best first."""
    nearest: tuple[str, ...]
    """Where nothing was hit: labels that come nearest."""

    def __len__(self) -> int:
        return len(self.hits)

    def __iter__(self) -> Iterator[Hit]:
        return iter(self.hits)


class Neighbour(NamedTuple):
    """A concept that writes in nearly the same direction as another."""

    number: int
    label: str
    kind: Kind
    cosine: float
    """Of the two decoder rows."""


class Evolution(NamedTuple):
    """A concept in one picture, over the S steps that were recorded."""

    steps: tuple[int, ...]
    """[S] sampler steps, in order."""
    mean: Float32s
    """[S] mean value over all positions."""
    peak: Float32s
    """[S] largest value."""
    share: Float32s
    """[S] share of the positions where it is active."""


class ConceptTable:
    """The concepts of one SAE."""

    sae_id: SaeId
    """What the SAE reads."""
    frame: Any
    """pandas frame, a row a latent: latent, label, kind, and the fields of `Scores`."""
    info: TableInfo
    """What the table was made from."""

    def __init__(self, sae_id: SaeId, frame: Any, info: TableInfo, directions: Tensor, fetch: Fetch) -> None:
        """`directions` are the SAE's decoder rows [d_sae, d_in]; `fetch` finds files of the collection."""
        self.sae_id, self.frame, self.info = sae_id, frame, info
        self._directions, self._fetch = F.normalize(directions.float(), dim=1), fetch
        self._numbers: dict[str, list[int]] = {}
        for number, label in enumerate(frame["label"]):
            if label:
                self._numbers.setdefault(label, []).append(number)
        self._label_embeddings: weakref.WeakKeyDictionary[Diffuser, LabelEmbeddings] = weakref.WeakKeyDictionary()

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the K classes of the counts."""
        return self.info.class_names

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels that some concept has, sorted."""
        return tuple(sorted(self._numbers))

    def effect(self, word: str) -> Float32s | None:
        """[d_sae] what a word does to each latent at one moment of a picture; None where it was not measured."""
        words = self.info.effect_words
        return self._effects[:, words.index(word)] if word in words else None

    @cached_property
    def _effects(self) -> Float32s:
        """[d_sae, effect words]."""
        return np.stack([np.asarray(own, dtype=np.float32) for own in self.frame[EFFECTS]])

    @cached_property
    def counts(self) -> Counts:
        """How often latents and classes meet."""
        return read_counts(self._file(COUNTS))

    @cached_property
    def gallery(self) -> Gallery:
        """The pictures of all examples."""
        return Gallery(self._fetch)

    @cached_property
    def _examples(self) -> Examples:
        return read_examples(self._file(EXAMPLES))

    def __len__(self) -> int:
        return len(self.frame)

    def __getitem__(self, number: int) -> Concept:
        row = self.frame.iloc[self.check(number)]
        runner_ups = tuple(Candidate(str(one["label"]), one["iou"], one["held_out_iou"]) for one in row["runner_ups"])
        plain = {name: float(value) for name, value in row.items() if isinstance(value, np.floating | float)}
        scores = Scores(row["best_class"], style=row["style"], runner_ups=runner_ups, **plain)
        return Concept(number, row["label"], row["kind"], scores, self._gallery_of(number))

    def check(self, number: int) -> int:
        """The number of a concept.

        Raises:
            IndexError: There is none of this number; the message says which there are.
        """
        if not 0 <= operator.index(number) < len(self):
            raise IndexError(f"There is no concept {number}: {self.sae_id.path} has the numbers 0 to {len(self) - 1}.")
        return operator.index(number)

    def numbers(self, label: str) -> tuple[int, ...]:
        """The concepts of a label, the best scored first; none if no concept has it."""
        hits = [self._hit(number) for number in self._numbers.get(label, ())]
        return tuple(hit.number for hit in sorted(hits, key=_best_first))

    def search(self, query: str, model: Diffuser | None = None, limit: int | None = None) -> Search:
        """The concepts whose label is a word, or with a model means nearly the same; else those it is the start of.

        Args:
            query: A word or a few; case does not matter.
            model: Its text encoder says what is alike in meaning. A word that it does not know has none.
            limit: Most hits; None for all.

        Raises:
            ValueError: The query is blank.
        """
        wanted = " ".join(query.casefold().split())
        if not wanted:
            raise ValueError("The search is blank. Type a word, such as the name of a thing, a place or a style.")
        meanings = self._similarities(wanted, model)
        found = {label: 1.0 for label in self._numbers if wanted in self._names(label)}
        found = {label: cosine for label, cosine in meanings.items() if cosine >= SIMILARITY_THRESHOLD} | found
        if not found:
            found = {
                label: 1.0 for label in self._numbers if any(name.startswith(wanted) for name in self._names(label))
            }
        hits = sorted(
            (self._hit(n, alike) for label, alike in found.items() for n in self._numbers[label]), key=_best_first
        )
        return Search(tuple(hits[:limit]), () if hits else self._nearest(wanted, meanings))

    def neighbours(self, number: int, limit: int = 8) -> tuple[Neighbour, ...]:
        """The concepts whose decoder rows have the highest cosine with a concept's."""
        cosines = self._directions @ self._directions[self.check(number)]
        order = [n for n in cosines.argsort(descending=True).tolist() if n != number][:limit]
        return tuple(Neighbour(n, *self._label_and_kind(n), float(cosines[n])) for n in order)

    def counterparts(self, number: int, other: "ConceptTable", limit: int = 8) -> tuple[Hit, ...]:
        """The concepts of another table (another time, branch or hookpoint) with a concept's label, best first."""
        label, _ = self._label_and_kind(self.check(number))
        return tuple(other._hit(n) for n in other.numbers(label)[:limit])

    def _label_and_kind(self, number: int) -> tuple[str, Kind]:
        return self.frame["label"].iat[number], self.frame["kind"].iat[number]

    def _hit(self, number: int, similarity: float = 1.0) -> Hit:
        label, kind = self._label_and_kind(number)
        score = self.frame["style_auroc" if kind == "style" else "held_out_iou"].iat[number]
        return Hit(number, label, kind, float(score), similarity)

    def _gallery_of(self, number: int) -> tuple[Example, ...]:
        found = []
        for image, grid, peak in zip(*(values[number] for values in self._examples), strict=True):
            if image >= 0:
                values = grid.numpy().astype(np.float32) * (float(peak) / 255)
                found.append(Example(int(image), values, float(peak), self.gallery))
        return tuple(found)

    def _names(self, label: str) -> set[str]:
        """A label, its words, and other words for it, in lower case."""
        names = {name.casefold() for name in (label, *self.info.words.get(label, ()))}
        return names | {word for name in names for word in name.split()}

    def _similarities(self, wanted: str, model: Diffuser | None) -> dict[str, float]:
        """Cosine of the query with the labels that the model knows; none without a model that knows the query."""
        if model is None:
            return {}
        if model not in self._label_embeddings:
            self._label_embeddings[model] = LabelEmbeddings(model, self.labels)
        return self._label_embeddings[model].similarities(model, wanted)

    def _nearest(self, wanted: str, meanings: Mapping[str, float]) -> tuple[str, ...]:
        if meanings:
            return tuple(sorted(meanings, key=lambda label: -meanings[label])[:N_NEAREST])
        of = {name: label for label in self.labels for name in self._names(label)}
        near = difflib.get_close_matches(wanted, of, n=2 * N_NEAREST, cutoff=0)
        return tuple(dict.fromkeys(of[name] for name in near))[:N_NEAREST]

    def _file(self, name: str) -> Path:
        return self._fetch(f"{self.sae_id.path}/{name}")


def load_concepts(
    source: str | Path | Collection,
    hookpoint: str | None = None,
    branch: Branch = "cond",
    t: float | AllTimes = "all",
) -> ConceptTable:
    """The concept table of the SAE that reads these activations.

    Args:
        source: The SAEs' collection: a built-in model's name, a local folder, or `owner/name[@revision]` on the Hub,
            of which, and of the dataset with its tables, only what is looked at is fetched.
        hookpoint: Dotted module name of the block; None: the second of the collection, the bottleneck.
        branch: `cond` or `uncond`.
        t: Normalised time of the sampler's step, or `all` for the SAE shared by every step.

    Raises:
        ArtifactError: There is no such SAE, or no table of it, or the table was made for another SAE.
    """
    collection = find_collection(source)
    sae_id = SaeId(collection.default_hookpoint if hookpoint is None else hookpoint, branch, t)
    sae = load_sae(collection, *sae_id)
    path = collection.tables.find(f"{sae_id.path}/{TABLE}")
    if path is None:
        raise ArtifactError(f"There is no concept table of {sae_id.path} in {collection.name}. {REMEDY}")
    frame, info = read_table(path)
    folder = collection.files.fetch(f"{sae_id.path}/{CONFIG}").parent
    if len(frame) != sae.cfg.d_sae or info.weights_sha256 != weights_sha256(folder):
        raise ArtifactError(
            f"The concept table of {sae_id.path} in {collection.name} was made for another SAE: the weights have "
            f"changed since. {REMEDY}"
        )
    return ConceptTable(sae_id, frame, info, sae.W_dec.detach(), collection.tables.fetch)


def activation_map(code: Code, number: int, height: int, width: int) -> Tensor:
    """[height, width] a concept's value at each position, from the code of one picture; 0 where it is not active."""
    values = torch.where(code.indices == number, code.values, 0)
    return values.sum(1).view(height, width)


def evolution(codes: Mapping[int, Code], number: int) -> Evolution:
    """How a concept comes and goes in one picture, from the codes of its positions by sampler step."""
    steps = tuple(sorted(codes))
    by_step = [torch.where(codes[step].indices == number, codes[step].values, 0).sum(1).float().cpu() for step in steps]

    def each(figures: Sequence[Tensor]) -> Float32s:
        return np.array([float(figure) for figure in figures], dtype=np.float32)

    return Evolution(
        steps,
        each([values.mean() for values in by_step]),
        each([values.max() for values in by_step]),
        each([(values > 0).float().mean() for values in by_step]),
    )


def _best_first(hit: Hit) -> tuple[float, float, int]:
    return -hit.similarity, -hit.score, hit.number
