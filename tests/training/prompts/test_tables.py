"""Local files of captions: what is read as what, and what is refused with its row and the reason."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from training.prompts.dataset import DatasetPrompts
from training.prompts.sources import FilePrompts, open_prompts
from training.prompts.tables import captions_of, kind_of


def takes_all(_: str) -> None:
    """A model that can spell anything."""


def first(path: Path, n: int = 3, **options: Any) -> list[str]:
    prompts = open_prompts(str(path), takes_all, **options)
    return [prompts.prompt(i) for i in range(n)]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("c.csv", "file_name,caption\n1.jpg,a cat\n2.jpg,\n3.jpg,a dog\n4.jpg,NaN\n"),
        ("c.CSV", '\ufeffcaption;url\n"a cat";x\na dog;y\n'),
        ("c.tsv", "caption\turl\na cat\thttp://example.org/1,2.jpg\na dog\tx\n"),
        ("c.csv", "caption\na cat\na dog\n"),
        ("c.txt", "file_name,caption\n1.jpg,a cat\n2.jpg,a dog\n"),
        ("c.ndjson", '{"caption": "a cat"}\n\n{"caption": null}\n{"caption": NaN}\n{"caption": "a dog"}\n'),
        ("c.JSONL", '"a cat"\n"a dog"\n'),
        ("c.jsonl", '[{"caption": "a cat"},\n {"caption": "a dog"}]'),
        ("c.json", '{"caption": "a cat"}\n{"caption": "a dog"}\n'),
        ("c.json", '["a cat", "a dog"]'),
        ("c.json", '{"caption": ["a cat", "a dog"]}'),
        ("c.json", '{"info": {}, "images": [{"id": 1}], "annotations": [{"caption": "a cat"}, {"caption": "a dog"}]}'),
        ("c.txt", '{"caption": "a cat"}\n{"caption": "a dog"}\n'),
        ("c.txt", "a cat\n\na dog\n"),
        ("c", "a cat\na dog\n"),
        ("c.csv", 'caption,n\n"[""a cat"", ""a dog""]",1\n'),  # as pandas writes a list
        ("c.csv", "caption,n\n\"['a cat', 'a dog']\",1\n"),
        ("c.jsonl", '{"caption": ["a cat", null, " a dog "]}\n'),
    ],
)
def test_a_file_is_read_as_what_it_holds(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_bytes(text.encode())
    assert first(tmp_path / name) == ["a cat", "a dog", "a cat"]


def test_parquet_is_known_by_its_content_and_its_lists_are_several_prompts(tmp_path: Path) -> None:
    path = tmp_path / "table.data"
    pq.write_table(pa.table({"caption": [["a cat", "one cat"], None, [], ["a dog"]], "image": [b"\x80"] * 4}), path)
    assert first(path, 4) == ["a cat", "one cat", "a dog", "a cat"]
    pq.write_table(pa.table({"caption": pa.array(["a cat", "a dog"]).dictionary_encode(), "n": [1, 2]}), path)
    assert first(path, 2, where=["n >= 2"]) == ["a dog", "a dog"]


def test_captions_of_one_row_are_of_one_split(tmp_path: Path) -> None:
    path = tmp_path / "five.jsonl"
    path.write_text("".join(json.dumps({"caption": [f"{n} {i}" for i in range(5)]}) + "\n" for n in range(20)))
    test = open_prompts(str(path), takes_all, split="test")
    assert [test.prompt(n) for n in range(11)] == [f"{n} {i}" for n in (9, 19) for i in range(5)] + ["9 0"]
    train = open_prompts(str(path), takes_all)
    assert {train.prompt(n).split()[0] for n in range(90)} == {str(n) for n in range(20) if n % 10 != 9}


def test_positions_lie_between_rows_and_a_resumed_run_has_the_same_prompts(tmp_path: Path) -> None:
    path, noted = tmp_path / "three.jsonl", tmp_path / "noted.json"
    path.write_text("".join(json.dumps({"caption": [f"{n} {i}" for i in range(3)]}) + "\n" for n in range(2_000)))
    whole = DatasetPrompts(str(path), "caption", takes_all, positions=noted)
    expected = [whole.prompt(n) for n in range(5_000)]
    assert [n for n, _, _ in json.loads(noted.read_text())["noted"]] == [0, 1_026, 2_049, 3_072, 4_098]
    again = DatasetPrompts(str(path), "caption", takes_all, positions=noted)
    for n in (4_999, 1_025, 1_026, 3_000, 0):
        assert again.prompt(n) == expected[n]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.jsonl", b"", "holds no rows"),
        ("c.jsonl", b'{"caption": "a cat"}\n{"caption": "a d\n', r"Row 2 of .*c\.jsonl: it is no JSON .* cut short"),
        ("c.jsonl", b'{"caption": "a cat"}\n{"caption": 7}\n', r"Row 2 of .*, column 'caption': 7 is no text but int"),
        ("c.jsonl", b'{"caption": "a cat"}\n{"caption": {"en": "a"}}\n', "Row 2 .* is no text but a mapping of en"),
        ("c.jsonl", b'{"caption": "a cat"}\n["a"]\n', "Row 2 .* is neither an object with 'caption' nor a text"),
        ("c.jsonl", b'{"caption": "a cat"}\n{"text": "a"}\n', "no column 'caption'. It has: text"),
        ("c.jsonl", b'{"caption": "a \\ud800"}\n', "Row 1 .* half a character"),
        ("c.jsonl", b'{"caption": "a cat"}\n{"caption": "caf\xe9"}\n', "Row 2 .* line 2 is not UTF-8"),
        (
            "c.json",
            b'{"1.jpg": "a cat"}',
            r"no one list of rows with 'caption'. Its keys are: \['1.jpg'\]",
        ),
        ("c.json", b'[{"caption": "a cat"}, {"cap', r"Row 1 of .*c\.json: it is no JSON"),
        ("c.csv", b"caption,n\na cat, on the grass,1\n", "Row 1 .* has 3 fields and the header 2. Put texts with ','"),
        ("c.csv", b'caption,n\na cat,1\n"a dog,2\n', "Row 2 .* it is no CSV .* a quote is not closed"),
        ("c.csv", b"text,n\na cat,1\n", "no column 'caption'. It has: n, text"),
        ("c.csv", b"caption,n\n\"b'a cat'\",1\n", "Row 1 .* is bytes written as text"),
        ("c.csv", b"caption,n\n\"{'raw': 'a'}\",1\n", "Row 1 .* is dict written as text"),
        ("c.csv", b"caption,n\n\"['a cat' 'a dog']\",1\n", "Row 1 .* is a list without commas"),
        ("c.parquet", b"a cat\n", "is no Parquet file"),
        ("c.parquet", b"PAR1 and what was cut", "Row 1 of .* damaged or cut short"),
        ("c.txt", b"\x1f\x8b\x08", "is compressed by gzip. Unpack it"),
        ("c.xlsx", b"PK\x03\x04", "is a zip archive or a spreadsheet"),
        ("c.txt", "a cat".encode("utf-16"), "is UTF-16. Save it as UTF-8"),
        ("c.txt", b"a cat\0", "has null bytes"),
        ("c.txt", b"a cat\n{'en': 'a dog'}\n", "Line 2 of .* is dict written as text"),
    ],
)
def test_what_is_no_text_is_refused_with_row_and_reason(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        open_prompts(str(tmp_path / name), takes_all)


def test_a_column_of_bytes_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"caption": [b"a cat"]}), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"Row 1 of .* is no text but bytes"):
        open_prompts(str(tmp_path / "b.parquet"), takes_all)


def test_texts_that_look_like_code_are_texts() -> None:
    for text in ("[cat] on the grass", "(a cat:1.3), grass", "{red|blue} cat", "none of the cats", "a 'cat' 'dog'"):
        assert captions_of(text) == [text]


def test_lists_in_a_text_file_are_several_prompts(tmp_path: Path) -> None:
    (tmp_path / "c.txt").write_text("a whale\n['a cat', 'a dog']\n")
    assert kind_of(tmp_path / "c.txt", "caption") is None
    assert len(FilePrompts(tmp_path / "c.txt", takes_all)) == 3


def test_a_caption_of_a_megabyte_is_read(tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_text(f"caption,n\n{'cat ' * 300_000},1\na dog,2\n")
    assert len(first(tmp_path / "c.csv", 1)[0]) == 1_199_999


def test_texts_of_csv_are_compared_as_numbers(tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_text("caption,aesthetic\na cat,10.5\na dog,5\na whale,\n")
    assert first(tmp_path / "c.csv", 2, where=["aesthetic >= 6"]) == ["a cat", "a cat"]
    (tmp_path / "c.csv").write_text("caption,aesthetic\na cat,good\n")
    with pytest.raises(ValueError, match="does not fit the column's value 'good'"):
        first(tmp_path / "c.csv", 1, where=["aesthetic >= 6"])
