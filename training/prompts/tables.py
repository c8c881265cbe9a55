"""Local files of captions: what kind of file it is, its rows, and the captions in a cell.

A file's kind is told by its content first and by its name second. What is no text is an error that names the row: a
list, bytes or a header line would train as well as a caption does.
"""

import ast
import csv
import json
import math
import re
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any, Literal

Kind = Literal["csv", "json", "jsonl", "parquet"]
Row = dict[str, Any]

SUFFIXES: dict[str, Kind] = {
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
}
"""Suffixes of files of rows, in lower case."""
_DELIMITERS = ",\t;|"
_PARQUET = b"PAR1"
_OTHERS = {
    b"\x1f\x8b": "compressed by gzip. Unpack it",
    b"BZh": "compressed by bzip2. Unpack it",
    b"\x28\xb5\x2f\xfd": "compressed by zstd. Unpack it",
    b"PK\x03\x04": "a zip archive or a spreadsheet. Unpack it, or save it as CSV",
    b"ARROW1": "an Arrow file. Save it as Parquet",
    b"\x80\x04": "a pickle, which is never loaded. Save it as Parquet or JSON Lines",
    b"\x80\x05": "a pickle, which is never loaded. Save it as Parquet or JSON Lines",
    b"\xff\xfe": "UTF-16. Save it as UTF-8",
    b"\xfe\xff": "UTF-16. Save it as UTF-8",
}
_MISSING = ("", "nan", "none", "null", "n/a", "#n/a", "<na>")
"""What programs write for a cell without a value, in lower case."""


def kind_of(path: Path, column: str) -> Kind | None:
    """The kind of a file of rows; None for a text file with a prompt per line.

    Args:
        path: The file.
        column: The column with captions, by which a table is known whatever it is called.

    Raises:
        ValueError: It is of a kind that is not read.
    """
    try:
        with path.open("rb") as file:
            head = file.read(1 << 16)
    except OSError as error:
        raise ValueError(f"The prompts in {path} could not be read: {error}") from error
    named = SUFFIXES.get(path.suffix.lower())
    if head.startswith(_PARQUET):
        return "parquet"
    if named == "parquet":
        raise ValueError(f"{path} is no Parquet file, or its beginning is lost. Save or download it again.")
    for mark, what in _OTHERS.items():
        if head.startswith(mark):
            raise ValueError(f"{path} is {what}.")
    if b"\0" in head:
        raise ValueError(f"{path} is no text: it has null bytes. Save it as UTF-8 text.")
    lines = [line for line in head.decode("utf-8-sig", errors="replace").splitlines() if line.strip()]
    if named == "csv" or not lines:
        return named
    is_json = named is not None or isinstance(_json(lines[0]), dict | list)
    if is_json:
        # A whole object in the first of several lines: JSON Lines, whatever the name. A list: one JSON value.
        return "jsonl" if isinstance(_json(lines[0]), dict | str) and (len(lines) > 1 or named == "jsonl") else "json"
    return "csv" if any(column in fields and len(fields) > 1 for fields in _headers(lines[0]).values()) else None


class LocalRows:
    """The rows of a local file, from any of them on."""

    def __init__(
        self, path: Path, kind: Kind, column: str, others: Collection[str] = (), *, check: bool = True
    ) -> None:
        """Read the whole file once, unless an earlier run has: a row that is no text shows before hours are spent.

        Args:
            path: The file.
            kind: Its kind.
            column: The column with captions.
            others: Further columns that are needed.
            check: Whether to read it now.

        Raises:
            ValueError: It has no rows, or one that cannot be read; the message names it.
        """
        self._path, self._kind, self._column, self._needed = path, kind, column, [column, *others]
        self._first = self._next = 0
        if not check:
            return
        number = 0
        for number, row in enumerate(self._rows(), 1):
            check_row(row, number, path, self._needed)
        if not number:
            raise ValueError(f"{path} holds no rows.")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Where the next iteration starts."""
        self._first = int(state.get("row", 0))

    def state_dict(self) -> dict[str, int]:
        """Where the present iteration is."""
        return {"row": self._next}

    def __iter__(self) -> Iterator[Row]:
        first = self._first
        for number, row in enumerate(self._rows()):
            self._next = number + 1
            if number >= first:
                yield row

    def _rows(self) -> Iterator[Row]:
        """All rows; an error names the row and the file."""
        rows = _READERS[self._kind](self._path, self._needed)
        for number in count(1):
            try:
                row = next(rows, None)
            except ValueError as error:
                raise ValueError(f"Row {number} of {self._path}: {error}.") from error
            if row is None:
                return
            yield row


def check_row(row: Mapping[str, Any], number: int, source: object, columns: Sequence[str]) -> list[str]:
    """The captions of a row, in the first of these columns.

    Raises:
        ValueError: It lacks a column, or the caption is no text; the message names the row.
    """
    for column in columns:
        if column not in row:
            raise ValueError(f"{str(source)!r} has no column {column!r}. It has: {', '.join(sorted(map(str, row)))}.")
    try:
        return captions_of(row[columns[0]])
    except ValueError as error:
        raise ValueError(f"Row {number} of {source}, column {columns[0]!r}: {error}.") from error


def captions_of(value: Any) -> list[str]:
    """The captions in a cell: none where it is empty, several in a list of texts, also one that was written as text.

    Raises:
        ValueError: It is no text; the message is the rest of a sentence about the cell.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return []
    if isinstance(value, list | tuple):
        return [text for one in value for text in captions_of(one)]
    if not isinstance(value, str):
        what = f"a mapping of {', '.join(map(str, value))}" if isinstance(value, Mapping) else f"{type(value).__name__}"
        raise ValueError(f"{_short(value)} is no text but {what}")
    text = value.strip()
    if text.lower() in _MISSING:
        return []
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{_short(value)} has half a character (a lone surrogate)") from error
    literal = _literal(text)
    if isinstance(literal, list):
        if re.search(r"""(['"])\s+['"]""", text):
            raise ValueError(f"{_short(value)} is a list without commas, written as text")
        return captions_of(literal)
    if isinstance(literal, dict | bytes):
        raise ValueError(f"{_short(value)} is {type(literal).__name__} written as text")
    return [text]


def _read_lines(path: Path) -> Iterator[str]:
    """The lines of a text file, with their ends."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"line {number} is not UTF-8. Save the file as UTF-8 text") from error


def _read_jsonl(path: Path, needed: list[str]) -> Iterator[Row]:
    for line in _read_lines(path):
        if line.strip():
            yield _row(_parse(line), needed[0])


def _read_json(path: Path, needed: list[str]) -> Iterator[Row]:
    column, value = needed[0], _parse("".join(_read_lines(path)))
    if isinstance(value, dict) and column not in value:
        # As COCO's annotations: several lists, one of which has the captions.
        lists = [one for one in value.values() if isinstance(one, list) and one and isinstance(one[0], dict)]
        found = [one for one in lists if column in one[0]]
        if len(found) != 1:
            raise ValueError(f"the object has no one list of rows with {column!r}. Its keys are: {_short(list(value))}")
        value = found[0]
    elif isinstance(value, dict) and isinstance(value[column], list):
        value = [{column: one} for one in value[column]]
    for one in value if isinstance(value, list) else [value]:
        yield _row(one, column)


def _read_csv(path: Path, needed: list[str]) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)
    lines = _read_lines(path)
    first = next(lines, "")
    headers = _headers(first)
    usual = "\t" if path.suffix.lower() == ".tsv" else ","
    delimiter = next((one for one, fields in headers.items() if needed[0] in fields), usual)
    header = headers.get(delimiter, [])
    if not header:
        return
    try:
        for fields in csv.reader(lines, delimiter=delimiter, strict=True):
            if len(fields) > len(header):
                raise ValueError(
                    f"it has {len(fields)} fields and the header {len(header)}. Put texts with {delimiter!r} in quotes"
                )
            if fields:
                yield dict(zip(header, [*fields, *[None] * (len(header) - len(fields))], strict=True))
    except csv.Error as error:
        raise ValueError(f"it is no CSV ({error}): a quote is not closed, or the file is cut short") from error


def _read_parquet(path: Path, needed: list[str]) -> Iterator[Row]:
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            columns = needed if set(needed) <= set(names) else names
            for batch in file.iter_batches(columns=list(dict.fromkeys(columns))):
                yield from batch.to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"the file is damaged or cut short ({error})") from error


_READERS = {"csv": _read_csv, "json": _read_json, "jsonl": _read_jsonl, "parquet": _read_parquet}


def _headers(line: str) -> dict[str, list[str]]:
    """The fields of a header line, by delimiter."""
    found = {}
    for delimiter in _DELIMITERS:
        try:
            found[delimiter] = [field.strip() for field in next(csv.reader([line], delimiter=delimiter), [])]
        except csv.Error:
            continue
    return found


def _row(value: Any, column: str) -> Row:
    """A row of JSON: an object, or a text alone."""
    if isinstance(value, str):
        return {column: value}
    if not isinstance(value, dict):
        raise ValueError(f"{_short(value)} is neither an object with {column!r} nor a text")
    return value


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is no JSON ({error}): the file is damaged or cut short") from error


def _json(text: str) -> Any:
    """The JSON value of a text; None if it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _literal(text: str) -> Any:
    """A list, mapping or bytes that were written as text; None for a text that is no such thing."""
    if not text.startswith(("[", "{", "b'", 'b"')):
        return None
    if (value := _json(text)) is not None:
        return value
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
