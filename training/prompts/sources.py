"""Prompts by number: from the embedded grammar, a text file, or a dataset.

A number always means the same prompt, so that a resumed run continues with the prompts it would have had, and each of
several processes can take its own. One prompt in `HELD_OUT` is held out from training.
"""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from core.errors import PromptError
from training.common.splits import HELD_OUT
from training.picturebook.world.captions import sample_caption, sample_story, vocabulary
from training.prompts.dataset import Check, DatasetPrompts, Split
from training.prompts.tables import SUFFIXES, captions_of, kind_of

GRAMMAR = "grammar"
"""The name by which a command line asks for the embedded grammar."""
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


class Prompts(Protocol):
    """An endless sequence of prompts; finite sources repeat."""

    def prompt(self, number: int) -> str:
        """The prompt of a number, from 0."""
        ...


def open_prompts(
    source: str,
    check: Check,
    *,
    split: Split = "train",
    column: str = "caption",
    where: Sequence[str] = (),
    positions: Path | None = None,
) -> Prompts:
    """Open the prompts of `grammar`, a text file, a local file of rows, or a Hub dataset `owner/name[@revision]`.

    Args:
        source: One of these; a file of rows is CSV, TSV, JSON, JSON Lines or Parquet, told by content and name.
        check: Raises for a prompt the model cannot encode; the grammar and text files are checked here.
        split: "test" for the held-out prompts.
        column: The column with captions, for rows; a list of texts is several prompts.
        where: Conditions on rows of a dataset, such as `aesthetic >= 5.5`.
        positions: File that notes how far a dataset was read, for a resumed run.

    Raises:
        ValueError: There is no such source, or its prompts cannot be used.
    """
    path, suffix = Path(source), Path(source).suffix.lower()
    is_file = source != GRAMMAR and path.is_file()
    if suffix in SUFFIXES and not is_file:
        raise ValueError(f"There is no file {source}.")
    is_on_hub = _HUB_ID.fullmatch(source) and not path.exists() and suffix != ".txt"
    if is_on_hub or (is_file and kind_of(path, column)):
        return DatasetPrompts(source, column, check, split, where=where, positions=positions)
    if where:
        raise ValueError(f"{source!r} has no columns for {where[0]!r}: only a dataset can be filtered.")
    if source == GRAMMAR:
        return GrammarPrompts(check, split)
    if path.exists() or path.suffix == ".txt":
        return FilePrompts(path, check, split)
    raise ValueError(f"{source!r} names no prompts: give {GRAMMAR!r}, a text file, or a Hub dataset as owner/name.")


def add_prompt_arguments(parser: argparse.ArgumentParser, more: str = "", *, defaults: bool = True) -> None:
    """Add the options for a command's prompts; without `defaults`, options not given are absent."""

    def usual(value: Any) -> Any:
        return value if defaults else argparse.SUPPRESS

    parser.add_argument(
        "--prompts",
        default=usual(GRAMMAR),
        help=f"grammar, a file (.txt, .csv, .tsv, .json, .jsonl, .parquet), or a Hub dataset{more}",
    )
    parser.add_argument("--column", default=usual("caption"), help="column with captions, for a dataset")
    parser.add_argument(
        "--where", nargs="*", default=usual([]), help="conditions on rows of a dataset: 'aesthetic >= 5.5'"
    )


class GrammarPrompts:
    """The captions of the embedded model's scenes; number n belongs to scene n."""

    def __init__(self, check: Check, split: Split = "train") -> None:
        self._split = split
        try:
            for text in (*vocabulary(), self.prompt(0)):
                check(text)
        except PromptError as error:
            raise PromptError(f"This model cannot take the grammar's captions; give it a text file. {error}") from error

    def prompt(self, number: int) -> str:
        """The caption of the scene `make_scene(number, split)`, without laying out the scene."""
        key = (("train", "test").index(self._split), number)
        story = sample_story(np.random.default_rng(key), self._split)
        return sample_caption(np.random.default_rng([*key, 2, 0]), story).text


class FilePrompts:
    """A UTF-8 text file, one prompt per line. Blank lines are skipped."""

    def __init__(self, path: Path, check: Check, split: Split = "train") -> None:
        try:
            # Some editors write a byte-order mark, which is no part of the first prompt.
            lines = path.read_bytes().decode("utf-8-sig").splitlines()
        except OSError as error:
            raise ValueError(f"The prompts in {path} could not be read: {error}") from error
        except UnicodeDecodeError as error:
            number = error.object.count(b"\n", 0, error.start) + 1
            raise ValueError(f"Line {number} of {path} is not UTF-8. Save the file as UTF-8 text.") from error
        numbered: list[tuple[int, str]] = []
        for i, line in enumerate(lines, 1):
            try:
                numbered += [(i, text) for text in captions_of(line)]
            except ValueError as error:
                raise ValueError(f"Line {i} of {path}: {error}.") from error
        if not numbered:
            raise ValueError(f"{path} holds no prompts. Write one a line.")
        for i, text in numbered:
            try:
                check(text)
            except PromptError as error:
                raise PromptError(f"Line {i} of {path}, {text!r}, cannot be used. {error}") from error
        held_out = split == "test"
        self._texts = [text for i, (_, text) in enumerate(numbered) if (i % HELD_OUT == HELD_OUT - 1) == held_out]
        if not self._texts:
            raise ValueError(f"Of {path}'s {len(numbered)} prompts none is held out: every {HELD_OUT}th is.")

    def __len__(self) -> int:
        return len(self._texts)

    def prompt(self, number: int) -> str:
        """A line of the file; after the last the first follows."""
        return self._texts[number % len(self._texts)]
