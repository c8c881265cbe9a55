"""`python -m training report`: write the READMEs of all results that are stored in the repository.

`training/evaluate/README.md` and `training/benchmark/README.md` show the tables that `evaluate NAME --store` and
`benchmark NAME --store` put into `results/` beside them; the top-level README has a headline table of six of them.
"""

import argparse
from pathlib import Path

from training.benchmark import run as benchmark
from training.common.results import write_readme
from training.evaluate import run as evaluate
from training.pipeline import headline


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("--check", action="store_true", help="write nothing, and fail if a README is out of date")


def main(arguments: argparse.Namespace) -> None:
    """Write all READMEs, or check them."""
    for folder, text in readmes().items():
        if not arguments.check:
            print(write_readme(folder, text))
        elif not is_current(folder, text):
            raise SystemExit(f"{folder / 'README.md'} is out of date: run `python -m training report`.")


def readmes() -> dict[Path, str]:
    """The text of each README, by its folder."""
    top = headline.written(headline.README.read_text(encoding="utf-8"), headline.table())
    return {evaluate.HERE: evaluate.readme(), benchmark.HERE: benchmark.readme(), headline.README.parent: top}


def is_current(folder: Path, text: str) -> bool:
    """Whether the README in a folder has this text."""
    path = folder / "README.md"
    return path.is_file() and path.read_text(encoding="utf-8") == text
