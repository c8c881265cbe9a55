import pytest

from core.diffusion.text import delete_words, distinct_words, only_words, split_words


def test_words_have_their_position_in_the_prompt() -> None:
    prompt = "A cat, a T-shirt; the dog's ball"
    words = split_words(prompt)
    assert [word.text for word in words] == ["a", "cat", "a", "t-shirt", "the", "dog's", "ball"]
    assert all(prompt[word.start : word.end].lower() == word.text for word in words)
    assert distinct_words(prompt) == ["a", "cat", "t-shirt", "the", "dog's", "ball"]
    assert split_words(" ,.! ") == []


@pytest.mark.parametrize(
    ("prompt", "gone", "left"),
    [
        ("a cat, a dog", ["cat"], "a, a dog"),
        ("a cat, a dog", ["dog"], "a cat, a"),
        ("a cat, a dog", ["a"], "cat, dog"),
        ("Cat and cat", ["cat"], "and"),
        ("cat", ["cat"], ""),
        ("cat.", ["cat"], ""),
        ("a cat", ["ca"], "a cat"),
        ("a big, red, old house", ["red"], "a big, old house"),
        ("  a   cat ", [], "  a   cat "),
    ],
)
def test_deleting_takes_every_occurrence_and_tidies_up(prompt: str, gone: list[str], left: str) -> None:
    assert delete_words(prompt, gone) == left


def test_a_word_alone_stands_once() -> None:
    assert only_words("A cat and a dog", ["a"]) == "A"
    assert only_words("A cat and a dog", ["dog", "cat"]) == "cat dog"
    assert only_words("A cat", ["whale"]) == ""
