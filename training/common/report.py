"""Tables of benchmarks and evaluations, and where they come from: command, commit, date and machine."""

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
    """One timed quantity with all its repeats."""

    what: str
    """What was measured, with its unit."""
    values: Sequence[float]
    """One value per repeat."""
    target: float | None = None
    """The value it should not exceed, in the same unit."""
    reference: str = ""
    """A peer or a lower bound, measured in the same run."""

    @property
    def median(self) -> float:
        """Median over the repeats."""
        return statistics.median(self.values)

    def row(self) -> dict[str, Cell]:
        """The figure as a table row. The target counts as met only if the slowest repeat meets it."""
        worst = max(self.values)
        return {
            "what": self.what,
            "median": self.median,
            "worst": worst,
            "target": self.target,
            "met": None if self.target is None else worst <= self.target,
            "reference": self.reference,
        }


@dataclass(frozen=True)
class Table:
    """One table of results."""

    name: str
    """Short name: the part that makes it, and the stem of the file that stores it."""
    title: str
    """Heading."""
    rows: Sequence[Mapping[str, Cell]]
    """Cells by column; every row has the same columns."""
    notes: Sequence[str] = ()
    """How it was measured, and what to know before trusting it."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """The data behind the table, JSON-serialisable; not shown in Markdown."""

    def markdown(self, level: int = 2) -> str:
        """Heading of that level, table and notes."""
        columns = list(self.rows[0])
        lines = [f"{'#' * level} {self.title}", "", *table_lines(columns, self.rows)]
        return "\n".join([*lines, "", *[f"- {note}" for note in self.notes]]).rstrip() + "\n"


@dataclass(frozen=True)
class Origin:
    """How, when and where a table was made. None stands for what was not recorded."""

    command: str
    """Command line."""
    commit: str
    """Commit of the checkout, and whether files differed from it."""
    date: str
    """UTC, to the minute."""
    cpu: str | None = None
    """Model name of the processor."""
    n_cores: int | None = None
    """Cores available to the process."""
    load: float | None = None
    """Load average over the minute before the run; well above 0, timings are less reliable."""
    torch: str | None = None
    """Version of torch."""
    n_threads: int | None = None
    """Threads torch computes with."""
    device: str | None = None
    """Device of the models."""
    copied_from: str | None = None
    """The document this table was copied from, if the command did not write it: `commit` and `date` are then those of
    the commit that put the table into that document."""

    def markdown(self) -> str:
        """One line for readers."""
        machine = "".join(f", {part}" for part in self._machine())
        if self.copied_from is None:
            return f"`{self.command}` at commit {self.commit}, {self.date}{machine}."
        return (
            f"`{self.command}`{machine}. Copied from `{self.copied_from}` as of commit {self.commit} ({self.date}), "
            "not written by the command."
        )

    def _machine(self) -> list[str]:
        parts = []
        if self.cpu is not None:
            cores = "" if self.n_cores is None else f"{self.n_cores} cores of "
            load = "" if self.load is None else f" (load before: {self.load:.1f})"
            parts.append(f"on {cores}{self.cpu}{load}")
        if self.torch is not None:
            parts.append(f"torch {self.torch}")
        if self.n_threads is not None:
            parts.append(f"{self.n_threads} threads")
        if self.device is not None:
            parts.append(f"device {self.device}")
        return parts


def origin(command: str, load: float, device: str) -> Origin:
    """The origin of tables made by this process; `load` is the load average before it measured anything."""
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


def markdown(title: str, made: Origin, tables: Sequence[Table]) -> str:
    """A report of tables that were made together."""
    return "\n".join([f"# {title}", "", made.markdown(), "", *[table.markdown() for table in tables]])


def write(folder: Path, title: str, made: Origin, tables: Sequence[Table]) -> None:
    """Write a report into `folder` as Markdown and JSON, named after its title."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = title.lower().replace(" ", "-")
    write_text(folder / f"{stem}.md", markdown(title, made, tables))
    content = {"origin": asdict(made), "tables": [asdict(table) for table in tables]}
    write_text(folder / f"{stem}.json", json.dumps(content, indent=1) + "\n")


def timed(work: Callable[[], object], n: int) -> list[float]:
    """Seconds of each of `n` repeats."""
    seconds = []
    for _ in range(n):
        started = perf_counter()
        work()
        seconds.append(perf_counter() - started)
    return seconds


def load_now() -> float:
    """Load average over the last minute; 0 where the system has none."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


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


def table_lines(columns: Sequence[str], rows: Sequence[Mapping[str, Cell]]) -> list[str]:
    """The lines of a Markdown table."""
    lines = [_line(columns), _line(["---"] * len(columns))]
    return [*lines, *[_line([_shown(row[column]) for column in columns]) for row in rows]]


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
