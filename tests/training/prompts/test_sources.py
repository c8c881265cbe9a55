from pathlib import Path

import pytest

from core.diffusion.diffuser import Diffuser
from core.diffusion.vocabulary import Vocabulary
from core.errors import PromptError, UnknownWordError
from training.picturebook.world.scenes import caption_of, make_scene
from training.picturebook.world.tokens import build_tokenizer
from training.prompts.sources import FilePrompts, GrammarPrompts, open_prompts


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
    with pytest.raises(ValueError, match=r"There is no file no/where\.parquet"):
        open_prompts("no/where.parquet", takes_all)
    with pytest.raises(ValueError, match="'grammar' has no columns for 'a == 1'"):
        open_prompts("grammar", takes_all, where=["a == 1"])
