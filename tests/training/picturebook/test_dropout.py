"""Which words training texts lack: counted over many, against the shares that were asked for."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from core.diffusion.text import delete_words, distinct_words, only_words
from training.picturebook.world.captions import Caption, Story, sample_caption, sample_story
from training.picturebook.world.dropout import WordDropout, drop_words

N = 3000


def kind_of(caption: Caption, text: str) -> str:
    """What was left out, read from the text alone."""
    if not text:
        return "empty"
    slots = {
        **dict.fromkeys(caption.words, "object"),
        **({caption.background_word: "background"} if caption.background_word else {}),
        **({caption.story.style: "style"} if caption.style_named else {}),
        **({caption.story.relation: "relation"} if caption.story.relation else {}),
    }
    left = set(distinct_words(caption.text)) - set(distinct_words(text))
    if delete_words(caption.text, left) == text and len(left) == 1:
        return f"without {slots.get(left.pop(), 'another')}"
    words = distinct_words(text)
    if len(words) == 1:
        return f"only {slots.get(words[0], 'another')}"
    chosen = words if only_words(caption.text, words) == text and len(words) == 2 else left
    return f"two, {'content' if set(chosen) <= set(slots) else 'another'}"


def shares(dropout: WordDropout, seed: int = 0) -> Counter[str]:
    rng = np.random.default_rng(seed)
    captions = [sample_caption(rng, sample_story(rng)) for _ in range(N)]
    counts = Counter(kind_of(caption, drop_words(rng, caption, dropout)) for caption in captions)
    return Counter({kind: n / N for kind, n in counts.items()})


def test_what_is_asked_is_what_is_left_out() -> None:
    seen = shares(WordDropout())
    without = {slot: seen[f"without {slot}"] for slot in ("object", "background", "style", "relation")}
    alone = sum(seen[f"only {slot}"] for slot in without)
    assert seen["empty"] == pytest.approx(0.25, abs=0.025)
    # A caption has 1.8 objects, .75 backgrounds, .5 styles and .4 relations: their shares of the words to choose from.
    assert without["object"] == pytest.approx(0.22, abs=0.03)
    assert without["background"] == pytest.approx(0.085, abs=0.02)
    assert without["style"] == pytest.approx(0.055, abs=0.02)
    assert without["relation"] == pytest.approx(0.04, abs=0.015)
    assert alone == pytest.approx(0.11, abs=0.025)
    assert seen["two, content"] == pytest.approx(0.185, abs=0.03)
    # Articles and prepositions: rare, but never unseen.
    assert 0.002 < seen["without another"] < 0.04
    assert 0.002 < seen["only another"] < 0.03


def test_any_words_alone_seldom_lack_exactly_one_object() -> None:
    """What even choice among all words gave: one text in twenty lacked one object, and more lacked an article."""
    none = WordDropout(empty=1 / 3, without_one=0, without_two=0, one=0, two=0, any_words=2 / 3)
    seen = shares(none)
    assert seen["without object"] == pytest.approx(0.045, abs=0.015)
    assert seen["without another"] > seen["without object"]


def test_each_kind_makes_the_texts_that_attribution_compares() -> None:
    story = Story(("cat", "dog"), "left", "grass", "sepia")
    caption = Caption(story, ("cat", "hound"), "and", "grass", False, True, True, "")
    content = ["cat", "hound", "grass", "sepia", "left"]
    assert list(caption.content_words) == content
    nothing = WordDropout(**dict.fromkeys(("empty", "without_one", "without_two", "one", "two"), 0.0), any_words=1.0)
    rng = np.random.default_rng(0)

    def texts(kind: str) -> set[str]:
        only = replace(nothing, any_words=0.0, **{kind: 1.0}) if kind != "any_words" else nothing
        return {drop_words(rng, caption, only) for _ in range(600)}

    pairs = [(a, b) for i, a in enumerate(content) for b in content[i + 1 :]]
    assert texts("empty") == {""}
    assert texts("without_one") == {delete_words(caption.text, [word]) for word in content}
    assert texts("without_two") == {delete_words(caption.text, pair) for pair in pairs}
    assert texts("one") == set(content)
    assert texts("two") == {only_words(caption.text, pair) for pair in pairs}
    anything = texts("any_words")
    for word in distinct_words(caption.text):
        assert delete_words(caption.text, [word]) in anything
        assert word in anything


def test_a_caption_of_one_content_word_has_partial_texts() -> None:
    caption = Caption(Story(("cat",), None, "grass", "plain"), ("cat",), "and", None, False, False, False, "")
    rng = np.random.default_rng(0)
    assert {drop_words(rng, caption, WordDropout()) for _ in range(300)} == {"", "a", "cat", "a cat"}


def test_shares_that_do_not_add_up_are_refused() -> None:
    with pytest.raises(ValueError, match=r"add up to 1, not 1\.25"):
        WordDropout(empty=0.5)
    with pytest.raises(ValueError, match="at least 0"):
        WordDropout(empty=-0.1, any_words=0.43)
