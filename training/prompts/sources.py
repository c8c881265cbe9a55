"""Prompts by number, for streams of generated pictures: the embedded grammar, a text file, or a dataset.

A number always means the same prompt, so that a run that was killed goes on with the prompts that it would have had,
and each of several processes can take its own. One prompt in `HELD_OUT` is kept from training.
"""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from core.errors import PromptError
from training.picturebook.world.captions import HELD_OUT, sample_caption, sample_story, vocabulary
from training.prompts.dataset import FORMATS, Check, DatasetPrompts, Split

GRAMMAR = "grammar"
"""The name by which a command line asks for the embedded grammar."""
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


class Prompts(Protocol):
    """Prompts without end: finite ones begin again."""

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
    """Prompts of `grammar`, of a text file, of a local file of rows, or of a Hub dataset `owner/name[@revision]`.

    Args:
        source: Which of them; a file with rows ends in `.jsonl` or `.parquet`.
        check: What the model can take; the grammar and text files are checked here, before any work.
        split: "test" for the prompts that are kept from training.
        column: Of a dataset: where its captions are.
        where: Of a dataset: conditions that a row has to fulfil, as `aesthetic >= 5.5`.
        positions: Of a dataset: file in which it is noted how far it was read, for a run that is taken up again.

    Raises:
        ValueError: No such source, or prompts that cannot be used.
    """
    path = Path(source)
    if path.suffix in FORMATS or (_HUB_ID.fullmatch(source) and not path.exists() and path.suffix != ".txt"):
        if path.suffix in FORMATS and not path.is_file():
            raise ValueError(f"There is no file {source}.")
        return DatasetPrompts(source, column, check, split, where=where, positions=positions)
    if where:
        raise ValueError(f"{source!r} has no columns for {where[0]!r}: only a dataset can be filtered.")
    if source == GRAMMAR:
        return GrammarPrompts(check, split)
    if path.exists() or path.suffix == ".txt":
        return FilePrompts(path, check, split)
    raise ValueError(f"{source!r} names no prompts: give {GRAMMAR!r}, a text file, or a Hub dataset as owner/name.")


def add_prompt_arguments(parser: argparse.ArgumentParser, more: str = "", *, defaults: bool = True) -> None:
    """The options that say where a command's prompts come from; without defaults what is not given is left out."""

    def usual(value: Any) -> Any:
        return value if defaults else argparse.SUPPRESS

    parser.add_argument(
        "--prompts", default=usual(GRAMMAR), help=f"grammar, a .txt, .jsonl or .parquet file, or a Hub dataset{more}"
    )
    parser.add_argument("--column", default=usual("caption"), help="of a dataset: where its captions are")
    parser.add_argument(
        "--where", nargs="*", default=usual([]), help="of a dataset: what a row fulfils: 'aesthetic >= 5.5'"
    )


class GrammarPrompts:
    """The captions of the embedded model's scenes: number n is that of scene n."""

    def __init__(self, check: Check, split: Split = "train") -> None:
        self._split = split
        try:
            for text in (*vocabulary(), self.prompt(0)):
                check(text)
        except PromptError as error:
            raise PromptError(f"This model cannot take the grammar's captions; give it a text file. {error}") from error

    def prompt(self, number: int) -> str:
        """The caption of the scene `make_scene(number, split)`, which is not laid out for it."""
        key = (("train", "test").index(self._split), number)
        story = sample_story(np.random.default_rng(key), self._split)
        return sample_caption(np.random.default_rng([*key, 2, 0]), story).text


class FilePrompts:
    """A text file of UTF-8, one prompt a line. Blank lines are skipped."""

    def __init__(self, path: Path, check: Check, split: Split = "train") -> None:
        try:
            # Some editors begin a file with a mark of its byte order, which is no part of the first prompt.
            lines = path.read_bytes().decode("utf-8-sig").splitlines()
        except OSError as error:
            raise ValueError(f"The prompts in {path} could not be read: {error}") from error
        except UnicodeDecodeError as error:
            line = error.object.count(b"\n", 0, error.start) + 1
            raise ValueError(f"Line {line} of {path} is not UTF-8. Save the file as UTF-8 text.") from error
        numbered = [(i, text) for i, line in enumerate(lines, 1) if (text := line.strip())]
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
        """A line of the file; after the last comes the first again."""
        return self._texts[number % len(self._texts)]
