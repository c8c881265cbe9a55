"""`python -m training benchmark`: speed on this machine, and how few U-Net evaluations the estimator needs."""

import argparse
import difflib
import importlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from core.folders import cache_folder
from training.benchmark.benchmark import Benchmark, BenchmarkRun
from training.common import report
from training.common.results import Section, render, store, write_readme

HERE = Path(__file__).parent
"""Folder of the README and of the stored results."""

INTRO = """ Speed of the app and of training, and the number of U-Net evaluations an attribution needs, each next to
another implementation or to a lower bound measured in the same run. `python -m training benchmark` measures them on
your machine. A target counts as met only if the slowest repeat meets it.
"""


class Entry(NamedTuple):
    """Where a benchmark is defined, and when it runs. Its module is imported only when it runs."""

    module: str
    attribute: str = "BENCHMARK"
    needs_accelerator: bool = False
    """It takes hours on a CPU: left out there unless named."""
    on_request: bool = False
    """It measures another model than the one asked for: left out unless named."""


BENCHMARKS: Mapping[str, Entry] = {
    "app": Entry("training.benchmark.app"),
    "generation": Entry("training.benchmark.speed", "GENERATION"),
    "attribution": Entry("training.benchmark.speed", "ATTRIBUTION"),
    "estimator": Entry("training.benchmark.estimator"),
    "density": Entry("training.benchmark.density"),
    "sae": Entry("training.benchmark.saes"),
    "streaming": Entry("training.benchmark.streaming", needs_accelerator=True),
    "conformance": Entry("training.benchmark.conformance", on_request=True),
    "latency": Entry("training.benchmark.latency", on_request=True),
}
"""By name, in the order they run: `app` first, before this process imports torch."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    names = (
        f"benchmarks to run: {', '.join(BENCHMARKS)}; by default all but conformance, which needs 5 GB of memory and "
        "3 GB of disk, and on a CPU all but streaming"
    )
    parser.add_argument("names", nargs="*", type=_name, metavar="NAME", help=names)
    parser.add_argument("--quick", action="store_true", help="a version of a minute; its figures mean little")
    parser.add_argument("--model", default="picturebook", help="built-in name, folder, or owner/name@revision")
    parser.add_argument("--device", default=None, help="torch device; the best one available by default")
    parser.add_argument(
        "--out", type=Path, default=cache_folder("benchmark"), help="folder of the report, as Markdown and JSON"
    )
    parser.add_argument(
        "--store",
        action="store_true",
        help="also store the tables in the repository, and write training/benchmark/README.md from all that is stored",
    )


def main(arguments: argparse.Namespace) -> None:
    """Measure, write the report and print it."""
    if arguments.store and arguments.quick:
        raise SystemExit("--store keeps results that others read: it does not go with --quick.")
    load = report.load_now()
    run = BenchmarkRun(arguments.model, arguments.device, arguments.quick, arguments.out)
    chosen = [name for name in BENCHMARKS if _wanted(name, arguments.names, run)]
    by_name = {name: load_benchmark(name).tables(run) for name in chosen}
    tables = [table for made in by_name.values() for table in made]
    device = str(run.model.device) if "model" in vars(run) else arguments.device or "the app's default"
    made = report.origin(" ".join(["python -m training", *sys.argv[1:]]), load, device)
    report.write(arguments.out, "Benchmark", made, tables)
    print(report.markdown("Benchmark", made, tables))
    if arguments.store:
        for name in chosen:
            store(HERE, name, by_name[name], made)
        write_readme(HERE, readme())


def load_benchmark(name: str) -> Benchmark[Any]:
    """Import a benchmark."""
    entry = BENCHMARKS[name]
    benchmark = getattr(importlib.import_module(entry.module), entry.attribute)
    if not isinstance(benchmark, Benchmark):
        raise TypeError(f"{entry.module}.{entry.attribute} is not a Benchmark.")
    return benchmark


def readme() -> str:
    """The README of all stored results."""
    loaded = {name: load_benchmark(name) for name in BENCHMARKS}
    sections = [Section(name, one.title, one.description) for name, one in loaded.items()]
    return render(HERE, "Benchmark results", INTRO, "python -m training benchmark", sections)


def _wanted(name: str, names: Sequence[str], run: BenchmarkRun) -> bool:
    """Whether a benchmark runs. The device is looked up only where it matters, because that imports torch."""
    if names:
        return name in names
    entry = BENCHMARKS[name]
    return not entry.on_request and (not entry.needs_accelerator or run.resolved_device != "cpu")


def _name(name: str) -> str:
    if name not in BENCHMARKS:
        near = difflib.get_close_matches(name, BENCHMARKS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise argparse.ArgumentTypeError(f"there is no benchmark {name!r}; there are {', '.join(BENCHMARKS)}.{hint}")
    return name
