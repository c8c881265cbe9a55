"""`python -m training labels`: name the concepts of a collection of SAEs from pictures that are drawn for it.

One pass over the pictures counts which latents are active where which class is (`training.labels.tally`); then every latent
gets its name or none (`training.labels.naming`), and some of the pictures are drawn again to show them (`training.labels.examples`).

With `--recipe` the model, the collection and the prompts are those of `python -m training sae`, and the pictures are of
prompts that the SAEs were not trained with.

Several GPUs share the images: `accelerate launch -m training labels`; several CPU processes:
`torchrun --nproc_per_node N -m training labels`. Each counts its own images in the one `--run-dir`; the main process adds
up the counts and writes.
"""

import argparse
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import core
from core.artifacts import file_sha256, find_model
from core.diffusion.diffuser import Diffuser
from core.folders import cache_folder
from core.segmentation.open_vocabulary import BACKGROUND_TAGS, OPEN_KINDS, TAGS, classes_of, load_open_segmenter
from core.segmentation.semantic import Segmenter, load_segmenter
from training.common.options import add_field_options, field_values
from training.common.processes import joined_processes
from training.common.recipe import read_recipe
from training.common.run_lock import locked
from training.labels.labeller import LabelConfig, Labeller, LabelRun, State
from training.prompts.sources import GRAMMAR, Prompts, add_prompt_arguments, open_prompts
from training.sae.command import SaeRecipe, collection_folder, run_folder

PACKAGE = Path(core.__file__).parent / "picturebook"
STYLES = ("photo", "painting", "drawing", "cartoon")
"""Words for the styles of real pictures, as captions have them."""
DEFAULTS: Mapping[str, Any] = {
    "model": "picturebook",
    "saes": PACKAGE / "saes",
    "prompts": GRAMMAR,
    "column": "caption",
    "where": [],
    "first_prompt": 0,
    "run_dir": cache_folder("labels"),
}
"""What holds without a recipe."""
OPTIONS = ("images", "batch", "permutations", "shared_steps", "gallery", "effect_images", "seed", "backgrounds")
"""Fields of `LabelConfig` that are options; `styles` is one whose default depends on the model."""

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument(
        "--recipe", type=Path, default=argparse.SUPPRESS, help="that the SAEs were trained with: says what is not given"
    )
    parser.add_argument(
        "--model",
        default=argparse.SUPPRESS,
        help="built-in name, folder, or owner/name@revision; else the recipe's, or picturebook",
    )
    parser.add_argument("--device", default=None, help="torch device; by default the best there is")
    parser.add_argument(
        "--saes",
        type=Path,
        default=argparse.SUPPRESS,
        help="collection of SAEs; tables go into it; else the recipe's, or the package's",
    )
    add_prompt_arguments(parser, "; else the recipe's, or grammar", defaults=False)
    parser.add_argument(
        "--first-prompt",
        type=int,
        default=argparse.SUPPRESS,
        help="number of the first; those before are left out; else the first that the recipe's training left, or 0",
    )
    parser.add_argument(
        "--segmenter",
        default=argparse.SUPPRESS,
        help="picturebook, the folder of a semantic segmentation model of transformers, or for real pictures and any "
        f"words {' or '.join(OPEN_KINDS)}: Grounding DINO with SAM, or the lighter CLIPSeg; by default picturebook for "
        "that model and clipseg for others",
    )
    parser.add_argument(
        "--tags", nargs="*", default=TAGS, help=f"what {' and '.join(OPEN_KINDS)} look for in any picture"
    )
    parser.add_argument(
        "--prompt-words", type=int, default=64, help="the most frequent words of the prompts that they look for too"
    )
    add_field_options(parser, LabelConfig, OPTIONS, backgrounds=(*LabelConfig().backgrounds, *BACKGROUND_TAGS))
    parser.add_argument(
        "--styles",
        nargs="*",
        default=argparse.SUPPRESS,
        help=f"words that tell a picture's style; by default {' '.join(LabelConfig().styles)} for picturebook and "
        f"{' '.join(STYLES)} for others",
    )
    parser.add_argument(
        "--run-dir",
        type=Path,
        default=argparse.SUPPRESS,
        help=f"folder of the checkpoints; resumed; else {cache_folder('labels')}, or one in it for the recipe",
    )
    add_field_options(parser, LabelRun, ["checkpoint_interval_s"])


def main(arguments: argparse.Namespace) -> None:
    """Label the collection."""
    arguments = with_defaults(arguments)
    config = LabelConfig(**field_values(arguments, [*OPTIONS, "styles"]))
    processes = joined_processes()
    rank, world = processes.process_index, processes.num_processes
    arguments.device = arguments.device or (str(processes.device) if world > 1 else None)
    model = core.load_model(arguments.model, device=arguments.device)
    source = open_prompts(
        arguments.prompts,
        model.check_prompt,
        column=arguments.column,
        where=arguments.where,
        positions=arguments.run_dir / "prompts.json",
    )
    prompts = PromptsFrom(source, arguments.first_prompt)
    segmenter = choose_segmenter(arguments, prompts)
    folders = [Path(model.spec.source), PACKAGE / "segmenter", Path(arguments.segmenter)]
    depends = {
        "model": [model.spec.name, model.spec.revision],
        "prompts": [arguments.prompts, arguments.column, *arguments.where],
        "first_prompt": arguments.first_prompt,
        "segmenter": arguments.segmenter,
        "weights": [file_sha256(path) for folder in folders for path in sorted(folder.rglob("*.safetensors"))],
    }
    run = LabelRun(arguments.run_dir, arguments.checkpoint_interval_s, rank, world)
    label_collection(config, arguments.saes, model, segmenter, prompts, run, depends, processes.wait_for_everyone)
    processes.destroy_process_group()


def with_defaults(arguments: argparse.Namespace) -> argparse.Namespace:
    """The options, with what was not given as the recipe or the model has it."""
    given, others = vars(arguments), argparse.Namespace(**DEFAULTS)
    if "recipe" in given:
        recipe = read_recipe(SaeRecipe, arguments.recipe)
        others.model = given.get("model", recipe.model)
        spec = find_model(others.model)
        others.saes = collection_folder(spec, arguments.recipe)
        others.run_dir = run_folder("labels", spec, arguments.recipe)
        if "prompts" not in given:
            others.prompts, others.column, others.where = recipe.prompts, recipe.caption_column, list(recipe.where)
            others.first_prompt = recipe.n_images
    ours = given.get("model", others.model) == "picturebook"
    others.segmenter = "picturebook" if ours else "clipseg"
    others.styles = LabelConfig().styles if ours else STYLES
    return argparse.Namespace(**{**vars(others), **given})


def choose_segmenter(arguments: argparse.Namespace, prompts: Prompts) -> Segmenter:
    """The segmenter that was asked for; one of any words is told the words of the prompts."""
    if arguments.segmenter not in OPEN_KINDS:
        return load_segmenter(arguments.segmenter, device=arguments.device)
    texts = (prompts.prompt(number) for number in range(arguments.images))
    classes = classes_of(texts, arguments.tags, arguments.prompt_words)
    log.info("%d classes are looked for: %s", len(classes), ", ".join(classes))
    return load_open_segmenter(arguments.segmenter, classes, device=arguments.device)


@dataclass(frozen=True)
class PromptsFrom:
    """Prompts from some number on, such as those that the SAEs were not trained with."""

    prompts: Prompts
    first: int

    def prompt(self, number: int) -> str:
        """The prompt of a number, from 0."""
        return self.prompts.prompt(self.first + number)


def label_collection(
    config: LabelConfig,
    root: Path,
    model: Diffuser,
    segmenter: Segmenter,
    prompts: Prompts,
    run: LabelRun,
    depends: Mapping[str, Any] | None = None,
    wait_for_everyone: Callable[[], None] = lambda: None,
) -> None:
    """Write concept tables, counts and examples into a collection of SAEs.

    Args:
        config: How.
        root: The collection.
        model: Draws the pictures.
        segmenter: Says what is where in them.
        prompts: Of the pictures.
        run: Where checkpoints are, and which part of the pictures is this process's.
        depends: JSON: what else the numbers depend on; a checkpoint of another is refused.
        wait_for_everyone: Returns once all processes have counted; the main one, rank 0, then writes.

    Raises:
        ValueError: No SAEs, settings that do not fit, a checkpoint of another recipe, or processes that share no folder.
        FolderInUseError: Another run is at work in the run's folder.
    """
    labeller = Labeller(config, root, model, segmenter, prompts)
    recipe = labeller.recipe(depends or {})
    with locked(run.folder_of(run.rank)):
        labeller.count(run, recipe)
        wait_for_everyone()
        if run.rank == 0:
            labeller.write(State.together([labeller.counted(run, rank, recipe) for rank in range(run.world)]), recipe)
