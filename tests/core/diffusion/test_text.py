from hashlib import sha256

import numpy as np
import pytest

from core.diffusion.text import delete_words, distinct_words, occurrences, only_words, replace_word, split_words
from training.picturebook.world.captions import sample_caption, sample_story


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


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("cafe\u0301 noir, CAFÉ", ["café", "noir", "café"]),
        ("हिन्दी बिल्ली", ["हिन्दी", "बिल्ली"]),
        ("แมวบนหญ้า", ["แมวบนหญ้า"]),
        ("dog’s dog's", ["dog's", "dog's"]),
        ("U.S. flag at 1,000.5 m, v1.5", ["u.s", "flag", "at", "1,000.5", "m", "v1.5"]),
        ("dog.cat:bird", ["dog", "cat", "bird"]),
        ("1girl, amane_kanata, _x_", ["1girl", "amane_kanata", "x"]),
        ("a 👩‍👩‍👧🏽🇩🇪cat ❤️ 1️⃣", ["a", "👩‍👩‍👧🏽", "🇩🇪", "cat", "❤", "1⃣"]),
        ("wa\u00adter © –", ["water"]),
    ],
)
def test_words_are_those_of_unicode(prompt: str, words: list[str]) -> None:
    assert [word.text for word in split_words(prompt)] == words


def test_a_word_is_found_however_it_is_spelt() -> None:
    assert delete_words("a cafe\u0301 noir", ["café"]) == "a noir"
    assert delete_words("the dog’s ball", ["dog's"]) == "the ball"
    assert only_words("A Cafe\u0301", "CAFÉ") == "Cafe\u0301"


def test_a_phrase_is_its_words_with_nothing_but_space_between() -> None:
    prompt = "a hot  dog, a hot, dog and a hotdog"
    assert [(word.text, word.start, word.end) for word in occurrences(prompt, "Hot dog,")] == [("hot dog", 2, 10)]
    assert delete_words(prompt, ["hot dog"]) == "a, a hot, dog and a hotdog"
    assert only_words(prompt, ["dog", "hot dog"]) == "hot  dog"
    assert replace_word(prompt, "hot dog", "bun") == "a bun, a hot, dog and a hotdog"
    assert [word.text for word in occurrences("hot dog dog", ["dog", "hot dog"])] == ["hot dog", "dog"]
    assert occurrences(prompt, "!") == []


@pytest.mark.parametrize(
    ("prompt", "gone", "left"),
    [
        ("photo (cat) now", "cat", "photo now"),
        ("a ((cat:1.3)) on [cat] {cat} (cat)1.2 (cat)++ grass", "cat", "a on grass"),
        ("a (cat:1.3) on", "1.3", "a (cat) on"),
        ("(a cat:1.3)", "a", "(cat:1.3)"),
        ("(cat, dog:1.1)", "cat", "(dog:1.1)"),
        ("{cat|dog|bird}", "dog", "{cat|bird}"),
        ("a <toy> on", "toy", "a on"),
        ('says "stop!" and "go" on it', "stop", 'says and "go" on it'),
        ('"go" cat "stop"', "cat", '"go" "stop"'),
        ("a “cat”, «cat» „cat“ 'cat' b", "cat", "a, b"),
        ("「猫」と、犬", "猫", "と、犬"),
        ("50% of $9 #cat", "cat", "50% of $9"),
        ("50% of $9 #cat", "9", "50% of #cat"),
        ("50% of $9 #cat", "50", "of $9 #cat"),
        ("cat/dog x", "cat", "dog x"),
        ("x cat/dog", "dog", "x cat"),
        ("x/cat/y", "cat", "x/y"),
        ("x - cat - y", "cat", "x - y"),
        ("cat & dog", "cat", "dog"),
        ("wow!!! a cat  sits...", "cat", "wow!!! a sits..."),
        ("3.5 cats", "cats", "3.5"),
        ("a🐱b", "🐱", "a b"),
    ],
)
def test_what_is_left_could_have_been_written(prompt: str, gone: str, left: str) -> None:
    assert delete_words(prompt, gone) == left


@pytest.mark.parametrize(
    ("n_captions", "digest"),
    [
        (60, "6f8085602232a2fbd56d3755d82803fcc007598b825bc1fb5e96187564673e99"),
        pytest.param(
            2000, "66d4e99c940cab3a04a129d5d5dfc93ffd369f4a19a65d1570b582ff227bf95b", marks=pytest.mark.slow
        ),
    ],
)  # fmt: skip
def test_texts_that_the_embedded_model_was_trained_on_are_still_made(n_captions: int, digest: str) -> None:
    rng, hashed = np.random.default_rng(0), sha256()
    for _ in range(n_captions):
        text = sample_caption(rng, sample_story(rng)).text
        words = distinct_words(text)
        texts = [text, *words]
        for i, word in enumerate(words):
            texts += [delete_words(text, [word]), only_words(text, [word])]
            for other in words[i + 1 :]:
                texts += [delete_words(text, [word, other]), only_words(text, [word, other])]
        hashed.update("\n".join(texts).encode())
    assert hashed.hexdigest() == digest
