"""Prompts from a dataset on the Hub or a local file of rows, streamed; nothing of it is stored.

Prompt n is the n-th row of its split that has a caption, passes the filter, and that the model can encode. Its row is
known only after reading all rows before it, so the position of every 1,024th prompt is noted in a file, and a resumed
run continues from there.
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

Split = Literal["train", "test"]
Check = Callable[[str], None]
"""Raises a `PromptError` for a prompt that the model cannot encode; `Diffuser.check_prompt`."""

FORMATS = {".jsonl": "json", ".parquet": "parquet"}
"""Suffixes of local files of rows, with the datasets library's name of the format."""
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
        if row[self.column] is None:
            return False
        try:
            return self.compare(row[self.column], self.value)
        except TypeError as error:
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
            source: `owner/name[@revision]` on the Hub, or a local file of one of `FORMATS`.
            column: The column with captions.
            check: Raises for a prompt that the model cannot encode.
            split: "test" for the held-out rows, every `HELD_OUT`-th.
            where: Conditions that a row has to fulfil.
            positions: File for the noted positions; None: a resumed run reads from the start.

        Raises:
            ValueError: It cannot be opened, or has no such column, or no usable row.
        """
        self._source, self._column, self._check, self._held_out = source, column, check, split == "test"
        self._where = [Condition.parse(text) for text in where]
        self._dataset: Any = _open(source)
        self._key, self._file = [source, column, split, *where], positions
        self._length: int | None = None
        start = _Position(0, 0, {})
        self._noted = {0: start}
        self._load()
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
        """Read the next prompt of the split; False at the end."""
        n_refused, refused = 0, ""
        for row in self._rows:
            number, self._row = self._row, self._row + 1
            if (number % HELD_OUT == HELD_OUT - 1) != self._held_out:
                continue
            text, refused = self._use(row)
            if not refused:
                self._cached[self._n] = text
                self._cached.pop(self._n - _KEPT, None)
                self._n += 1
                if self._n % _KEPT == 0 and self._n not in self._noted:
                    self._noted[self._n] = _Position(self._n, self._row, self._dataset.state_dict())
                    self._save()
                return True
            n_refused += 1
            if n_refused == _MOST_REFUSED:
                raise ValueError(f"{n_refused} rows in turn of {self._source!r} cannot be used; the last: {refused}")
        if not self._n:
            why = f"; the last: {refused}" if refused else f": every {HELD_OUT}th is held out"
            raise ValueError(f"Of the {self._row} rows of {self._source!r} none can be used{why}")
        return False

    def _use(self, row: Mapping[str, Any]) -> tuple[str, str]:
        """A row's caption, and the reason why it cannot be used, empty if it can."""
        for column in (self._column, *(condition.column for condition in self._where)):
            if column not in row:
                raise ValueError(f"{self._source!r} has no column {column!r}. It has: {', '.join(sorted(row))}.")
        text = str(row[self._column] or "").strip()
        if not text:
            return text, "it is blank"
        if failed := [condition.text for condition in self._where if not condition.passes(row)]:
            return text, f"it does not fulfil {failed[0]!r}"
        try:
            self._check(text)
        except PromptError as error:
            return text, str(error)
        return text, ""

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
        except (ValueError, KeyError, TypeError):
            log.warning("%s is damaged; reading the prompts from the start", self._file)


def _open(source: str) -> Any:
    """Open the dataset as a stream."""
    try:
        datasets = importlib.import_module("datasets")
    except ModuleNotFoundError as error:
        raise ValueError("Prompts from a dataset need the datasets library: pip install datasets") from error
    name, _, revision = source.partition("@")
    path = Path(source)
    try:
        if path.suffix in FORMATS:
            return datasets.load_dataset(FORMATS[path.suffix], data_files=str(path), split="train", streaming=True)
        return datasets.load_dataset(name, split="train", streaming=True, revision=revision or None)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The dataset {source!r} could not be opened: {error}\nIt has to exist, be reachable, be open to you "
            f"(`hf auth login`), and have a split named train."
        ) from error
