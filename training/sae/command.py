"""`python -m training sae`: train sparse autoencoders while the sampler runs, and save them as a collection.

Several GPUs: `accelerate launch -m training sae`; several CPU processes: `torchrun --nproc_per_node N -m training sae`.
"""

import argparse
import json
import logging
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from accelerate import Accelerator

import core
from core.artifacts import MANIFEST, find_model
from core.diffusion.diffuser import Diffuser
from core.diffusion.sampling import Branch
from core.folders import cache_folder, collections_folder, model_key
from core.sae.autoencoder import AllTimes, SaeId, SparseAutoencoder
from core.sae.collection import EMBEDDED, MADE_FOR, mark_labelled, write_index
from core.sae.io import save_sae
from core.sae.trained import files_digest, weights_digest
from core.spec import ModelSpec
from training.common.allocator import keep_freed_memory
from training.common.options import add_field_options, field_values
from training.common.recipe import read_recipe
from training.common.report import commit_now
from training.common.run_lock import locked
from training.prompts.sources import GRAMMAR, open_prompts
from training.sae.bank import TrainerConfig
from training.sae.stream import ActivationStream, StreamConfig
from training.sae.trainer import SaeRun, last_figures, make_accelerator, train_saes

RECIPE = Path(__file__).parents[1] / "recipes" / "picturebook_saes.json"
OPTIONS = ("checkpoint_interval_s", "trackers")
"""Fields of `SaeRun` that are options of the command."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SaeRecipe:
    """Everything that makes a collection of SAEs."""

    training: TrainerConfig
    """Shape and training of every SAE."""
    model: str = "picturebook"
    """Built-in name, folder, or `owner/name@revision`."""
    prompts: str = GRAMMAR
    """`grammar`, a file (`.txt`, `.csv`, `.tsv`, `.json`, `.jsonl`, `.parquet`), or a Hub dataset
    `owner/name[@revision]`."""
    caption_column: str = "caption"
    """Of a dataset: where its captions are."""
    where: tuple[str, ...] = ()
    """Of a dataset: conditions that a row has to fulfil, as `aesthetic >= 5.5`."""
    hookpoints: tuple[str, ...] = ()
    """Blocks; empty: the model's default hookpoints."""
    branches: tuple[Branch, ...] = get_args(Branch)
    """Branches of classifier-free guidance."""
    times: tuple[float | AllTimes, ...] = ("all",)
    """Normalised times, one SAE each; `all` is one SAE shared by every step."""
    stream: StreamConfig = field(default_factory=StreamConfig)
    """How images become batches."""
    save_dtype: Literal["float16", "float32"] = "float16"
    """Precision of the weights on disk."""

    @property
    def n_images(self) -> int:
        """Images sampled for the training: whole buffers, from the first prompt on."""
        n_batches = self.training.n_steps * self.training.gradient_accumulation_steps
        return -(-n_batches // self.stream.batches_per_buffer) * self.stream.images_per_buffer

    def sae_ids(self, model: Diffuser) -> tuple[SaeId, ...]:
        """The SAEs of the collection."""
        every = product(self.hookpoints or model.hookpoints, self.branches, self.times)
        return tuple(SaeId(hookpoint, branch, t) for hookpoint, branch, t in every)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--recipe", type=Path, default=RECIPE, help="recipe as JSON: model, SAEs, stream and training")
    parser.add_argument("--model", default=argparse.SUPPRESS, help="built-in name, folder or Hub id; else the recipe's")
    parser.add_argument(
        "--run-dir",
        type=Path,
        default=argparse.SUPPRESS,
        help=f"folder of the checkpoint; resumed; else one under {cache_folder('saes')} for the model and recipe",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=argparse.SUPPRESS,
        help=f"folder of the collection; else one under {cache_folder('collections')}, where the app looks, or of the "
        "default recipe the package's",
    )
    add_field_options(parser, SaeRun, OPTIONS)


def main(arguments: argparse.Namespace) -> None:
    """Train the recipe's SAEs and write them to the folder."""
    keep_freed_memory()
    recipe, given = read_recipe(SaeRecipe, arguments.recipe), vars(arguments)
    recipe = replace(recipe, model=given.get("model", recipe.model))
    spec = find_model(recipe.model)
    folder = given.get("run_dir", run_folder("saes", spec, arguments.recipe))
    run = SaeRun(folder, **field_values(arguments, OPTIONS))
    train_collection(recipe, spec, run, given.get("out", collection_folder(spec, arguments.recipe)))


def run_folder(command: str, spec: ModelSpec, recipe: Path) -> Path:
    """Default folder of a command's checkpoints for a recipe and a model."""
    return cache_folder(command) / model_key(spec) / recipe.stem


def collection_folder(spec: ModelSpec, recipe: Path) -> Path:
    """Default folder of the SAEs of a recipe and a model; inside the package for the SAEs that ship with it."""
    shipped = spec.name in EMBEDDED and recipe.resolve() == RECIPE.resolve()
    return EMBEDDED[spec.name] if shipped else collections_folder(spec) / recipe.stem


def train_collection(recipe: SaeRecipe, spec: ModelSpec, run: SaeRun, out: Path) -> None:
    """Train the recipe's SAEs on the model of a spec, and write them to the folder `out`.

    Raises:
        FolderInUseError: Another run is at work in the run's folder.
    """
    recipe_json = json.loads(json.dumps(asdict(recipe)))
    depends = {
        **{name: value for name, value in recipe_json.items() if name not in ("training", "save_dtype")},
        # A retrained model or an edited prompt file of the same name is another recipe.
        MADE_FOR: weights_digest(spec),
        "prompts_digest": files_digest([Path(recipe.prompts)]),
    }
    run = replace(run, recipe=depends)
    accelerator = make_accelerator(recipe.training, run)
    # Only the main process writes the folder; the others may be on another machine.
    with locked(run.folder) if accelerator.is_main_process else nullcontext():
        saes = _train(recipe, spec, run, accelerator)
        if accelerator.is_main_process:
            dtype: torch.dtype = getattr(torch, recipe.save_dtype)
            write_collection(saes, out, recipe_json, run.folder, dtype, depends[MADE_FOR])
        accelerator.wait_for_everyone()
    accelerator.end_training()


def _train(recipe: SaeRecipe, spec: ModelSpec, run: SaeRun, accelerator: Accelerator) -> dict[SaeId, SparseAutoencoder]:
    """Train the SAEs on the model's updates."""
    model = core.load_model(spec, device=accelerator.device)
    ids = recipe.sae_ids(model)
    prompts = open_prompts(
        recipe.prompts,
        model.check_prompt,
        column=recipe.caption_column,
        where=recipe.where,
        positions=run.folder / "prompts.json",
    )
    rank, world = accelerator.process_index, accelerator.num_processes
    stream = ActivationStream(model, prompts, ids, recipe.stream, rank=rank, world=world)
    return train_saes(stream, ids, recipe.training, run, accelerator)


def write_collection(
    saes: Mapping[SaeId, SparseAutoencoder],
    out: Path,
    recipe: Mapping[str, Any],
    run: Path,
    dtype: torch.dtype,
    made_for: str | None,
) -> None:
    """Save trained SAEs with their last training figures, and the index that lists them.

    `made_for` identifies the model's weights: `core.sae.trained.weights_digest`.
    """
    figures = last_figures(run)
    n_samples = (
        recipe["training"]["n_steps"]
        * recipe["training"]["gradient_accumulation_steps"]
        * recipe["stream"]["batch_size"]
    )
    (out / MANIFEST).unlink(missing_ok=True)  # it describes the former collection
    mark_labelled(out, False)
    for sae_id, sae in saes.items():
        metadata = {
            "model": recipe["model"],
            **sae_id._asdict(),
            "n_samples": n_samples,
            "seed": recipe["training"]["seed"],
            "commit": commit_now(),
            "training_figures": figures.get(sae_id.path),
        }
        save_sae(sae, out / sae_id.path, metadata, dtype)
    write_index(out, tuple(saes), **{"model": recipe["model"], MADE_FOR: made_for, "recipe": dict(recipe)})
    logger.info("%d SAEs are in %s", len(saes), out)
