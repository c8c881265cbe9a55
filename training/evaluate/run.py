"""`python -m training evaluate NAME`: whether the claims are true."""

import argparse
import inspect
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import NamedTuple, TypeVar

import torch

import core
import core.activations.attention
import core.concepts.layout
from core.diffusion.diffuser import Diffuser
from core.edits import load_editor
from core.folders import cache_folder
from core.sae.collection import EMBEDDED, list_saes
from core.segmentation.semantic import load_segmenter
from training.common import report
from training.common.report import Table
from training.evaluate import picturebook
from training.evaluate.common.judges import load_judges
from training.evaluate.common.store import cached, fingerprint
from training.evaluate.information import captions, counterfactual, likelihood, localisation, pid, words
from training.evaluate.interventions import evaluation as interventions
from training.evaluate.layout import evaluation as layout
from training.evaluate.picturebook import held_out_scenes
from training.evaluate.sae import concepts
from training.evaluate.sae import evaluation as sae
from training.evaluate.sae.by_k import by_k
from training.hub.cards import write_sae_card
from training.picturebook.world.scenes import caption_of
from training.prompts.sources import GRAMMAR, Prompts, add_prompt_arguments, open_prompts

PACKAGE = Path(core.__file__).parent / "picturebook"

Part = TypeVar("Part")

log = logging.getLogger(__name__)


class EvalOptions(NamedTuple):
    """What the command line asks for."""

    parts: Sequence[str]
    """Tables; none for all."""
    quick: bool
    """A minute's version."""
    folder: Path
    """Where results are kept."""
    saes: Sequence[Path] = (PACKAGE / "saes",)
    """Collections of SAEs."""
    prompts: str = GRAMMAR
    """Where prompts come from."""
    column: str = "caption"
    """Of a dataset: where its captions are."""
    where: Sequence[str] = ()
    """Of a dataset: conditions that a row has to fulfil."""
    dtype: str = "float32"
    """What the model computes in."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("name", choices=list(EVALUATIONS), help="what to evaluate")
    parser.add_argument("--parts", nargs="+", default=[], help="which of its tables to make; all by default")
    parser.add_argument("--quick", action="store_true", help="a minute's version; its figures mean little")
    parser.add_argument("--model", default="picturebook", help="built-in name, folder, or owner/name@revision")
    parser.add_argument("--device", default=None, help="torch device; by default the best there is")
    defaults = EvalOptions._field_defaults
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default=defaults["dtype"],
        help="what the model computes in; the lower ones are faster, and round away what small words tell",
    )
    parser.add_argument(
        "--saes",
        nargs="+",
        type=Path,
        default=defaults["saes"],
        help="collections of SAEs that `sae`, `concepts` and `layout` evaluate",
    )
    add_prompt_arguments(parser, "; its held-out part")
    parser.add_argument("--card", action="store_true", help="of `sae`: write each collection's card and manifest too")
    parser.add_argument(
        "--out", type=Path, default=cache_folder("evaluate"), help="folder of the results, as Markdown and JSON"
    )


def main(arguments: argparse.Namespace) -> None:
    """Evaluate, write the tables and print them. What was measured before of the same weights is not measured again."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
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
    tables = EVALUATIONS[arguments.name](model, options)
    if arguments.card:
        write_cards(arguments.name, options, tables)
    provenance = report.origin(" ".join(["python -m training", *sys.argv[1:]]), load, str(model.device))
    title = f"Evaluation {arguments.name}"
    report.write(arguments.out, title, provenance, tables)
    print(report.markdown(title, provenance, tables))


def write_cards(name: str, options: EvalOptions, tables: Sequence[Table]) -> None:
    """The card and manifest of each collection, from its own tables."""
    if name != "sae" or options.parts or options.quick:
        raise SystemExit("--card goes with all tables of the evaluation `sae`, and not with --quick.")
    each = len(tables) // len(options.saes)
    for i, root in enumerate(options.saes):
        embedded = [name for name, folder in EMBEDDED.items() if folder == root.resolve()]
        write_sae_card(root, embedded[0] if embedded else str(root), tables[i * each : (i + 1) * each])


def evaluate_picturebook(model: Diffuser, options: EvalOptions, package: Path = PACKAGE) -> list[Table]:
    """How good the embedded model in `package` is."""
    settings = picturebook.QUICK if options.quick else picturebook.Settings()
    judges = load_judges(package)
    parts = {part.__name__: part for part in picturebook.PARTS}
    return _tables(
        parts,
        options,
        fingerprint(picturebook, _model_and_judges(package), settings),
        lambda part: part(model, judges, settings),
    )


def evaluate_sae(model: Diffuser, options: EvalOptions) -> list[Table]:
    """How good the SAEs of some collections are: for each, the same tables; for several, one more beside each other."""
    settings = sae.QUICK if options.quick else sae.Settings()
    source = _held_out(model, options)
    prompts = [source.prompt(number) for number in range(settings.n_fit + settings.n_images)]
    parts = {part.__name__: part for part in sae.PARTS}
    local = _own_weights(model)
    tables = []
    for root in options.saes:
        saes = {i: core.load_sae(root, i.hookpoint, i.branch, i.t) for i in list_saes(root)}
        if not saes:
            raise SystemExit(f"There is no SAE in {root}. Train some with `python -m training sae`.")
        key = fingerprint(sae, [root, *local], settings, [model.spec.name, model.spec.revision, prompts])
        made = _tables(parts, options, key, lambda part, saes=saes: part(model, saes, prompts, settings))  # type: ignore[misc]
        tables += _told_apart(made, options, root)
    compared = [table for table in tables if table.name == sae.reconstruction.__name__]
    return [*tables, by_k(compared)] if len(compared) > 1 else tables


def evaluate_layout(model: Diffuser, options: EvalOptions, package: Path = PACKAGE) -> list[Table]:
    """How well the concepts of some collections foretell the layout of picturebook's captions; judges in `package`."""
    settings = layout.QUICK if options.quick else layout.Settings()
    captions = [caption_of(scene) for scene in held_out_scenes(settings.n_fit + settings.n_images)]
    parts = {part.__name__: part for part in layout.PARTS}
    local = _own_weights(model)
    code = [inspect.getsource(module) for module in (core.activations.attention, core.concepts.layout)]
    tables = []
    for root in options.saes:
        shared = [i for i in list_saes(root) if i.t == "all"]
        if not shared:
            raise SystemExit(f"There is no SAE for all times in {root}. Train some with `python -m training sae`.")
        read = {(i.hookpoint, i.branch): (core.load_sae(root, *i), core.load_concepts(root, *i)) for i in shared}
        segmenters = tuple(load_judges(package).segmenters.values())
        bench = layout.Bench(model, segmenters, captions, read, settings)
        key = fingerprint(
            layout, [root, *_model_and_judges(package), *local], settings, [model.spec.name, model.spec.revision, *code]
        )
        made = _tables(parts, options, key, lambda part, bench=bench: part(bench))  # type: ignore[misc]
        tables += _told_apart(made, options, root)
    return tables


def evaluate_concepts(model: Diffuser, options: EvalOptions, package: Path = PACKAGE) -> list[Table]:
    """What the concepts of some collections mean; the segmenter in `package` says what is where."""
    settings = concepts.QUICK if options.quick else concepts.Settings()
    source = _held_out(model, options)
    prompts = [source.prompt(number) for number in range(settings.n_images)]
    local = _own_weights(model)
    tables = []
    for root in options.saes:
        read = {i: (core.load_sae(root, *i), core.load_concepts(root, *i)) for i in list_saes(root) if i.t == "all"}
        if not read:
            raise SystemExit(f"There is no SAE for all times in {root}. Train some with `python -m training sae`.")
        bench = concepts.Bench(model, load_segmenter(package / "segmenter"), prompts, read, settings)
        key = fingerprint(concepts, [root, *_model_and_judges(package), *local], settings, [model.spec.name, prompts])
        parts = {part.__name__: part for part in concepts.PARTS}
        made = _tables(parts, options, key, lambda part, bench=bench: part(bench))  # type: ignore[misc]
        tables += _told_apart(made, options, root)
    return tables


def evaluate_interventions(model: Diffuser, options: EvalOptions, package: Path = PACKAGE) -> list[Table]:
    """What edits by the concepts of some collections do to picturebook's pictures; judges in `package`."""
    settings = interventions.QUICK if options.quick else interventions.Settings()
    parts = {part.__name__: part for part in interventions.PARTS}
    code = [path.read_text() for path in sorted((Path(core.__file__).parent / "edits").glob("*.py"))]
    tables = []
    for root in options.saes:
        bench = interventions.Bench(load_editor(model, root), load_judges(package), package, settings)
        key = fingerprint(
            interventions,
            [root, *_model_and_judges(package), *_own_weights(model)],
            settings,
            [model.spec.name, model.spec.revision, *code],
        )
        made = _tables(parts, options, key, lambda part, bench=bench: part(bench))  # type: ignore[misc]
        tables += _told_apart(made, options, root)
    return tables


def evaluate_information(module: ModuleType) -> Callable[[Diffuser, EvalOptions], list[Table]]:
    """An evaluation of what words tell true scenes, by a module with `Settings`, `QUICK`, a `Bench` and `PARTS`."""

    def evaluate(model: Diffuser, options: EvalOptions) -> list[Table]:
        settings = module.QUICK if options.quick else module.Settings()
        bench = module.Bench(model, settings)
        engine = Path(core.__file__).parent
        files = [*sorted((engine / "information").glob("*.py")), engine / "inversion.py", engine / "attention.py"]
        code = [path.read_text() for path in files]
        weights = [*_own_weights(model), PACKAGE / "segmenter"]
        key = fingerprint(module, weights, settings, [model.spec.name, model.spec.revision, *code])
        return _tables({part.__name__: part for part in module.PARTS}, options, key, lambda part: part(bench))

    return evaluate


def _held_out(model: Diffuser, options: EvalOptions) -> Prompts:
    """The prompts that are kept from training."""
    return open_prompts(options.prompts, model.check_prompt, split="test", column=options.column, where=options.where)


def _own_weights(model: Diffuser) -> list[Path]:
    """The model's folder, where it is on this disk."""
    folder = Path(model.spec.source)
    return [folder] if folder.is_dir() else []


def _model_and_judges(package: Path) -> list[Path]:
    """Not all of the package: what is made from the model later changes nothing that was measured of it."""
    return [package / name for name in ("model", "segmenter", "second_segmenter", "style_classifier")]


EVALUATIONS: dict[str, Callable[[Diffuser, EvalOptions], list[Table]]] = {
    "captions": evaluate_information(captions),
    "counterfactual": evaluate_information(counterfactual),
    "interventions": evaluate_interventions,
    "concepts": evaluate_concepts,
    "layout": evaluate_layout,
    "likelihood": evaluate_information(likelihood),
    "localisation": evaluate_information(localisation),
    "picturebook": evaluate_picturebook,
    "pid": evaluate_information(pid),
    "sae": evaluate_sae,
    "words": evaluate_information(words),
}


def _tables(parts: dict[str, Part], options: EvalOptions, key: str, measure: Callable[[Part], Table]) -> list[Table]:
    """The tables asked for, measured or, from the folder, remembered."""
    if wrong := [name for name in options.parts if name not in parts]:
        raise SystemExit(f"There is no part {wrong[0]!r}: there are {', '.join(parts)}.")
    if options.dtype != "float32":
        key = f"{key}-{options.dtype}"
    tables = []
    for name, part in parts.items():
        if not options.parts or name in options.parts:
            log.info("%s", name)
            tables.append(cached(options.folder, name, key, lambda part=part: measure(part)))  # type: ignore[misc]
    return tables


def _told_apart(tables: list[Table], options: EvalOptions, root: Path) -> list[Table]:
    """The tables of a collection, with its name where there are several."""
    return tables if len(options.saes) == 1 else [replace(of, title=f"{of.title}: {root.name}") for of in tables]
