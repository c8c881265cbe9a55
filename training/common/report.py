"""What a benchmark or an evaluation hands over: tables that say on what machine and by what they were made."""

import json
import os
import platform
import statistics
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

from core.files import write_text

ROOT = Path(__file__).resolve().parents[2]
"""The checkout, or where the packages are installed."""

Cell = str | float | bool | None


class Figure(NamedTuple):
    """One measured quantity, for the parts that are timed."""

    what: str
    """What was measured, with its unit."""
    values: Sequence[float]
    """Every repeat of it."""
    target: float | None = None
    """What it should not exceed, in the same unit."""
    reference: str = ""
    """A peer or a floor, measured in the same run."""

    @property
    def median(self) -> float:
        """Of the repeats."""
        return statistics.median(self.values)

    def row(self) -> dict[str, Cell]:
        """A table's row. An aim counts as met when the slowest repeat meets it."""
        worst = max(self.values)
        return {
            "what": self.what,
            "median": self.median,
            "worst": worst,
            "aim": self.target,
            "met": None if self.target is None else worst <= self.target,
            "beside": self.reference,
        }


@dataclass(frozen=True)
class Table:
    """One part of a report."""

    name: str
    """The part's name on the command line."""
    title: str
    """What it shows."""
    rows: Sequence[Mapping[str, Cell]]
    """Cells by column; every row has the same columns."""
    notes: Sequence[str] = ()
    """How it was measured, and what to know before believing it."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """What the table was made from; JSON-able, kept in the JSON alone."""

    def markdown(self) -> str:
        """The table and its notes."""
        columns = list(self.rows[0])
        lines = [f"## {self.title}", "", _line(columns), _line(["---"] * len(columns))]
        lines += [_line([_shown(row[column]) for column in columns]) for row in self.rows]
        return "\n".join([*lines, "", *[f"- {note}" for note in self.notes]]).rstrip() + "\n"


@dataclass(frozen=True)
class Origin:
    """Where and from what a benchmark came."""

    command: str
    """As typed."""
    commit: str
    """The checkout's commit, and whether files differed from it."""
    date: str
    """UTC, to the minute."""
    cpu: str
    """Model name of the processor."""
    n_cores: int
    """Cores that this process may use."""
    load: float
    """Mean number of busy processes over the minute before; much above 0, timings are worth less."""
    torch: str
    """Version of torch."""
    n_threads: int
    """Threads that torch computes with."""
    device: str
    """Where the models computed."""

    def markdown(self) -> str:
        """One line for people."""
        return (
            f"`{self.command}` at commit {self.commit}, {self.date}, on {self.n_cores} cores of {self.cpu} "
            f"(load before: {self.load:.1f}), torch {self.torch} with {self.n_threads} threads, on {self.device}."
        )


def origin(command: str, load: float, device: str) -> Origin:
    """Of the present process; `load` as it was before the benchmark."""
    import torch  # here, because the page's start is measured before this process holds torch

    return Origin(
        command=command,
        commit=commit_now(),
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        cpu=_cpu(),
        n_cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        load=load,
        torch=version("torch"),
        n_threads=torch.get_num_threads(),
        device=device,
    )


def markdown(title: str, provenance: Origin, tables: Sequence[Table]) -> str:
    """The whole report."""
    return "\n".join([f"# {title}", "", provenance.markdown(), "", *[table.markdown() for table in tables]])


def write(folder: Path, title: str, provenance: Origin, tables: Sequence[Table]) -> None:
    """Put the report into `folder`, as Markdown and JSON named after its title."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = title.lower().replace(" ", "-")
    write_text(folder / f"{stem}.md", markdown(title, provenance, tables))
    content = {"origin": asdict(provenance), "tables": [asdict(table) for table in tables]}
    write_text(folder / f"{stem}.json", json.dumps(content, indent=1) + "\n")


def timed(work: Callable[[], object], n: int) -> list[float]:
    """Seconds of each of `n` repeats."""
    seconds = []
    for _ in range(n):
        started = perf_counter()
        work()
        seconds.append(perf_counter() - started)
    return seconds


def commit_now() -> str:
    """The checkout's commit, and whether files differ from it."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=ROOT, capture_output=True, encoding="utf-8", check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + (" with changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _shown(cell: Cell) -> str:
    if cell is None:
        return ""
    if isinstance(cell, bool):
        return "yes" if cell else "**no**"
    if isinstance(cell, str):
        return cell
    return f"{cell:.0f}" if abs(cell) >= 100 or cell == int(cell) else f"{cell:.3g}"


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
