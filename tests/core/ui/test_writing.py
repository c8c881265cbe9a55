"""Small parts of the page's words: shares of pictures, code blocks, the words that a model knows."""

import json
from pathlib import Path

import pytest

from core.spec import BUILT_IN
from core.ui.backend.wordlist import WORDLIST, load_wordlist
from core.ui.look.blocks import code_html, downloads_html, link_or_reason, table_html
from core.ui.look.viewer import status_html, viewer_html
from core.ui.look.words import _left
from training.picturebook.world.wordlist import wordlist, write_wordlist


@pytest.mark.parametrize(
    ("bits", "text"),
    [
        (0.5, "about 71% of them"),
        (3, "about one in 8"),
        (4.5, "about one in 23"),
        (18, "about one in 260,000"),
        (25, "about one in 34 million"),
        (33, "about one in 8.6 billion"),
        (61, "one in 2 to the power of 61"),
    ],
)
def test_bits_as_a_share_of_the_pictures_is_text_without_markup(bits: float, text: str) -> None:
    assert _left(bits) == text


def test_what_scrolls_is_reached_by_keyboard() -> None:
    assert 'tabindex="0"' in table_html("<tbody></tbody>", "Numbers")
    assert '<pre tabindex="0"' in code_html("a < b")
    assert "a &lt; b" in code_html("a < b")
    assert "<i>" in code_html("<i>", marked=True)


def test_a_result_that_has_no_link_says_why() -> None:
    assert "Copy link" in downloads_html([], link=link_or_reason(uploaded=False))
    told = downloads_html([("CSV", "a.csv", "data:,")], link=link_or_reason(uploaded=True))
    assert "Copy link" not in told
    assert "your own picture stays in this browser tab" in told


def test_a_job_names_the_image_that_it_will_draw() -> None:
    assert 'data-asked="prompt=a+cat&amp;seed=1"' in status_html("Waiting", 0.0, asked="prompt=a+cat&seed=1")
    assert 'data-asked=""' in status_html()


def test_the_picture_is_reached_by_keyboard() -> None:
    assert 'class="id-canvas" tabindex="0"' in viewer_html(None)


def test_the_stored_words_are_those_of_the_grammar(tmp_path: Path) -> None:
    assets = BUILT_IN["picturebook"].assets
    assert assets is not None
    write_wordlist(tmp_path / WORDLIST)
    assert (assets / WORDLIST).read_bytes() == (tmp_path / WORDLIST).read_bytes()
    document = wordlist()
    known = {word for one in document["objects"] for word in one["words"]}
    for one in document["objects"]:
        assert len(one["swaps"]) == 3
        assert known.issuperset(one["swaps"])
        assert not set(one["swaps"]) & set(one["words"])


def test_only_a_model_with_a_list_offers_words(tmp_path: Path) -> None:
    assert load_wordlist(None) is None
    assert load_wordlist(tmp_path) is None
    (tmp_path / WORDLIST).write_text(
        json.dumps({"objects": [{"words": ["c<t"], "swaps": []}], "backgrounds": [], "styles": [], "relations": []})
    )
    offered = load_wordlist(tmp_path)
    assert offered is not None
    assert 'data-word="c&lt;t"' in offered.html
    assert "Surprise me" in offered.html
