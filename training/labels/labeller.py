"""The work of `python -m training labels`: generate images, count, and write tables, counts and examples.

Image n is generated from prompt n and noise seeded by (seed, n). Labels are chosen on even images and validated on odd
ones. Batch b starts at image b x batch, and its permutations are seeded by (seed, b). So the counts depend on the
images alone, not on which process generated them or on interruptions.
"""

import json
import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core.artifacts import MANIFEST
from core.concepts.gallery import GalleryImage, write_gallery
from core.concepts.io import (
    COUNTS,
    EXAMPLES,
    KINDS,
    Counts,
    TableInfo,
    save_table,
    save_tensors,
    weights_sha256,
)
from core.diffusion.diffuser import Diffuser
from core.diffusion.sampling import is_guided
from core.diffusion.text import distinct_words
from core.sae.autoencoder import SaeId
from core.sae.collection import find_collection, load_sae, mark_labelled
from core.segmentation.grids import cell_counts, majority
from core.segmentation.semantic import Segmenter
from training.common.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from training.labels.effects import pairs_of, word_effects
from training.labels.examples import ExampleKeeper, select_gallery
from training.labels.naming import ImageAttributes, LabelVocabulary, name_latents
from training.labels.sampling import Batch, class_areas, label_maps, sample_and_encode, steps_of
from training.labels.tally import FiringStatistics, Shape
from training.prompts.sources import Prompts

_NOT_COUNTED = ("gallery", "gallery_side", "backgrounds", "styles", "words", "effect_images")
"""Settings that do not change the counts, only what is made of them."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LabelConfig:
    """Settings of the labelling."""

    images: int = 2000
    """Images to generate, rounded up to whole batches. Labels are chosen on half of them, the others are held out."""
    batch: int = 32
    """Images generated together, whose masks are permuted for the chance level: even, at least 4."""
    permutations: int = 20
    """Permutations. Fewer than 20 give no p-value small enough for a false discovery rate of 5 %."""
    shared_steps: int = 5
    """Evenly spread sampler steps at which SAEs for all times are read."""
    gallery: int = 256
    """Images in the gallery that the examples of all SAEs share."""
    gallery_side: int = 128
    """Side of the gallery's images in pixels."""
    seed: int = 0
    """Seed of the images' noise and of the permutations."""
    backgrounds: tuple[str, ...] = ()
    """Classes that are backgrounds; all others are objects."""
    styles: tuple[str, ...] = ()
    """Words that name a style."""
    words: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Synonyms by class, for searching."""
    effect_images: int = 16
    """Images of each style on which the effect of its word is measured."""

    def __post_init__(self) -> None:
        if self.batch < 4 or self.batch % 2:
            raise ValueError(f"batch has to be even and at least 4, so that masks can be permuted, not {self.batch}.")
        if min(self.images, self.permutations - 2, self.shared_steps, self.gallery) < 1:
            raise ValueError("images, shared_steps and gallery have to be at least 1, and permutations at least 3.")

    @property
    def n_batches(self) -> int:
        """Number of batches."""
        return -(-self.images // self.batch)


@dataclass(frozen=True)
class LabelRun:
    """Where a run keeps its checkpoints, and its share of the work."""

    folder: Path
    """Folder of the checkpoints of all processes."""
    checkpoint_interval_s: float = 120
    """Least seconds between checkpoints."""
    rank: int = 0
    """Which process this is; 0 is the main one, which writes."""
    world: int = 1
    """Number of processes that share the images and the folder."""

    def folder_of(self, rank: int) -> Path:
        """Folder of one process's checkpoints."""
        return self.folder / f"{rank}-of-{self.world}"


class State:
    """The counts so far: statistics of each SAE, and attributes of the images, in the same order."""

    def __init__(self, tallies: Mapping[SaeId, FiringStatistics], numbers: Tensor, areas: Tensor) -> None:
        self.tallies = dict(tallies)
        self.numbers = numbers
        """[N] int64 numbers of the images."""
        self.areas = areas
        """[N, K] share of the image that each class covers."""

    @classmethod
    def of(cls, ids: Sequence[SaeId], tensors: Mapping[str, Tensor]) -> "State":
        """The state with these `tensors`."""
        tallies = {}
        for sae_id in ids:
            start = f"{sae_id.path}:"
            tallies[sae_id] = FiringStatistics.of(
                {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}
            )
        return cls(tallies, tensors["numbers"], tensors["areas"])

    @classmethod
    def merged(cls, states: Sequence["State"]) -> "State":
        """The states of several processes, merged into the first, in the order of the images."""
        first, *others = states
        for other in others:
            for sae_id, tally in first.tallies.items():
                tally.merge(other.tallies[sae_id])
            first.take(other.numbers, other.areas)
        order = first.numbers.argsort()
        first.numbers, first.areas = first.numbers[order], first.areas[order]
        for tally in first.tallies.values():
            tally.means = tally.means[order]
        return first

    def take(self, numbers: Tensor, areas: Tensor) -> None:
        """Append the attributes of some images."""
        self.numbers, self.areas = torch.cat([self.numbers, numbers]), torch.cat([self.areas, areas])

    def tensors(self) -> dict[str, Tensor]:
        """All tensors, for a file."""
        tensors = {"numbers": self.numbers, "areas": self.areas}
        for sae_id, tally in self.tallies.items():
            tensors |= {f"{sae_id.path}:{name}": value for name, value in tally.tensors().items()}
        return tensors


class Labeller:
    """Generates images, counts the activations of a collection of SAEs, and writes their concept tables."""

    def __init__(
        self, config: LabelConfig, root: Path, model: Diffuser, segmenter: Segmenter, prompts: Prompts
    ) -> None:
        """Load the SAEs.

        Raises:
            ValueError: There are none, or some of a branch that the model does not use.
        """
        self._config, self._root, self._model = config, root, model
        self._segmenter, self._prompts, self._classes = segmenter, prompts, segmenter.class_names()
        self._collection = find_collection(root)
        ids = self._collection.ids
        if not ids:
            raise ValueError(f"There is no SAE in {root}. Train some with `python -m training sae`.")
        if not is_guided(model.spec.guidance_scale) and any(sae_id.branch == "uncond" for sae_id in ids):
            raise ValueError(f"{model.spec.name} is sampled without guidance: SAEs of branch uncond have no input.")
        self._saes = {sae_id: load_sae(self._collection, *sae_id, device=model.device) for sae_id in ids}
        n_steps = model.spec.num_inference_steps
        self._steps = {sae_id: steps_of(sae_id, n_steps, config.shared_steps) for sae_id in ids}

    def recipe(self, depends: Mapping[str, Any]) -> dict[str, Any]:
        """Everything that the counts depend on, as JSON values."""
        counted = {name: value for name, value in asdict(self._config).items() if name not in _NOT_COUNTED}
        recipe = {
            **counted,
            **depends,
            "classes": self._classes,
            "saes": {
                sae_id.path: weights_sha256(self._root / self._collection.folder_of(sae_id)) for sae_id in self._saes
            },
        }
        plain: dict[str, Any] = json.loads(json.dumps(recipe))
        return plain

    def count(self, run: LabelRun, recipe: Mapping[str, Any]) -> None:
        """Generate this process's share of the images and count, from its last checkpoint on."""
        batches = range(run.rank, self._config.n_batches, run.world)
        n_batches = self._config.n_batches
        if run.world > n_batches:  # every process finds it, and none waits for another
            raise ValueError(
                f"{run.world} processes cannot share {n_batches} batches. Start at most {n_batches}, generate more "
                f"images, or lower batch."
            )
        folder, own = run.folder_of(run.rank), {**recipe, "rank": run.rank}
        found, saved = load_checkpoint(folder, own), time.monotonic()
        state = None if found is None else State.of(list(self._saes), found.tensors["state"])
        done = 0 if found is None else found.step
        for at, number in enumerate(batches[done:], done + 1):
            state = self._add(state, number)
            if at == len(batches) or time.monotonic() - saved >= run.checkpoint_interval_s:
                save_checkpoint(folder, Checkpoint(at, own, {"state": state.tensors()}))
                saved = time.monotonic()
                log.info("%d of %d batches of %d images", at, len(batches), self._config.batch)

    def counted(self, run: LabelRun, rank: int, recipe: Mapping[str, Any]) -> State:
        """What a process has counted.

        Raises:
            ValueError: It has not finished, or it wrote its counts elsewhere.
        """
        found = load_checkpoint(run.folder_of(rank), {**recipe, "rank": rank})
        if found is None or found.step < len(range(rank, self._config.n_batches, run.world)):
            raise ValueError(
                f"The counts of process {rank} are not in {run.folder}. Processes on several machines need one run "
                f"folder that all of them see."
            )
        return State.of(list(self._saes), found.tensors["state"])

    def write(self, state: State, recipe: Mapping[str, Any]) -> None:
        """Write the table, counts and examples of every SAE, and the gallery."""
        config = self._config
        prompts = [distinct_words(self._prompts.prompt(number)) for number in state.numbers.tolist()]
        attributes = ImageAttributes(
            split=(state.numbers % 2).numpy(),
            areas=state.areas.double().numpy(),
            styles=np.array([[style in words for style in config.styles] for words in prompts], dtype=bool),
        )
        names = LabelVocabulary(self._classes, frozenset(config.backgrounds), config.styles)
        words = {label: other for label, other in config.words.items() if label in (*self._classes, *config.styles)}
        effects = self._effects()
        (self._root / MANIFEST).unlink(missing_ok=True)  # it describes the old tables
        mark_labelled(self._root, False)
        for sae_id, tally in state.tallies.items():
            folder = self._root / sae_id.path
            folder.mkdir(parents=True, exist_ok=True)  # an SAE of another library lies elsewhere
            rows = name_latents(tally, attributes, names)
            made = {name: value for name, value in recipe.items() if name not in ("classes", "saes")}
            made_with = {**made, **sae_id._asdict(), "steps": self._steps[sae_id], "n_images": len(prompts)}
            own = [effect[sae_id] for effect in effects.values() if sae_id in effect]
            effect_words = tuple(effects) if own else ()
            info = TableInfo(recipe["saes"][sae_id.path], self._classes, words, made_with, effect_words)
            save_table(folder, rows, info, torch.stack(own) if own else None)
            save_tensors(folder / COUNTS, counts_of(tally))
            kinds = Counter(row.kind for row in rows)
            log.info("%s: %s", sae_id.path, ", ".join(f"{kinds[kind]} {kind}" for kind in KINDS))
        self._write_examples(state)
        mark_labelled(self._root, True)

    def _effects(self) -> dict[str, dict[SaeId, Tensor]]:
        """The effect of each style word on the SAEs of branch cond, for words that occur in the prompts."""
        saes = {sae_id: sae for sae_id, sae in self._saes.items() if sae_id.branch == "cond"}
        effects = {}
        for word in self._config.styles if saes else ():
            pairs = pairs_of(self._prompts, word, self._config.effect_images, self._config.images)
            if pairs:
                seeds = [self._seed(pair.number) for pair in pairs]
                steps = {sae_id: self._steps[sae_id] for sae_id in saes}
                effects[word] = word_effects(self._model, saes, steps, pairs, seeds)
                log.info("effect of %r: measured on %d images", word, len(pairs))
        return effects

    def _add(self, state: State | None, number: int) -> State:
        """Generate a batch and count it."""
        images = range(number * self._config.batch, (number + 1) * self._config.batch)
        batch = self._sample(images)
        n_classes = len(self._classes)
        if state is None:
            tallies = {sae_id: FiringStatistics(self._shape(sae_id, batch)) for sae_id in self._saes}
            state = State(tallies, torch.zeros(0, dtype=torch.int64), torch.zeros(0, n_classes))
        maps = label_maps(self._segmenter, batch.images)
        splits = torch.tensor(images) % 2
        order = pairings(splits, self._config.permutations, np.random.default_rng([self._config.seed, number]))
        sizes = set(batch.sizes.values())
        reduced = {size: majority(cell_counts(maps, n_classes, *size)).flatten(1)[order] for size in sizes}
        for sae_id, tally in state.tallies.items():
            tally.add(batch.codes_by_step[sae_id], reduced[batch.sizes[sae_id.hookpoint]], splits)
        state.take(torch.tensor(images), class_areas(maps, n_classes))
        return state

    def _shape(self, sae_id: SaeId, batch: Batch) -> Shape:
        d_sae, n_steps = self._saes[sae_id].cfg.d_sae, len(self._steps[sae_id])
        return Shape(d_sae, len(self._classes), self._config.permutations, n_steps, *batch.sizes[sae_id.hookpoint])

    def _sample(self, images: Sequence[int]) -> Batch:
        prompts = [self._prompts.prompt(number) for number in images]
        seeds = [self._seed(number) for number in images]
        return sample_and_encode(self._model, self._saes, self._steps, prompts, seeds)

    def _seed(self, image: int) -> int:
        """Seed of an image's noise: 32 bits, short enough to type."""
        return int(np.random.SeedSequence([self._config.seed, image]).generate_state(1)[0])

    def _write_examples(self, state: State) -> None:
        """Generate the gallery's images again, and write the examples of each latent."""
        rows = select_gallery([tally.means for tally in state.tallies.values()], self._config.gallery)
        numbers = state.numbers[rows].tolist()
        keepers = {
            sae_id: ExampleKeeper(self._saes[sae_id].cfg.d_sae, *tally.size.tolist())
            for sae_id, tally in state.tallies.items()
        }
        images = []
        for first in range(0, len(numbers), self._config.batch):
            batch = self._sample(numbers[first : first + self._config.batch])
            images += batch.images
            for sae_id, keeper in keepers.items():
                keeper.add(range(first, len(images)), batch.codes_by_step[sae_id])
        entries = [GalleryImage(self._prompts.prompt(number), self._seed(number)) for number in numbers]
        write_gallery(self._root, images, entries, self._config.gallery_side)
        for sae_id, keeper in keepers.items():
            save_tensors(self._root / sae_id.path / EXAMPLES, keeper.examples())


def counts_of(tally: FiringStatistics) -> Counts:
    """Co-occurrence of latents and classes on the first split."""
    return Counts(
        intersections=tally.hits[:, :, 0, 0].sum(0).float(),
        active=tally.area[:, :, 0].sum(0).float(),
        cells=tally.cells[0].float(),
        n_cells=tally.n_cells[0].float(),
    )


def pairings(splits: Tensor, n: int, rng: np.random.Generator) -> Tensor:
    """[n + 1, B] the image whose masks each image is paired with: first its own, then others of its split."""
    order = torch.arange(len(splits)).repeat(n + 1, 1)
    for row in order[1:]:
        for split in (0, 1):
            turn = torch.from_numpy(rng.permutation(np.flatnonzero(splits.numpy() == split)))
            row[turn] = turn.roll(1)
    return order
