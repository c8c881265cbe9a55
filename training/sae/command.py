"""`python -m training sae`: train sparse autoencoders while the sampler runs, and save them as a collection.

Several GPUs: `accelerate launch -m training sae`; several CPU processes: `torchrun --nproc_per_node N -m training sae`.
"""

import argparse
import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any, get_args

import torch

import core
from core.artifacts import MANIFEST, find_model
from core.diffusion.diffuser import Diffuser
from core.diffusion.sampling import Branch
from core.sae.autoencoder import AllTimes, SaeId, SparseAutoencoder
from core.sae.collection import write_index
from core.sae.io import save_sae
from core.spec import ModelSpec
from training.common.allocator import keep_freed_memory
from training.common.folders import cache_folder
from training.common.recipe import read_recipe
from training.common.report import commit_now
from training.prompts.sources import GRAMMAR, open_prompts
from training.sae.bank import TrainerConfig
from training.sae.stream import ActivationStream, StreamConfig
from training.sae.trainer import LOG, SaeRun, make_accelerator, train_saes

RECIPE = Path(__file__).parents[1] / "recipes" / "picturebook_saes.json"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SaeRecipe:
    """Everything that makes a collection of SAEs."""

    training: TrainerConfig
    """Shape and training of every SAE."""
    model: str = "picturebook"
    """Built-in name, folder, or `owner/name@revision`."""
    prompts: str = GRAMMAR
    """`grammar`, a `.txt`, `.jsonl` or `.parquet` file, or a Hub dataset `owner/name[@revision]`."""
    caption_column: str = "caption"
    """Of a dataset: where its captions are."""
    where: tuple[str, ...] = ()
    """Of a dataset: conditions that a row has to fulfil, as `aesthetic >= 5.5`."""
    hookpoints: tuple[str, ...] = ()
    """Blocks; none named: the model's own."""
    branches: tuple[Branch, ...] = get_args(Branch)
    """Halves of classifier-free guidance."""
    times: tuple[float | AllTimes, ...] = ("all",)
    """Normalised times of which each has an SAE; `all`: the one shared by every step."""
    stream: StreamConfig = field(default_factory=StreamConfig)
    """How pictures become batches."""
    half: bool = True
    """Whether the weights on disk are fp16."""

    def sae_ids(self, model: Diffuser) -> tuple[SaeId, ...]:
        """The SAEs of the collection."""
        every = product(self.hookpoints or model.hookpoints, self.branches, self.times)
        return tuple(SaeId(hookpoint, branch, t) for hookpoint, branch, t in every)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--recipe", type=Path, default=RECIPE, help="JSON with the model, the SAEs and the training")
    parser.add_argument("--run-dir", type=Path, default=cache_folder("saes"), help="folder of the checkpoint; resumed")
    parser.add_argument(
        "--out", type=Path, default=Path(core.__file__).parent / "picturebook" / "saes", help="folder of the collection"
    )
    parser.add_argument("--checkpoint-every", type=float, default=300, help="least seconds between checkpoints")
    parser.add_argument("--trackers", nargs="*", default=[], help="tensorboard, trackio, wandb...: accelerate's own")


def main(arguments: argparse.Namespace) -> None:
    """Train the recipe's SAEs and write them to the folder."""
    keep_freed_memory()
    recipe = read_recipe(SaeRecipe, arguments.recipe)
    run = SaeRun(arguments.run_dir, every=arguments.checkpoint_every, trackers=tuple(arguments.trackers))
    train_collection(recipe, find_model(recipe.model), run, arguments.out)


def train_collection(recipe: SaeRecipe, spec: ModelSpec, run: SaeRun, out: Path) -> None:
    """Train the recipe's SAEs on the model of a spec, and write them to the folder `out`."""
    told = json.loads(json.dumps(asdict(recipe)))
    depends = {
        **{name: value for name, value in told.items() if name not in ("training", "half")},
        # A model that was trained anew, or prompts that were edited, under the same name are others.
        "weights": digest(Path(spec.source).rglob("*.safetensors")) or spec.revision,
        "prompts_digest": digest([Path(recipe.prompts)]),
    }
    run = replace(run, recipe=depends)
    accelerator = make_accelerator(recipe.training, run)
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
    saes = train_saes(stream, ids, recipe.training, run, accelerator)
    if accelerator.is_main_process:
        write_collection(saes, out, told, run.folder, torch.float16 if recipe.half else torch.float32)
    accelerator.wait_for_everyone()
    accelerator.end_training()


def digest(paths: Iterable[Path]) -> str | None:
    """Hash of the contents of those that are files; None without any."""
    whole, files = hashlib.sha256(), sorted(path for path in paths if path.is_file())
    for path in files:
        with path.open("rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()[:16] if files else None


def write_collection(
    saes: Mapping[SaeId, SparseAutoencoder], out: Path, recipe: Mapping[str, Any], run: Path, dtype: torch.dtype
) -> None:
    """Save trained SAEs with their last training figures, and the index that lists them."""
    figures = json.loads((run / LOG).read_text(encoding="utf-8").splitlines()[-1])["saes"]
    n_samples = (
        recipe["training"]["n_steps"]
        * recipe["training"]["gradient_accumulation_steps"]
        * recipe["stream"]["batch_size"]
    )
    (out / MANIFEST).unlink(missing_ok=True)  # it tells of what was there before
    for sae_id, sae in saes.items():
        metadata = {
            "model": recipe["model"],
            **sae_id._asdict(),
            "n_samples": n_samples,
            "seed": recipe["training"]["seed"],
            "commit": commit_now(),
            "training_figures": figures[sae_id.path],
        }
        save_sae(sae, out / sae_id.path, metadata, dtype)
    write_index(out, tuple(saes), model=recipe["model"], recipe=dict(recipe))
    logger.info("%d SAEs are in %s", len(saes), out)
