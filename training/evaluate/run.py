"""`python -m training evaluate NAME`: measure whether the claims are true."""

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

import core
from core.diffusion.diffuser import Diffuser
from core.folders import cache_folder
from core.sae.collection import EMBEDDED
from training.common import report
from training.common.report import Table
from training.common.results import Section, render, store, write_readme
from training.evaluate import picturebook
from training.evaluate.common.evaluation import Evaluation, Subject
from training.evaluate.common.store import cached, fingerprint
from training.evaluate.information import captions, counterfactual, excess, likelihood, localisation, pid, words
from training.evaluate.interventions import evaluation as interventions
from training.evaluate.layout import evaluation as layout
from training.evaluate.sae import concepts
from training.evaluate.sae import evaluation as sae
from training.hub.cards import write_sae_card
from training.prompts.sources import GRAMMAR, add_prompt_arguments, open_prompts

PACKAGE = Path(core.__file__).parent / "picturebook"
HERE = Path(__file__).parent
"""Folder of the README and of the stored results."""
JUDGES = ("segmenter", "second_segmenter", "style_classifier")
"""Folders of the judges in the package."""

EVALUATIONS: Mapping[str, Evaluation[Any, Any]] = {
    one.name: one
    for one in (
        picturebook.EVALUATION,
        sae.EVALUATION,
        concepts.EVALUATION,
        layout.EVALUATION,
        interventions.EVALUATION,
        pid.EVALUATION,
        captions.EVALUATION,
        localisation.EVALUATION,
        words.EVALUATION,
        excess.EVALUATION,
        counterfactual.EVALUATION,
        likelihood.EVALUATION,
    )
}
"""By name, in the order of the README."""

INTRO = """
What was measured to check the claims of this project: each figure next to a baseline, with its 95 % interval. Unless a
note says otherwise everything is measured on `picturebook`, the embedded model, whose training scenes are painted by a
program: every object, background, style and mask is known. Captions and scenes are held out: their combinations of
objects, background and style never occur in training.

Terms: an *object* is what a noun of a caption names, the *background* what the scene is set on. *Conditional branch*:
the evaluations of the U-Net that see the prompt, as opposed to the unconditional ones of classifier-free guidance.
*CMI* is the information a word carries about the image given the rest of the prompt, *MI* given nothing.
"""

log = logging.getLogger(__name__)


class EvalOptions(NamedTuple):
    """Options of the command line."""

    parts: Sequence[str] = ()
    """Names of the tables to make; none for all."""
    quick: bool = False
    """Measure the size that takes about a minute."""
    folder: Path = cache_folder("evaluate")
    """Folder of the report and of cached tables."""
    saes: Sequence[Path] = (PACKAGE / "saes",)
    """Collections of SAEs."""
    prompts: str = GRAMMAR
    """Where prompts come from."""
    column: str = "caption"
    """Column of the captions, for a dataset."""
    where: Sequence[str] = ()
    """Conditions a row must fulfil, for a dataset."""
    dtype: str = "float32"
    """Data type of the model."""
    package: Path = PACKAGE
    """Folder of the judges."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    defaults = EvalOptions()
    parser.add_argument("name", choices=list(EVALUATIONS), help="what to evaluate")
    parser.add_argument("--parts", nargs="+", default=[], help="tables to make; all by default")
    parser.add_argument("--quick", action="store_true", help="a version of a minute; its figures mean little")
    parser.add_argument("--model", default="picturebook", help="built-in name, folder, or owner/name@revision")
    parser.add_argument("--device", default=None, help="torch device; the best one available by default")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default=defaults.dtype,
        help="data type of the model; the lower ones are faster, but round away what small words contribute",
    )
    per_collection = ", ".join(f"`{name}`" for name, one in EVALUATIONS.items() if one.per_collection)
    parser.add_argument(
        "--saes", nargs="+", type=Path, default=defaults.saes, help=f"collections of SAEs, for {per_collection}"
    )
    add_prompt_arguments(parser, "; its held-out part")
    parser.add_argument(
        "--card", action="store_true", help="with `sae`: also write each collection's card and manifest"
    )
    parser.add_argument(
        "--out", type=Path, default=defaults.folder, help="folder of the report, as Markdown and JSON, and of the cache"
    )
    parser.add_argument(
        "--store",
        action="store_true",
        help="also store the tables in the repository, and write training/evaluate/README.md from all that is stored",
    )


def main(arguments: argparse.Namespace) -> None:
    """Evaluate, write the report and print it. Tables of unchanged weights, settings and code come from the cache."""
    if arguments.store and arguments.quick:
        raise SystemExit("--store keeps results that others read: it does not go with --quick.")
    load = report.load_now()
    model = core.load_model(arguments.model, device=arguments.device, dtype=getattr(torch, arguments.dtype))
    options = EvalOptions(
        arguments.parts,
        arguments.quick,
        arguments.out,
        arguments.saes,
        arguments.prompts,
        arguments.column,
        arguments.where,
        arguments.dtype,
    )
    tables = evaluate(EVALUATIONS[arguments.name], model, options)
    if arguments.card:
        write_cards(arguments.name, options, tables)
    made = report.origin(" ".join(["python -m training", *sys.argv[1:]]), load, str(model.device))
    title = f"Evaluation {arguments.name}"
    report.write(arguments.out, title, made, tables)
    print(report.markdown(title, made, tables))
    if arguments.store:
        store(HERE, arguments.name, tables, made)
        write_readme(HERE, readme())


def evaluate(evaluation: Evaluation[Any, Any], model: Diffuser, options: EvalOptions) -> list[Table]:
    """The tables of an evaluation, measured or from the cache; of each collection of SAEs where it evaluates those."""
    if unknown := [name for name in options.parts if name not in evaluation.part_names]:
        raise SystemExit(f"There is no part {unknown[0]!r}: there are {', '.join(evaluation.part_names)}.")
    settings = evaluation.quick if options.quick else evaluation.settings
    prompts = [] if evaluation.n_prompts is None else _held_out(model, options, evaluation.n_prompts(settings))
    roots = options.saes if evaluation.per_collection else options.saes[:1]
    by_root: list[list[Table]] = []
    for root in roots:
        bench = evaluation.bench(Subject(model, options.package, root, prompts), settings)
        folders = [*_own_weights(model), *(options.package / name for name in JUDGES)]
        folders += [root] if evaluation.per_collection else []
        key = fingerprint(folders, settings, [model.spec.name, model.spec.revision, options.dtype, prompts])
        tables = []
        for part in evaluation.parts:
            if not options.parts or part.__name__ in options.parts:
                log.info("%s: %s", evaluation.name, part.__name__)
                path = options.folder / f"{evaluation.name}-{part.__name__}-{key}.json"
                tables.append(cached(path, lambda part=part, bench=bench: part(bench)))  # type: ignore[misc]
        by_root.append(tables)
    if len(roots) == 1:
        return by_root[0]
    named = [
        replace(table, name=f"{table.name}-{root.name}", title=f"{table.title}: {root.name}")
        for root, tables in zip(roots, by_root, strict=True)
        for table in tables
    ]
    comparison = evaluation.compare and evaluation.compare([table for tables in by_root for table in tables])
    return [*named, comparison] if comparison else named


def write_cards(name: str, options: EvalOptions, tables: Sequence[Table]) -> None:
    """Write the card and manifest of each collection, from its own tables."""
    if name != "sae" or options.parts or options.quick:
        raise SystemExit("--card goes with all tables of the evaluation `sae`, and not with --quick.")
    each = len(tables) // len(options.saes)
    for i, root in enumerate(options.saes):
        embedded = [name for name, folder in EMBEDDED.items() if folder == root.resolve()]
        write_sae_card(root, embedded[0] if embedded else str(root), tables[i * each : (i + 1) * each])


def readme() -> str:
    """The README of all stored results."""
    sections = [Section(one.name, one.title, one.description, one.part_names) for one in EVALUATIONS.values()]
    return render(HERE, "Evaluation results", INTRO, "python -m training evaluate", sections)


def _held_out(model: Diffuser, options: EvalOptions, n: int) -> list[str]:
    """The first `n` held-out prompts."""
    source = open_prompts(options.prompts, model.check_prompt, split="test", column=options.column, where=options.where)
    return [source.prompt(number) for number in range(n)]


def _own_weights(model: Diffuser) -> list[Path]:
    """The model's folder, if it is on this disk."""
    folder = Path(model.spec.source)
    return [folder] if folder.is_dir() else []
