"""The headline table of the top-level README: six stored results, each beside a baseline of the same table."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from training.common.report import ROOT, Cell
from training.common.results import Section, read_stored
from training.evaluate import run as evaluate

START, END = "<!-- headline: start -->", "<!-- headline: end -->"
"""Marks in the README between which the table is written."""
README = ROOT / "README.md"


class Headline(NamedTuple):
    """A row of the table: two cells of one stored table."""

    question: str
    """What it answers, with the unit."""
    section: str
    """Evaluation, as on the command line."""
    table: str
    """Name of its stored table."""
    result: Mapping[str, Cell]
    """Cells by which the row of the result is found."""
    baseline: Mapping[str, Cell]
    """Cells by which the row of the baseline is found."""
    column: str
    """Column of the result."""
    baseline_column: str | None = None
    """Column of the baseline, where it is another."""
    baseline_name: str = ""
    """What the baseline is."""


_SAE = {"hookpoint": "mid_block.attentions.0", "branch": "cond", "step": "together"}
HEADLINES = (
    Headline(
        "Do words that can be informative get more bits? (AUROC, objects and backgrounds)",
        "words",
        "informative",
        {"measure": "CMI"},
        {"measure": "cross-attention"},
        "AUROC, objects and backgrounds",
        baseline_name="cross-attention",
    ),
    Headline(
        "Are the maps where the objects are? (mean IoU, painted scenes)",
        "localisation",
        "iou",
        {"map": "CMI and attention"},
        {"map": "cross-attention along the sampler"},
        "objects, painted scenes",
        baseline_name="cross-attention",
    ),
    Headline(
        "Is the right caption ranked first? (one object exchanged)",
        "captions",
        "aro",
        {"difference": "object"},
        {"difference": "object"},
        "correct",
        "correct, Kong et al. 2024",
        "Kong et al. 2024",
    ),
    Headline(
        "Is the layout known at the first step? (mean IoU)",
        "layout",
        "grid",
        {"method": "concepts, readout"},
        {"method": "segmented preview"},
        "first step",
        baseline_name="segmented preview",
    ),
    Headline(
        "Does an early edit move the object where asked? (success rate)",
        "interventions",
        "moving",
        {"success rate": "edit of the middle block's concepts, strength 8"},
        {"success rate": "prompt-only baseline"},
        "early (steps 1-10 of 25)",
        baseline_name="prompt alone",
    ),
    Headline(
        "How much do the bottleneck's SAEs explain? (explained variance, k 11 of 192)",
        "sae",
        "reconstruction",
        _SAE,
        _SAE,
        "explained variance",
        "PCA",
        "PCA with 11 components",
    ),
)


def table(folder: Path = evaluate.HERE) -> str:
    """The table as Markdown, from the results stored under `folder`.

    Raises:
        ValueError: A stored table lacks a row or column that a headline names.
    """
    lines = ["| question | result | baseline | evaluation |", "|---|---|---|---|"]
    for one in HEADLINES:
        rows = next(
            (s.table.rows for s in read_stored(folder, Section(one.section, "", "")) if s.table.name == one.table), ()
        )
        result = _cell(rows, one, one.result, one.column)
        baseline = _cell(rows, one, one.baseline, one.baseline_column or one.column)
        link = f"[{one.section}](training/evaluate/README.md)"
        lines.append(f"| {one.question} | {result} | {baseline}, {one.baseline_name} | {link} |")
    return "\n".join(lines)


def written(readme: str, block: str) -> str:
    """A README with the table between its marks."""
    start, end = readme.index(START) + len(START), readme.index(END)
    return f"{readme[:start]}\n{block}\n{readme[end:]}"


def _cell(rows: object, one: Headline, wanted: Mapping[str, Cell], column: str) -> str:
    assert isinstance(rows, (list, tuple))
    for row in rows:
        if all(row.get(name) == value for name, value in wanted.items()) and column in row:
            value = row[column]
            return f"{value:.3g}" if isinstance(value, float) else str(value)
    raise ValueError(f"{one.section}/{one.table} has no row with {dict(wanted)} and column {column!r}.")
