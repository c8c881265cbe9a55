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
import core.attention
import core.layout
from core.diffuser import Diffuser
from core.edits import load_editor
from core.folders import cache_folder
from core.sae_source import EMBEDDED, list_saes
from core.segmentation import load_segmenter
from training import report
from training.evaluate import captions as caption_ranking
from training.evaluate import (
    changes,
    concepts,
    interventions,
    layout,
    likelihood,
    localisation,
    picturebook,
    pid,
    sae,
    words,
)
from training.evaluate.picturebook import held_out_scenes
from training.evaluate.pictures import load_judges
from training.evaluate.sae_by_k import by_k
from training.evaluate.store import fingerprint, kept
from training.picturebook.scenes import caption_of
from training.prompts import GRAMMAR, Prompts, add_prompt_arguments, open_prompts
from training.report import Table
from training.sae_card import write_sae_card

PACKAGE = Path(core.__file__).parent / "picturebook"

Part = TypeVar("Part")

log = logging.getLogger(__name__)


class Asked(NamedTuple):
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
    defaults = Asked._field_defaults
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
    asked = Asked(
        arguments.parts,
        arguments.quick,
        arguments.out,
        arguments.saes,
        arguments.prompts,
        arguments.column,
        arguments.where,
        arguments.dtype,
    )
    tables = EVALUATIONS[arguments.name](model, asked)
    if arguments.card:
        write_cards(arguments.name, asked, tables)
    whence = report.origin(" ".join(["python -m training", *sys.argv[1:]]), load, str(model.device))
    title = f"Evaluation {arguments.name}"
    report.write(arguments.out, title, whence, tables)
    print(report.markdown(title, whence, tables))


def write_cards(name: str, asked: Asked, tables: Sequence[Table]) -> None:
    """The card and manifest of each collection, from its own tables."""
    if name != "sae" or asked.parts or asked.quick:
        raise SystemExit("--card goes with all tables of the evaluation `sae`, and not with --quick.")
    each = len(tables) // len(asked.saes)
    for i, root in enumerate(asked.saes):
        embedded = [name for name, folder in EMBEDDED.items() if folder == root.resolve()]
        write_sae_card(root, embedded[0] if embedded else str(root), tables[i * each : (i + 1) * each])


def evaluate_picturebook(model: Diffuser, asked: Asked, package: Path = PACKAGE) -> list[Table]:
    """How good the embedded model in `package` is."""
    settings = picturebook.QUICK if asked.quick else picturebook.Settings()
    judges = load_judges(package)
    parts = {part.__name__: part for part in picturebook.PARTS}
    return _tables(
        parts,
        asked,
        fingerprint(picturebook, _model_and_judges(package), settings),
        lambda part: part(model, judges, settings),
    )


def evaluate_sae(model: Diffuser, asked: Asked) -> list[Table]:
    """How good the SAEs of some collections are: for each, the same tables; for several, one more beside each other."""
    settings = sae.QUICK if asked.quick else sae.Settings()
    source = _held_out(model, asked)
    prompts = [source.prompt(number) for number in range(settings.n_fit + settings.n_pictures)]
    parts = {part.__name__: part for part in sae.PARTS}
    local = _own_weights(model)
    tables = []
    for root in asked.saes:
        saes = {i: core.load_sae(root, i.hookpoint, i.branch, i.t) for i in list_saes(root)}
        if not saes:
            raise SystemExit(f"There is no SAE in {root}. Train some with `python -m training sae`.")
        key = fingerprint(sae, [root, *local], settings, [model.spec.name, model.spec.revision, prompts])
        made = _tables(parts, asked, key, lambda part, saes=saes: part(model, saes, prompts, settings))  # type: ignore[misc]
        tables += _told_apart(made, asked, root)
    compared = [table for table in tables if table.name == sae.reconstruction.__name__]
    return [*tables, by_k(compared)] if len(compared) > 1 else tables


def evaluate_layout(model: Diffuser, asked: Asked, package: Path = PACKAGE) -> list[Table]:
    """How well the concepts of some collections foretell the layout of picturebook's captions; judges in `package`."""
    settings = layout.QUICK if asked.quick else layout.Settings()
    captions = [caption_of(scene) for scene in held_out_scenes(settings.n_fit + settings.n_pictures)]
    parts = {part.__name__: part for part in layout.PARTS}
    local = _own_weights(model)
    code = [inspect.getsource(module) for module in (core.attention, core.layout)]
    tables = []
    for root in asked.saes:
        shared = [i for i in list_saes(root) if i.t == "all"]
        if not shared:
            raise SystemExit(f"There is no SAE for all times in {root}. Train some with `python -m training sae`.")
        read = {(i.hookpoint, i.branch): (core.load_sae(root, *i), core.load_concepts(root, *i)) for i in shared}
        segmenters = tuple(load_judges(package).segmenters.values())
        bench = layout.Bench(model, segmenters, captions, read, settings)
        key = fingerprint(
            layout, [root, *_model_and_judges(package), *local], settings, [model.spec.name, model.spec.revision, *code]
        )
        made = _tables(parts, asked, key, lambda part, bench=bench: part(bench))  # type: ignore[misc]
        tables += _told_apart(made, asked, root)
    return tables


def evaluate_concepts(model: Diffuser, asked: Asked, package: Path = PACKAGE) -> list[Table]:
    """What the concepts of some collections mean; the segmenter in `package` says what is where."""
    settings = concepts.QUICK if asked.quick else concepts.Settings()
    source = _held_out(model, asked)
    prompts = [source.prompt(number) for number in range(settings.n_pictures)]
    local = _own_weights(model)
    tables = []
    for root in asked.saes:
        read = {i: (core.load_sae(root, *i), core.load_concepts(root, *i)) for i in list_saes(root) if i.t == "all"}
        if not read:
            raise SystemExit(f"There is no SAE for all times in {root}. Train some with `python -m training sae`.")
        bench = concepts.Bench(model, load_segmenter(package / "segmenter"), prompts, read, settings)
        key = fingerprint(concepts, [root, *_model_and_judges(package), *local], settings, [model.spec.name, prompts])
        parts = {part.__name__: part for part in concepts.PARTS}
        made = _tables(parts, asked, key, lambda part, bench=bench: part(bench))  # type: ignore[misc]
        tables += _told_apart(made, asked, root)
    return tables


def evaluate_interventions(model: Diffuser, asked: Asked, package: Path = PACKAGE) -> list[Table]:
    """What edits by the concepts of some collections do to picturebook's pictures; judges in `package`."""
    settings = interventions.QUICK if asked.quick else interventions.Settings()
    parts = {part.__name__: part for part in interventions.PARTS}
    code = [path.read_text() for path in sorted((Path(core.__file__).parent / "edits").glob("*.py"))]
    tables = []
    for root in asked.saes:
        bench = interventions.Bench(load_editor(model, root), load_judges(package), package, settings)
        key = fingerprint(
            interventions,
            [root, *_model_and_judges(package), *_own_weights(model)],
            settings,
            [model.spec.name, model.spec.revision, *code],
        )
        made = _tables(parts, asked, key, lambda part, bench=bench: part(bench))  # type: ignore[misc]
        tables += _told_apart(made, asked, root)
    return tables


def evaluate_information(module: ModuleType) -> Callable[[Diffuser, Asked], list[Table]]:
    """An evaluation of what words tell true scenes, by a module with `Settings`, `QUICK`, a `Bench` and `PARTS`."""

    def evaluate(model: Diffuser, asked: Asked) -> list[Table]:
        settings = module.QUICK if asked.quick else module.Settings()
        bench = module.Bench(model, settings)
        engine = Path(core.__file__).parent
        files = [*sorted((engine / "information").glob("*.py")), engine / "inversion.py", engine / "attention.py"]
        code = [path.read_text() for path in files]
        weights = [*_own_weights(model), PACKAGE / "segmenter"]
        key = fingerprint(module, weights, settings, [model.spec.name, model.spec.revision, *code])
        return _tables({part.__name__: part for part in module.PARTS}, asked, key, lambda part: part(bench))

    return evaluate


def _held_out(model: Diffuser, asked: Asked) -> Prompts:
    """The prompts that are kept from training."""
    return open_prompts(asked.prompts, model.check_prompt, split="test", column=asked.column, where=asked.where)


def _own_weights(model: Diffuser) -> list[Path]:
    """The model's folder, where it is on this disk."""
    folder = Path(model.spec.source)
    return [folder] if folder.is_dir() else []


def _model_and_judges(package: Path) -> list[Path]:
    """Not all of the package: what is made from the model later changes nothing that was measured of it."""
    return [package / name for name in ("model", "segmenter", "second_segmenter", "style_classifier")]


EVALUATIONS: dict[str, Callable[[Diffuser, Asked], list[Table]]] = {
    "captions": evaluate_information(caption_ranking),
    "changes": evaluate_information(changes),
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


def _tables(parts: dict[str, Part], asked: Asked, key: str, measure: Callable[[Part], Table]) -> list[Table]:
    """The tables asked for, measured or, from the folder, remembered."""
    if wrong := [name for name in asked.parts if name not in parts]:
        raise SystemExit(f"There is no part {wrong[0]!r}: there are {', '.join(parts)}.")
    if asked.dtype != "float32":
        key = f"{key}-{asked.dtype}"
    tables = []
    for name, part in parts.items():
        if not asked.parts or name in asked.parts:
            log.info("%s", name)
            tables.append(kept(asked.folder, name, key, lambda part=part: measure(part)))  # type: ignore[misc]
    return tables


def _told_apart(tables: list[Table], asked: Asked, root: Path) -> list[Table]:
    """The tables of a collection, with its name where there are several."""
    return tables if len(asked.saes) == 1 else [replace(of, title=f"{of.title}: {root.name}") for of in tables]
