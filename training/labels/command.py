"""`python -m training labels`: name the concepts of a collection of SAEs, from images that are generated for it.

One pass over the images counts which latents are active where each class is (`training.labels.tally`). Then every
latent gets a label or none (`training.labels.naming`), and some of the images are generated again as examples
(`training.labels.examples`).

With `--recipe` the model, the collection and the prompts are those of `python -m training sae`, and the images are of
prompts that the SAEs were not trained on.

Several GPUs share the images: `accelerate launch -m training labels`; several CPU processes:
`torchrun --nproc_per_node N -m training labels`. Each counts its own images in the one `--run-dir`; the main process
adds up the counts and writes.
"""

import argparse
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import core
from core.artifacts import file_sha256, find_model
from core.diffusion.diffuser import Diffuser
from core.folders import cache_folder
from core.sae.collection import EMBEDDED
from core.segmentation.open_vocabulary import BACKGROUND_TAGS, OPEN_KINDS, TAGS, classes_of, load_open_segmenter
from core.segmentation.semantic import Segmenter, load_segmenter
from core.spec import ModelSpec
from training.common.options import add_field_options, field_values
from training.common.processes import joined_processes
from training.common.recipe import read_recipe
from training.common.run_lock import locked
from training.labels.labeller import LabelConfig, Labeller, LabelRun, State
from training.prompts.sources import GRAMMAR, Prompts, add_prompt_arguments, open_prompts
from training.sae.command import SaeRecipe, collection_folder, run_folder

PACKAGE = Path(core.__file__).parent / "picturebook"
OWN_RECIPE = "training.json"
"""Among a model's assets: what it was trained with, and under `labels` the words that its concepts are named by."""
STYLES = ("photo", "painting", "drawing", "cartoon")
"""Style words for real images, as captions have them."""
DEFAULTS: Mapping[str, Any] = {
    "model": "picturebook",
    "saes": PACKAGE / "saes",
    "prompts": GRAMMAR,
    "column": "caption",
    "where": [],
    "first_prompt": 0,
    "run_dir": cache_folder("labels"),
}
"""Defaults where there is no recipe."""
OPTIONS = ("images", "batch", "permutations", "shared_steps", "gallery", "effect_images", "seed")
"""Fields of `LabelConfig` that are options as they are; the defaults of its words depend on the model."""

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument(
        "--recipe",
        type=Path,
        default=argparse.SUPPRESS,
        help="recipe of the SAEs' training, for options not given",
    )
    parser.add_argument(
        "--model",
        default=argparse.SUPPRESS,
        help="built-in name, folder, or owner/name@revision; by default the recipe's, or picturebook",
    )
    parser.add_argument("--device", default=None, help="torch device; by default the best one available")
    parser.add_argument(
        "--saes",
        type=Path,
        default=argparse.SUPPRESS,
        help="collection of SAEs; tables go into it; by default the recipe's, or the package's",
    )
    add_prompt_arguments(parser, "; else the recipe's, or grammar", defaults=False)
    parser.add_argument(
        "--first-prompt",
        type=int,
        default=argparse.SUPPRESS,
        help="number of the first prompt to use; by default the first one after the recipe's training, or 0",
    )
    parser.add_argument(
        "--segmenter",
        default=argparse.SUPPRESS,
        help="picturebook, the folder of a semantic segmentation model of transformers, or for real images and any "
        f"words {' or '.join(OPEN_KINDS)}: Grounding DINO with SAM, or the lighter CLIPSeg; by default the model's, "
        "or clipseg",
    )
    parser.add_argument(
        "--tags", nargs="*", default=TAGS, help=f"classes that {' and '.join(OPEN_KINDS)} look for in every image"
    )
    parser.add_argument(
        "--prompt-words", type=int, default=64, help="the most frequent words of the prompts, as further classes"
    )
    add_field_options(parser, LabelConfig, OPTIONS)
    parser.add_argument(
        "--backgrounds",
        nargs="*",
        default=None,
        help="classes that are backgrounds; by default those of the model's recipe, if any, and of --tags",
    )
    parser.add_argument(
        "--styles",
        nargs="*",
        default=None,
        help=f"words that name a style; by default those of the model's recipe, or {' '.join(STYLES)}",
    )
    parser.add_argument(
        "--run-dir",
        type=Path,
        default=argparse.SUPPRESS,
        help=f"folder of the checkpoints, to resume from; by default {cache_folder('labels')}, or one in it for the "
        "recipe",
    )
    add_field_options(parser, LabelRun, ["checkpoint_interval_s"])


def main(arguments: argparse.Namespace) -> None:
    """Label the collection."""
    arguments = with_defaults(arguments)
    config = label_config(arguments, find_model(arguments.model))
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
    """The options, completed by the recipe if there is one, and by the model's defaults."""
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
    model = given.get("model", others.model)
    others.segmenter = model if model in EMBEDDED else "clipseg"
    return argparse.Namespace(**{**vars(others), **given})


def label_config(arguments: argparse.Namespace, spec: ModelSpec) -> LabelConfig:
    """The settings of the command line; words that it leaves out are those of the model's recipe, or general ones."""
    own = own_words(spec)
    backgrounds = (*own.backgrounds, *BACKGROUND_TAGS) if arguments.backgrounds is None else arguments.backgrounds
    styles = (own.styles or STYLES) if arguments.styles is None else arguments.styles
    return LabelConfig(
        **field_values(arguments, OPTIONS),
        backgrounds=tuple(backgrounds),
        styles=tuple(styles),
        words=own.words,
    )


class Words(NamedTuple):
    """What concepts can be named by."""

    backgrounds: Sequence[str] = ()
    """Classes that are backgrounds."""
    styles: Sequence[str] = ()
    """Words that name a style."""
    words: Mapping[str, Sequence[str]] = {}
    """By class, other words for it."""


def own_words(spec: ModelSpec) -> Words:
    """The words of the recipe that a built-in model comes with; none for other models."""
    recipe = None if spec.assets is None else spec.assets / OWN_RECIPE
    if recipe is None or not recipe.is_file():
        return Words()
    labels = json.loads(recipe.read_text(encoding="utf-8"))["labels"]
    return Words(*(labels[name] for name in Words._fields))


def choose_segmenter(arguments: argparse.Namespace, prompts: Prompts) -> Segmenter:
    """The segmenter that was asked for; an open-vocabulary one gets classes from the words of the prompts."""
    if arguments.segmenter not in OPEN_KINDS:
        return load_segmenter(arguments.segmenter, device=arguments.device)
    texts = (prompts.prompt(number) for number in range(arguments.images))
    classes = classes_of(texts, arguments.tags, arguments.prompt_words)
    log.info("%d classes to look for: %s", len(classes), ", ".join(classes))
    return load_open_segmenter(arguments.segmenter, classes, device=arguments.device)


@dataclass(frozen=True)
class PromptsFrom:
    """Prompts from some number on, such as those that the SAEs were not trained on."""

    prompts: Prompts
    """All prompts."""
    first: int
    """Number of the first one to use."""

    def prompt(self, number: int) -> str:
        """The prompt of a number, counted from `first`."""
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
        config: The settings.
        root: Folder of the collection.
        model: Generates the images.
        segmenter: Finds the classes in them.
        prompts: Prompts of the images.
        run: Where checkpoints are kept, and which part of the images this process generates.
        depends: JSON: what else the counts depend on; a checkpoint that differs in it is refused.
        wait_for_everyone: Returns once all processes have counted; the main one, rank 0, then writes.

    Raises:
        ValueError: No SAEs, settings that do not fit, a checkpoint of another recipe, or processes without a common
            folder.
        FolderInUseError: Another run is at work in the run's folder.
    """
    labeller = Labeller(config, root, model, segmenter, prompts)
    recipe = labeller.recipe(depends or {})
    with locked(run.folder_of(run.rank)):
        labeller.count(run, recipe)
        wait_for_everyone()
        if run.rank == 0:
            labeller.write(State.merged([labeller.counted(run, rank, recipe) for rank in range(run.world)]), recipe)
