import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from core.diffuser import Diffuser
from core.errors import PromptError, UnknownWordError
from core.vocabulary import Vocabulary
from training.picturebook.scenes import caption_of, make_scene
from training.picturebook.tokens import build_tokenizer
from training.prompts import FilePrompts, GrammarPrompts, HubPrompts, open_prompts


def takes_all(_: str) -> None:
    """A model that can spell anything."""


def refuses_whales(prompt: str) -> None:
    if "whale" in prompt:
        raise UnknownWordError({"whale": []})


def test_the_grammar_numbers_its_captions_as_its_scenes() -> None:
    known = Vocabulary(build_tokenizer())
    for split in ("train", "test"):
        prompts = GrammarPrompts(known.check, split)
        for number in (5, 0, 123_456):
            assert prompts.prompt(number) == caption_of(make_scene(number, split)).text


def test_no_caption_of_the_grammar_is_longer_or_stranger_than_the_embedded_model_reads() -> None:
    known = Vocabulary(build_tokenizer())
    prompts = GrammarPrompts(known.check)
    for number in range(300):
        known.check(prompts.prompt(number))


def test_a_model_that_lacks_the_grammars_words_says_so_at_once(model: Diffuser) -> None:
    with pytest.raises(PromptError, match=r"cannot take the grammar's captions.*does not know"):
        open_prompts("grammar", model.check_prompt)


def test_a_file_has_a_prompt_a_line_and_begins_again(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa cat\r\n\r\n  a café  \n \na dog".encode())
    prompts = FilePrompts(path, takes_all)
    assert [prompts.prompt(n) for n in range(5)] == ["a cat", "a café", "a dog", "a cat", "a café"]
    assert len(prompts) == 3


def test_one_line_in_ten_is_held_out(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("\n\n".join(f"prompt {n}" for n in range(25)))
    train, test = open_prompts(str(path), takes_all), open_prompts(str(path), takes_all, split="test")
    seen = {train.prompt(n) for n in range(100)}
    assert {test.prompt(n) for n in range(100)} == {"prompt 9", "prompt 19"}
    assert seen == {f"prompt {n}" for n in range(25) if n not in (9, 19)}
    path.write_text("a cat")
    with pytest.raises(ValueError, match="1 prompts none is held out"):
        FilePrompts(path, takes_all, "test")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no prompts. Write one a line"),
        (b"\n  \r\n", "holds no prompts"),
        (b"a cat\na caf\xe9\n", "Line 2 of .* is not UTF-8. Save the file as UTF-8"),
        ("a cat\n".encode("utf-16"), "Line 1 of .* is not UTF-8"),
        (b"a cat\n\na whale in the sea\n", "Line 3 of .*, 'a whale in the sea', cannot be used. .*know 'whale'"),
    ],
)
def test_a_file_that_cannot_be_used_says_why(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        FilePrompts(path, refuses_whales)


def test_what_names_no_prompts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"could not be read.*No such file"):
        open_prompts(str(tmp_path / "missing.txt"), takes_all)
    with pytest.raises(ValueError, match=r"could not be read.*directory"):
        open_prompts(str(tmp_path), takes_all)
    with pytest.raises(ValueError, match="'laion' names no prompts: give 'grammar', a text file, or"):
        open_prompts("laion", takes_all)


class FakeRows:
    """A streamed dataset that counts the rows it hands over."""

    def __init__(self, texts: list[str | None], column: str = "caption") -> None:
        self.texts, self.column, self.n_read, self.n_skips = texts, column, 0, 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self._from(0)

    def skip(self, n: int) -> Iterator[dict[str, Any]]:
        self.n_skips += 1
        return self._from(n)

    def _from(self, n: int) -> Iterator[dict[str, Any]]:
        for text in self.texts[n:]:
            self.n_read += 1
            yield {"url": "", self.column: text}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> FakeRows:
    rows = FakeRows([f"prompt {n}" for n in range(40)])
    asked: list[tuple[Any, ...]] = []

    def load_dataset(name: str, *, split: str, streaming: bool, revision: str | None) -> FakeRows:
        if name != "some/captions":
            raise OSError("no such repository")
        asked.append((split, streaming, revision))
        return rows

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    rows.asked = asked  # type: ignore[attr-defined]
    return rows


def test_a_hub_dataset_is_streamed_once_and_begins_again(hub: FakeRows) -> None:
    prompts = open_prompts("some/captions@abc", takes_all)
    train = [n for n in range(40) if n % 10 != 9]
    assert [prompts.prompt(n) for n in range(36)] == [f"prompt {n}" for n in train]
    assert hub.asked == [("train", True, "abc")]  # type: ignore[attr-defined]
    assert (hub.n_read, hub.n_skips) == (39, 1)
    assert prompts.prompt(36 + 5) == "prompt 5"
    assert prompts.prompt(36 * 7 + 35) == "prompt 38"
    held_out = HubPrompts("some/captions", "caption", takes_all, "test")
    assert [held_out.prompt(n) for n in range(5)] == ["prompt 9", "prompt 19", "prompt 29", "prompt 39", "prompt 9"]


def test_a_resumed_hub_dataset_skips_what_was_consumed(hub: FakeRows) -> None:
    whole = HubPrompts("some/captions", "caption", takes_all)
    expected = [whole.prompt(n) for n in range(200)]
    for start in (1, 20, 35, 36, 77, 150):
        hub.n_read = 0
        resumed = HubPrompts("some/captions", "caption", takes_all)
        assert [resumed.prompt(n) for n in range(start, start + 6)] == expected[start : start + 6]
    hub.texts, hub.n_read = [f"prompt {n}" for n in range(3000)], 0
    resumed = HubPrompts("some/captions", "caption", takes_all)
    assert resumed.prompt(2250) == "prompt 2500"
    assert hub.n_read == 2  # the first row, which shows a wrong column, and the one asked for


def test_rows_that_cannot_be_used_give_way_to_the_next_of_their_split(hub: FakeRows) -> None:
    hub.texts = [f"prompt {n}" for n in range(40)]
    hub.texts[3], hub.texts[4], hub.texts[8], hub.texts[19] = None, "  ", "a whale", "whales"
    prompts = HubPrompts("some/captions", "caption", refuses_whales)
    assert [prompts.prompt(n) for n in (2, 3, 4, 5, 8, 9)] == [f"prompt {n}" for n in (2, 5, 5, 5, 10, 10)]
    held_out = HubPrompts("some/captions", "caption", refuses_whales, "test")
    assert [held_out.prompt(n) for n in range(3)] == ["prompt 9", "prompt 29", "prompt 29"]


def test_a_hub_dataset_that_cannot_be_used_says_why(hub: FakeRows, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="'other/captions' could not be opened: no such repository"):
        open_prompts("other/captions", takes_all)
    with pytest.raises(ValueError, match=r"has no column 'text'. It has: caption, url"):
        open_prompts("some/captions", takes_all, column="text")
    hub.texts = ["a whale"] * 50
    with pytest.raises(ValueError, match=r"1000 rows in turn .* cannot be used; the last: .*'whale'"):
        open_prompts("some/captions", refuses_whales)
    hub.texts = []
    with pytest.raises(ValueError, match="has 0 rows; at least 10 are needed"):
        open_prompts("some/captions", takes_all)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="pip install datasets"):
        open_prompts("some/captions", takes_all)
