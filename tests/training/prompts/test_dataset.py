import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from core.errors import UnknownWordError
from tests.fakes.hub import Hub, environment
from training.prompts import dataset as dataset_prompts
from training.prompts.dataset import Condition, DatasetPrompts
from training.prompts.sources import open_prompts


def takes_all(_: str) -> None:
    """A model that can spell anything."""


def refuses_whales(prompt: str) -> None:
    if "whale" in prompt:
        raise UnknownWordError({"whale": []})


class FakeRows:
    """A streamed dataset that counts the rows it hands over, and can be taken up where it was left."""

    def __init__(self, texts: list[Any], column: str = "caption") -> None:
        self.texts, self.column, self.n_read, self.asked = texts, column, 0, list[tuple[Any, ...]]()
        self.at, self.first = 0, 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for at in range(self.first, len(self.texts)):
            self.at, self.n_read = at, self.n_read + 1
            yield {"score": at, self.column: self.texts[at]}

    def state_dict(self) -> dict[str, Any]:
        return {"next": self.at + 1}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.first = state.get("next", 0)


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> FakeRows:
    rows = FakeRows([f"prompt {n}" for n in range(40)])

    def load_dataset(name: str, *, split: str, streaming: bool, revision: str | None) -> FakeRows:
        if name != "some/captions":
            raise OSError("no such repository")
        rows.asked.append((split, streaming, revision))
        return rows

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return rows


def test_a_dataset_is_streamed_once_and_begins_again(rows: FakeRows) -> None:
    prompts = open_prompts("some/captions@abc", takes_all)
    train = [n for n in range(40) if n % 10 != 9]
    assert [prompts.prompt(n) for n in range(36)] == [f"prompt {n}" for n in train]
    assert rows.asked == [("train", True, "abc")]
    assert rows.n_read == 39
    assert prompts.prompt(36 + 5) == "prompt 5"
    assert prompts.prompt(36 * 7 + 35) == "prompt 38"
    held_out = DatasetPrompts("some/captions", "caption", takes_all, "test")
    assert [held_out.prompt(n) for n in range(5)] == ["prompt 9", "prompt 19", "prompt 29", "prompt 39", "prompt 9"]


def test_rows_that_cannot_be_used_are_left_out_of_their_split(rows: FakeRows) -> None:
    rows.texts[3], rows.texts[4], rows.texts[8], rows.texts[19] = None, "  ", "a whale", "whales"
    prompts = DatasetPrompts("some/captions", "caption", refuses_whales)
    assert [prompts.prompt(n) for n in range(7)] == [f"prompt {n}" for n in (0, 1, 2, 5, 6, 7, 10)]
    held_out = DatasetPrompts("some/captions", "caption", refuses_whales, "test")
    assert [held_out.prompt(n) for n in range(4)] == [f"prompt {n}" for n in (9, 29, 39, 9)]


@pytest.mark.usefixtures("rows")
def test_a_filter_leaves_no_prompt_twice_and_none_that_fails_it() -> None:
    prompts = open_prompts("some/captions", takes_all, where=["score >= 20", "caption ~ [02468]$"])
    seen = [prompts.prompt(n) for n in range(10)]
    assert seen == [f"prompt {n}" for n in (20, 22, 24, 26, 28, 30, 32, 34, 36, 38)]
    assert prompts.prompt(10) == "prompt 20"
    with pytest.raises(ValueError, match=r"Of the 40 rows .* none can be used; the last: .*'score > 99'"):
        open_prompts("some/captions", takes_all, where=["score > 99"])
    with pytest.raises(ValueError, match=r"no column 'aesthetic'. It has: caption, score"):
        open_prompts("some/captions", takes_all, where=["aesthetic > 5"])
    with pytest.raises(ValueError, match="'score ~ 3' does not fit the column's value 0"):
        open_prompts("some/captions", takes_all, where=["score ~ 3"])


@pytest.mark.parametrize(
    ("text", "passes"),
    [
        ("a >= 2.5", [False, False, True, False]),
        ("a < 2.5", [True, True, False, False]),
        ("a != 1", [False, True, True, False]),
        ("b == true", [True, False, True, False]),
        ("c == en", [True, False, False, False]),
        ('c == "de at"', [False, True, False, False]),
        ("c ~ ^..$", [True, False, True, False]),
    ],
)
def test_conditions(text: str, passes: list[bool]) -> None:
    rows = [
        {"a": 1, "b": True, "c": "en"},
        {"a": 2, "b": False, "c": "de at"},
        {"a": 3.5, "b": True, "c": "fr"},
        {"a": None, "b": None, "c": None},
    ]
    assert [Condition.parse(text).passes(row) for row in rows] == passes


@pytest.mark.parametrize("text", ["", "a", "a = 1", ">= 1", "a >=", "a ~ ("])
def test_what_is_no_condition_is_told(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a condition: write COLUMN|is not a regular expression"):
        Condition.parse(text)


def test_a_run_that_is_taken_up_again_reads_on_where_it_was(rows: FakeRows, tmp_path: Path) -> None:
    rows.texts = [f"prompt {n}" if n % 3 else None for n in range(20_000)]
    noted = tmp_path / "prompts.json"
    whole = DatasetPrompts("some/captions", "caption", takes_all, positions=noted)
    expected = [whole.prompt(n) for n in range(5_000)]
    for start in (0, 1_000, 4_100, 4_990):
        again = DatasetPrompts("some/captions", "caption", takes_all, positions=noted)
        rows.n_read = 0
        assert [again.prompt(n) for n in range(start, start + 8)] == expected[start : start + 8]
        assert rows.n_read < 1_800
    without = DatasetPrompts("some/captions", "caption", takes_all)
    rows.n_read = 0
    assert without.prompt(4_990) == expected[4_990]
    assert rows.n_read > 8_000
    # What was noted of other prompts, or damaged, counts for nothing.
    for other in ({"where": ["score >= 7"]}, {"split": "test"}):
        path = tmp_path / "copy.json"
        path.write_bytes(noted.read_bytes())
        differently = DatasetPrompts("some/captions", "caption", takes_all, positions=path, **other)  # type: ignore[arg-type]
        alone = DatasetPrompts("some/captions", "caption", takes_all, **other)  # type: ignore[arg-type]
        assert [differently.prompt(n) for n in (1_200, 0)] == [alone.prompt(n) for n in (1_200, 0)]
    noted.write_text("{")
    assert DatasetPrompts("some/captions", "caption", takes_all, positions=noted).prompt(9) == expected[9]


def test_the_end_is_noted_too(rows: FakeRows, tmp_path: Path) -> None:
    noted = tmp_path / "prompts.json"
    assert DatasetPrompts("some/captions", "caption", takes_all, positions=noted).prompt(100) == "prompt 31"
    again = DatasetPrompts("some/captions", "caption", takes_all, positions=noted)
    rows.n_read = 0
    assert again.prompt(36_000_000) == "prompt 0"
    assert rows.n_read == 0


def test_a_dataset_that_cannot_be_used_says_why(rows: FakeRows, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="'other/captions' could not be opened: no such repository"):
        open_prompts("other/captions", takes_all)
    with pytest.raises(ValueError, match=r"has no column 'text'. It has: caption, score"):
        open_prompts("some/captions", takes_all, column="text")
    rows.texts = ["a whale"] * 50
    with pytest.raises(ValueError, match=r"Of the 50 rows .* none can be used; the last: .*'whale'"):
        open_prompts("some/captions", refuses_whales)
    monkeypatch.setattr(dataset_prompts, "_MOST_REFUSED", 20)
    with pytest.raises(ValueError, match=r"20 rows in turn .* cannot be used; the last: .*'whale'"):
        open_prompts("some/captions", refuses_whales)
    for texts in ([], ["a cat"] * 9):
        rows.texts = texts
        with pytest.raises(ValueError, match=rf"Of the {len(texts)} rows of .* none can be used"):
            open_prompts("some/captions", takes_all, split="test")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="pip install datasets"):
        open_prompts("some/captions", takes_all)


STREAM = """
import json, sys
from pathlib import Path
from training.prompts.sources import open_prompts

for start in (1100, 1200):
    prompts = open_prompts(
        "some/pictures", lambda _: None, column="text", where=["score >= 1"], positions=Path(sys.argv[1])
    )
    print(json.dumps([prompts.prompt(n) for n in range(start, start + 4)]))
"""


def test_the_real_library_streams_from_the_hub_and_goes_on_in_the_shard_where_it_was(hub: Hub, tmp_path: Path) -> None:
    texts = [f"picture {n}" for n in range(4_000)]
    for shard in range(8):
        some = texts[shard * 500 : (shard + 1) * 500]
        path = tmp_path / f"train-{shard:05d}-of-00008.parquet"
        pq.write_table(pa.table({"text": some, "score": [n % 2 for n in range(len(some))]}), path)
        hub.put("dataset", "some/pictures", {f"data/{path.name}": path.read_bytes()})
    expected = [text for n, text in enumerate(texts) if n % 2 and n % 10 != 9]
    line = [sys.executable, "-c", STREAM, str(tmp_path / "noted.json")]
    told = {**os.environ, **environment(hub, tmp_path)}
    done = subprocess.run(line, env=told, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    first, second = (json.loads(line) for line in done.stdout.splitlines())
    assert first == expected[1_100:1_104]
    assert second == expected[1_200:1_204]
    noted = json.loads((tmp_path / "noted.json").read_text())["noted"]
    assert [(n, row) for n, row, _ in noted] == [(0, 0), (1_024, 2_558)]
    read = Counter(int(path.split("-")[1]) for path in hub.asked("resolve", "GET"))
    assert [read[shard] for shard in (1, 2, 3)] == [1, 1, 1]  # the second time on from the row noted in the sixth
    assert read[6] == 1  # where the second prompts are


def test_the_real_library_reads_a_local_table_round_and_round(tmp_path: Path) -> None:
    path = tmp_path / "some.parquet"
    pq.write_table(
        pa.table({"caption": [f"picture {n}" for n in range(50)], "score": [n % 2 for n in range(50)]}), path
    )
    prompts = open_prompts(str(path), takes_all, where=["score >= 1"], positions=tmp_path / "noted.json")
    assert [prompts.prompt(n) for n in (18, 19, 20, 3)] == [f"picture {n}" for n in (45, 47, 1, 7)]


def test_a_local_file_of_lines_of_json(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"caption": f"prompt {n}", "n": n}) + "\n" for n in range(30)))
    prompts = open_prompts(str(path), takes_all, where=["n > 4"])
    assert [prompts.prompt(n) for n in (0, 4, 5, 21, 22)] == [f"prompt {n}" for n in (5, 10, 11, 28, 5)]
