"""Prompts by number, for streams of generated pictures: the embedded grammar, a text file, or a dataset on the Hub.

A number always means the same prompt, so that a run that was killed goes on with the prompts that it would have had,
and each of several processes can take its own. One prompt in `HELD_OUT` is kept from training.
"""

import importlib
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from core.errors import PromptError
from training.picturebook.captions import HELD_OUT, sample_caption, sample_story, vocabulary

Split = Literal["train", "test"]
Check = Callable[[str], None]
"""Raises a `PromptError` for a prompt that the model cannot take; a `Diffuser`'s `check_prompt`."""

GRAMMAR = "grammar"
"""The name by which a command line asks for the embedded grammar."""
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
_ROWS_KEPT = 1024
_MOST_SKIPPED = 1000

log = logging.getLogger(__name__)


class Prompts(Protocol):
    """Prompts without end: finite ones begin again."""

    def prompt(self, number: int) -> str:
        """The prompt of a number, from 0."""
        ...


def open_prompts(source: str, check: Check, *, split: Split = "train", column: str = "caption") -> Prompts:
    """Prompts of `grammar`, of a text file, or of a Hub dataset `owner/name[@revision]`.

    Args:
        source: Which of the three.
        check: What the model can take; the grammar and files are checked here, before any work.
        split: "test" for the prompts that are kept from training.
        column: Of a Hub dataset: where its captions are.

    Raises:
        ValueError: No such source, or prompts that cannot be used.
    """
    if source == GRAMMAR:
        return GrammarPrompts(check, split)
    if Path(source).exists() or source.endswith(".txt"):
        return FilePrompts(Path(source), check, split)
    if _HUB_ID.fullmatch(source):
        return HubPrompts(source, column, check, split)
    raise ValueError(f"{source!r} names no prompts: give {GRAMMAR!r}, a text file, or a Hub dataset as owner/name.")


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


class HubPrompts:
    """The captions of a dataset on the Hub, read as a stream; nothing is stored.

    A row that is blank or that the model cannot take gives way to the next one of its split that it can.
    """

    def __init__(self, source: str, column: str, check: Check, split: Split = "train") -> None:
        self._source, self._column, self._check, self._held_out = source, column, check, split == "test"
        name, _, revision = source.partition("@")
        datasets = _datasets()
        try:
            self._dataset: Any = datasets.load_dataset(name, split="train", streaming=True, revision=revision or None)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"The dataset {source!r} could not be opened: {error}\nIt has to exist, be reachable, be open to you "
                f"(`hf auth login`), and have a split named train."
            ) from error
        self._rows: Iterator[Any] = iter(())
        self._next = 0
        self._kept: dict[int, str] = {}
        self._length: int | None = None
        self.prompt(0)  # a wrong column shows now

    def prompt(self, number: int) -> str:
        """A row's caption; after the last row comes the first again.

        Raises:
            ValueError: No such column, no rows, or a thousand rows in turn that the model cannot take.
        """
        refused: str | PromptError = "all of them are blank"
        for n in range(number, number + _MOST_SKIPPED):
            text = self._row(self._row_number(n)).strip()
            if not text:
                continue
            try:
                self._check(text)
            except PromptError as error:
                refused = error
                continue
            return text
        raise ValueError(f"{_MOST_SKIPPED} rows in turn of {self._source!r} cannot be used; the last: {refused}")

    def _row_number(self, number: int) -> int:
        if self._held_out:
            return number * HELD_OUT + HELD_OUT - 1
        return number + number // (HELD_OUT - 1)

    def _row(self, number: int) -> str:
        """The caption of a row. Rows in turn are read as they come; a leap, as when a run resumes, skips to its row."""
        if self._length is not None:
            number %= self._length
        if number in self._kept:
            return self._kept[number]
        if not self._next <= number < self._next + _ROWS_KEPT or not self._kept:
            self._rows, self._next, self._kept = iter(self._dataset.skip(number)), number, {}
        for row in self._rows:
            self._keep(row)
            if self._next > number:
                return self._kept[number]
        # At the end. A start beyond it tells nothing of the length: then the rows are counted, once.
        n = self._next if self._kept else sum(1 for _ in self._dataset)
        self._length = n - n % HELD_OUT  # so that the split stays one after the last row
        if not self._length:
            raise ValueError(f"The dataset {self._source!r} has {n} rows; at least {HELD_OUT} are needed.")
        log.info("the %d prompts of %s begin again", self._length, self._source)
        return self._row(number)

    def _keep(self, row: dict[str, Any]) -> None:
        if self._column not in row:
            raise ValueError(f"{self._source!r} has no column {self._column!r}. It has: {', '.join(sorted(row))}.")
        self._kept[self._next] = str(row[self._column] or "")
        self._kept.pop(self._next - _ROWS_KEPT, None)
        self._next += 1


def _datasets() -> Any:
    try:
        return importlib.import_module("datasets")
    except ModuleNotFoundError as error:
        raise ValueError("Prompts from the Hub need the datasets library: pip install datasets") from error
