"""The concept table of one SAE: its latents by number, by word, by similarity of meaning and of direction.

A latent's number is only meaningful for its hookpoint, branch and time; across SAEs, concepts are compared by label.
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
"""Number of labels suggested when a search finds nothing."""


class Example(NamedTuple):
    """An image in which a concept is strongly active."""

    gallery_index: int
    """Number of the image in the gallery."""
    map: Float32s
    """[h, w] largest value of the concept over the steps, at the hookpoint's resolution."""
    peak: float
    """Maximum of the map."""
    gallery: Gallery
    """The gallery that the image is in."""

    @property
    def image(self) -> Image.Image:
        """The image, RGB."""
        return self.gallery.image(self.gallery_index)

    @property
    def entry(self) -> GalleryImage:
        """Prompt and seed of the image."""
        return self.gallery.entries[self.gallery_index]


class Concept(NamedTuple):
    """One latent with its label and scores."""

    number: int
    """Index of the latent."""
    label: str
    """Its label; empty if it has none."""
    kind: Kind
    """Kind of the concept."""
    scores: Scores
    """The measurements behind label and kind."""
    gallery: tuple[Example, ...]
    """Example images, strongest first; none if it never fired."""


class Hit(NamedTuple):
    """A concept found by a search."""

    number: int
    label: str
    kind: Kind
    score: float
    """Held-out IoU; for a style, held-out AUROC."""
    similarity: float
    """1 if the word itself matched, otherwise the cosine of the word and the label."""


@dataclass(frozen=True)
class Search:
    """Result of a search; as a sequence, its hits."""

    hits: tuple[Hit, ...]
    """Best first."""
    nearest: tuple[str, ...]
    """The nearest labels if there are no hits."""

    def __len__(self) -> int:
        return len(self.hits)

    def __iter__(self) -> Iterator[Hit]:
        return iter(self.hits)


class Neighbour(NamedTuple):
    """A concept whose decoder direction is close to another's."""

    number: int
    label: str
    kind: Kind
    cosine: float
    """Cosine of the two decoder rows."""


class Evolution(NamedTuple):
    """The activation of a concept in one image over the S recorded steps."""

    steps: tuple[int, ...]
    """[S] sampler steps, ascending."""
    mean: Float32s
    """[S] mean value over all positions."""
    peak: Float32s
    """[S] largest value."""
    share: Float32s
    """[S] share of positions where it is active."""


class ConceptTable:
    """The concepts of one SAE."""

    sae_id: SaeId
    """Hookpoint, branch and time of the SAE."""
    frame: Any
    """A pandas frame, one row per latent: latent, label, kind, and the fields of `Scores`."""
    info: TableInfo
    """What the table was made from, and how."""

    def __init__(self, sae_id: SaeId, frame: Any, info: TableInfo, directions: Tensor, fetch: Fetch) -> None:
        """`directions` [d_sae, d_in] are the rows of the SAE's decoder; `fetch` finds files of the collection."""
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
        """All labels in the table, sorted."""
        return tuple(sorted(self._numbers))

    def effect(self, word: str) -> Float32s | None:
        """[d_sae] effect of a style word on each latent (`training.labels.effects`); None if it was not measured."""
        words = self.info.effect_words
        return self._effects[:, words.index(word)] if word in words else None

    @cached_property
    def _effects(self) -> Float32s:
        """[d_sae, effect words] the effects of all style words."""
        return np.stack([np.asarray(own, dtype=np.float32) for own in self.frame[EFFECTS]])

    @cached_property
    def counts(self) -> Counts:
        """Co-occurrence of latents and classes."""
        counts = read_counts(self._file(COUNTS))
        n, n_classes = len(self), len(self.class_names)
        for name, value, shape in zip(Counts._fields, counts, ((n, n_classes), (n,), (n_classes,), ()), strict=True):
            if value.shape != shape or not value.isfinite().all():
                raise ArtifactError(
                    f"{self._file(COUNTS)}: {name} is {list(value.shape)}, or not finite; the table asks for "
                    f"{list(shape)}. {REMEDY}"
                )
        return counts

    @cached_property
    def gallery(self) -> Gallery:
        """The gallery that the examples of all tables share."""
        return Gallery(self._fetch)

    @cached_property
    def _examples(self) -> Examples:
        examples = read_examples(self._file(EXAMPLES))
        images, maps, peaks = examples
        fit = images.ndim == 2 and len(images) == len(self) and maps.ndim == 4
        fit = fit and images.shape == maps.shape[:2] == peaks.shape
        if not fit or int(images.max()) >= len(self.gallery) or not peaks.isfinite().all():
            raise ArtifactError(f"{self._file(EXAMPLES)} belongs to another table or gallery, or is damaged. {REMEDY}")
        return examples

    def __len__(self) -> int:
        return len(self.frame)

    def __getitem__(self, number: int) -> Concept:
        row = self.frame.iloc[self.check(number)]
        runner_ups = tuple(Candidate(str(one["label"]), one["iou"], one["held_out_iou"]) for one in row["runner_ups"])
        plain = {name: float(value) for name, value in row.items() if isinstance(value, np.floating | float)}
        scores = Scores(row["best_class"], style=row["style"], runner_ups=runner_ups, **plain)
        return Concept(number, row["label"], row["kind"], scores, self._gallery_of(number))

    def check(self, number: int) -> int:
        """The number, if there is such a concept.

        Raises:
            IndexError: There is none; the message gives the valid range.
        """
        if not 0 <= operator.index(number) < len(self):
            raise IndexError(f"There is no concept {number}: {self.sae_id.path} has the numbers 0 to {len(self) - 1}.")
        return operator.index(number)

    def numbers(self, label: str) -> tuple[int, ...]:
        """Numbers of the concepts with a label, best score first."""
        hits = [self._hit(number) for number in self._numbers.get(label, ())]
        return tuple(hit.number for hit in sorted(hits, key=_best_first))

    def search(self, query: str, model: Diffuser | None = None, limit: int | None = None) -> Search:
        """Concepts whose label contains a word or, with a model, is similar to it; otherwise those that start with it.

        Args:
            query: One or a few words; case does not matter.
            model: The model whose text encoder measures similarity; words that it does not know match literally only.
            limit: The most hits to return; None for all.

        Raises:
            ValueError: The query is blank.
        """
        wanted = " ".join(query.casefold().split())
        if not wanted:
            raise ValueError("The search is blank. Type a word: the name of an object, a background or a style.")
        similarities = self._similarities(wanted, model)
        found = {label: 1.0 for label in self._numbers if wanted in self._names(label)}
        found = {label: cosine for label, cosine in similarities.items() if cosine >= SIMILARITY_THRESHOLD} | found
        if not found:
            found = {
                label: 1.0 for label in self._numbers if any(name.startswith(wanted) for name in self._names(label))
            }
        hits = sorted(
            (self._hit(n, similarity) for label, similarity in found.items() for n in self._numbers[label]),
            key=_best_first,
        )
        return Search(tuple(hits[:limit]), () if hits else self._nearest(wanted, similarities))

    def neighbours(self, number: int, limit: int = 8) -> tuple[Neighbour, ...]:
        """The concepts whose decoder rows have the highest cosine with that of a concept."""
        cosines = self._directions @ self._directions[self.check(number)]
        order = [n for n in cosines.argsort(descending=True).tolist() if n != number][:limit]
        return tuple(Neighbour(n, *self._label_and_kind(n), float(cosines[n])) for n in order)

    def counterparts(self, number: int, other: "ConceptTable", limit: int = 8) -> tuple[Hit, ...]:
        """The concepts with the same label in the table of another SAE, best score first."""
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
        """A label, its single words, and its synonyms, in lower case."""
        names = {name.casefold() for name in (label, *self.info.words.get(label, ()))}
        return names | {word for name in names for word in name.split()}

    def _similarities(self, wanted: str, model: Diffuser | None) -> dict[str, float]:
        """Cosine of the query with each label; empty without a model, or if it does not know the query."""
        if model is None:
            return {}
        if model not in self._label_embeddings:
            self._label_embeddings[model] = LabelEmbeddings(model, self.labels)
        return self._label_embeddings[model].similarities(model, wanted)

    def _nearest(self, wanted: str, similarities: Mapping[str, float]) -> tuple[str, ...]:
        if similarities:
            return tuple(sorted(similarities, key=lambda label: -similarities[label])[:N_NEAREST])
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
        source: The collection of SAEs: a built-in model's name, a local folder, or `owner/name[@revision]` on the Hub.
            Files are downloaded when they are first used.
        hookpoint: Dotted module name of the block; None: the bottleneck's.
        branch: `cond` or `uncond`.
        t: Normalised time of the sampler's step, or `all` for the SAE shared by every step.

    Raises:
        ArtifactError: There is no such SAE, no table of it, or the table was made from other weights.
    """
    collection = find_collection(source)
    sae_id = SaeId(collection.default_hookpoint if hookpoint is None else hookpoint, branch, t)
    sae = load_sae(collection, *sae_id)
    path = collection.tables.find(f"{sae_id.path}/{TABLE}")
    if path is None:
        raise ArtifactError(f"There is no concept table of {sae_id.path} in {collection.name}. {REMEDY}")
    frame, info = read_table(path)
    folder = collection.files.fetch(f"{collection.folder_of(sae_id)}/{CONFIG}".removeprefix("/")).parent
    if len(frame) != sae.cfg.d_sae or info.weights_sha256 != weights_sha256(folder):
        raise ArtifactError(
            f"The concept table of {sae_id.path} in {collection.name} was made for another SAE: the weights have "
            f"changed since then. {REMEDY}"
        )
    return ConceptTable(sae_id, frame, info, sae.W_dec.detach(), collection.tables.fetch)


def activation_map(code: Code, number: int, height: int, width: int) -> Tensor:
    """[height, width] value of a latent at each position, from the code of one image; 0 where it is not active."""
    values = torch.where(code.indices == number, code.values, 0)
    return values.sum(1).view(height, width)


def evolution(codes: Mapping[int, Code], number: int) -> Evolution:
    """The activation of a latent in one image over the steps, from the image's codes by sampler step."""
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
