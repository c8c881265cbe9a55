"""Prompts from a dataset on the Hub or a local file of rows, streamed; nothing of it is stored.

Prompt n is the n-th caption, in the order of the rows of its split, of those that pass the filter and that the model
can encode; a row may have several. Its row is known only after reading all rows before it, so the position of about
every 1,024th prompt is noted in a file, and a resumed run continues from there.
"""

import importlib
import json
import logging
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from core.errors import PromptError
from core.files import write_text
from training.common.splits import HELD_OUT
from training.prompts.tables import LocalRows, check_row, kind_of

Split = Literal["train", "test"]
Check = Callable[[str], None]
"""Raises a `PromptError` for a prompt that the model cannot encode; `Diffuser.check_prompt`."""

_KEPT = 1024
"""Prompts kept in memory, and prompts between two noted positions."""
_MOST_REFUSED = 20_000

_COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
    "~": lambda value, pattern: re.search(pattern, value) is not None,
}
_CONDITION = re.compile(r"\s*([\w.\-]+)\s*(==|!=|>=|<=|>|<|~)\s*([^\s=].*?)\s*")

log = logging.getLogger(__name__)


class Condition(NamedTuple):
    """A condition on rows."""

    text: str
    """As the user wrote it."""
    column: str
    compare: Callable[[Any, Any], bool]
    value: Any

    @classmethod
    def parse(cls, text: str) -> "Condition":
        """Parse `COLUMN OPERATOR VALUE`, such as `aesthetic >= 5.5`; `~` searches for a regular expression.

        Raises:
            ValueError: It does not have this form.
        """
        match = _CONDITION.fullmatch(text)
        if match is None:
            raise ValueError(f"{text!r} is not a condition: write COLUMN, one of {' '.join(_COMPARE)}, and a value.")
        column, sign, written = match.groups()
        try:
            value = re.compile(written) if sign == "~" else json.loads(written)
        except re.error as error:
            raise ValueError(f"{text!r}: {written} is not a regular expression: {error}.") from error
        except ValueError:
            value = written  # a word without quotes
        return cls(text, column, _COMPARE[sign], value)

    def passes(self, row: Mapping[str, Any]) -> bool:
        """Whether a row fulfils the condition; an empty cell does not.

        Raises:
            ValueError: The column's values cannot be compared in this way.
        """
        cell = row[self.column]
        if cell is None or cell == "":
            return False
        try:
            if isinstance(cell, str) and isinstance(self.value, int | float):
                cell = float(cell)  # CSV has texts only
            return self.compare(cell, self.value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self.text!r} does not fit the column's value {row[self.column]!r}.") from error


class _Position(NamedTuple):
    """A position in the dataset."""

    n: int
    """Prompts of the split read so far."""
    row: int
    """Rows read so far."""
    state: Mapping[str, Any]
    """State of the datasets library, to continue without reading earlier rows; empty: the first row."""


class DatasetPrompts:
    """The captions of a dataset. Name a revision on the Hub: if rows change, numbers mean other prompts."""

    def __init__(
        self,
        source: str,
        column: str,
        check: Check,
        split: Split = "train",
        *,
        where: Sequence[str] = (),
        positions: Path | None = None,
    ) -> None:
        """Open the dataset and, unless an earlier run has, read its first prompt, so that errors show at once.

        Args:
            source: `owner/name[@revision]` on the Hub, or a local file of rows (`training.prompts.tables`).
            column: The column with captions, each a text or a list of texts.
            check: Raises for a prompt that the model cannot encode.
            split: "test" for the held-out rows, every `HELD_OUT`-th.
            where: Conditions that a row has to fulfil.
            positions: File for the noted positions; None: a resumed run reads from the start.

        Raises:
            ValueError: It cannot be opened, has no such column, no usable row, or a local file a row that is no text.
        """
        self._source, self._column, self._check, self._held_out = source, column, check, split == "test"
        self._where = [Condition.parse(text) for text in where]
        self._columns = [column, *(condition.column for condition in self._where)]
        self._key, self._file = [source, column, split, *where], positions
        self._length: int | None = None
        start = _Position(0, 0, {})
        self._noted = {0: start}
        self._load()
        self._dataset: Any = _open(source, self._columns, is_new=len(self._noted) == 1)
        self._go_to(start)
        if len(self._noted) == 1:  # else an earlier run has shown that all is well
            self.prompt(0)

    def prompt(self, number: int) -> str:
        """The prompt of a number; after the last the first follows.

        Raises:
            ValueError: There is no such column, or too many consecutive rows cannot be used.
        """
        if self._length is not None:
            number %= self._length
        if number not in self._cached:
            self._go_near(number)
        while number not in self._cached:
            if not self._read():
                self._note_end()
                return self.prompt(number)
        return self._cached[number]

    def _go_near(self, number: int) -> None:
        """Go to the last noted position before a prompt, unless reading on is shorter."""
        nearest = self._noted[max(n for n in self._noted if n <= number)]
        if not nearest.n <= self._n <= number:
            self._go_to(nearest)

    def _go_to(self, position: _Position) -> None:
        self._n, self._row, self._cached = position.n, position.row, dict[int, str]()
        self._dataset.load_state_dict(dict(position.state))
        self._rows: Iterator[Any] = iter(self._dataset)

    def _read(self) -> bool:
        """Read the next row of the split with a prompt; False at the end."""
        n_refused, refused = 0, ""
        while (row := self._next_row()) is not None:
            number, self._row = self._row, self._row + 1
            if (number % HELD_OUT == HELD_OUT - 1) != self._held_out:
                continue
            texts, refused = self._use(row)
            if texts:
                self._take(texts)
                return True
            n_refused += 1
            if n_refused == _MOST_REFUSED:
                raise ValueError(f"{n_refused} rows in turn of {self._source!r} cannot be used; the last: {refused}")
        if not self._n:
            why = f"; the last: {refused}" if refused else f": every {HELD_OUT}th is held out"
            raise ValueError(f"Of the {self._row} rows of {self._source!r} none can be used{why}")
        return False

    def _next_row(self) -> Mapping[str, Any] | None:
        try:
            row: Mapping[str, Any] | None = next(self._rows, None)
        except Exception as error:  # of the datasets library and all that it reads with
            if isinstance(self._dataset, LocalRows):
                raise  # our own
            raise ValueError(f"Row {self._row + 1} of {self._source!r} could not be read: {error}") from error
        return row

    def _take(self, texts: Sequence[str]) -> None:
        """Keep a row's prompts, and note the position after it from time to time."""
        before = self._n
        self._cached.update(enumerate(texts, before))
        self._n += len(texts)
        while len(self._cached) > _KEPT + len(texts):
            del self._cached[next(iter(self._cached))]
        if self._n // _KEPT > before // _KEPT and self._n not in self._noted:
            self._noted[self._n] = _Position(self._n, self._row, self._dataset.state_dict())
            self._save()

    def _use(self, row: Mapping[str, Any]) -> tuple[list[str], str]:
        """A row's prompts, and if there are none the reason."""
        captions = check_row(row, self._row, self._source, self._columns)
        if not captions:
            return [], "it is blank"
        if failed := [condition.text for condition in self._where if not condition.passes(row)]:
            return [], f"it does not fulfil {failed[0]!r}"
        texts, refused = [], ""
        for text in captions:
            try:
                self._check(text)
                texts.append(text)
            except PromptError as error:
                refused = str(error)
        return texts, refused

    def _note_end(self) -> None:
        if self._length is None:
            self._length = self._n
            self._save()
        log.info("all %d prompts of %s were read; starting again from the first", self._length, self._source)

    def _save(self) -> None:
        if self._file is None:
            return
        noted = {"of": self._key, "length": self._length, "noted": list(self._noted.values())}
        self._file.parent.mkdir(parents=True, exist_ok=True)
        write_text(self._file, json.dumps(noted) + "\n", shared=True)

    def _load(self) -> None:
        """Load the positions that an earlier run noted for the same prompts."""
        if self._file is None or not self._file.is_file():
            return
        try:
            stored = json.loads(self._file.read_text(encoding="utf-8"))
            if stored["of"] == self._key:
                self._length = stored["length"]
                self._noted |= {position[0]: _Position(*position) for position in stored["noted"]}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            log.warning("%s is damaged; reading the prompts from the start", self._file)


def _open(source: str, columns: Sequence[str], *, is_new: bool) -> Any:
    """Open the dataset as a stream; a local file that is new is read through once, to find rows that are no text."""
    path = Path(source)
    if path.is_file() and (kind := kind_of(path, columns[0])):
        return LocalRows(path, kind, columns[0], columns[1:], check=is_new)
    try:
        datasets = importlib.import_module("datasets")
    except ModuleNotFoundError as error:
        raise ValueError("Prompts from a dataset need the datasets library: pip install datasets") from error
    name, _, revision = source.partition("@")
    try:
        return datasets.load_dataset(name, split="train", streaming=True, revision=revision or None)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"The dataset {source!r} could not be opened: {error}\nIt has to exist, be reachable, be open to you "
            f"(`hf auth login`), and have a split named train."
        ) from error
