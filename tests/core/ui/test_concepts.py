"""The Concepts tab with a small collection of SAEs that have tables, and hand-made codes."""

import json
import re
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gradio_client import Client
from gradio_client.exceptions import AppError
from PIL import Image

from core.activations.hooks import ActivationKey
from core.concepts.gallery import GalleryImage, write_gallery
from core.concepts.table import load_concepts
from core.concepts.trace import CodeTrace, SaeSite
from core.sae.autoencoder import Code
from core.sae.collection import write_index
from core.ui.backend.dictionary import ConceptDictionary
from core.ui.backend.runtime import Runtime
from core.ui.concepts.card import MAX_HITS, card_html, kind_html, kinds_html, search_html
from core.ui.concepts.results import FIRST_LEVEL, FIRST_NUMBER, N_LEVELS, find_site, pack, site_key
from core.ui.concepts.tab import concepts_html, found_html, opened_html
from core.ui.look.scene import Scene
from core.ui.look.theme import launch_options
from core.ui.page import build_demo
from tests.core.concepts.test_table import DOWN, IDS, MIDDLE, NAMES, UP, write_one
from tests.core.ui.conftest import App, Visitor
from tests.fakes.engine import FakeEngine, paint

SITES = tuple(SaeSite(i.hookpoint, i.branch) for i in IDS[:3])
HERE = SaeSite(MIDDLE, "cond")
WHALE = 2


@pytest.fixture(scope="module")
def dictionary(tmp_path_factory: pytest.TempPathFactory) -> ConceptDictionary:
    root = tmp_path_factory.mktemp("saes")
    for seed, sae_id in enumerate(IDS):
        write_one(root, sae_id, seed=seed)
    write_index(root, IDS)
    images = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    write_gallery(root, images, [GalleryImage("a ship", 3), GalleryImage("a <whale> in the sea", 4)], 16)
    return ConceptDictionary(str(root), {}, {p: load_concepts(root, *p) for p in SITES}, {})


def trace() -> CodeTrace:
    """Three steps; at the middle block, the whale comes in the upper left cell, above a weak unnamed one."""
    codes = {}
    for site in SITES:
        for step in range(3):
            indices = torch.tensor([[1, WHALE], [1, 0], [1, 0], [1, 0]])
            values = torch.tensor([[0.125, 0.25 * step], [0.125, 0.0], [0.125, 0.0], [0.125, 0.0]])
            codes[ActivationKey(*site, step)] = Code(indices, values)
    return CodeTrace(codes, dict.fromkeys((DOWN, MIDDLE, UP), (2, 2)), 3)


@pytest.fixture
def scene() -> Scene:
    return Scene(paint("a cat", 0), "a cat", 0, 3, 4.0, ("data:,",) * 3)


def ready(dictionary: ConceptDictionary | None) -> Runtime:
    runtime = Runtime(engine=FakeEngine())
    runtime.ready.set()
    runtime._dictionary = dictionary
    return runtime


def test_packed_codes_are_sorted_and_can_be_unpacked(dictionary: ConceptDictionary) -> None:
    found = json.loads(pack(dictionary, trace()))
    assert found["steps"] == 3
    assert next(iter(found["sites"])) == site_key(HERE)  # the default site
    codes = found["sites"][site_key(HERE)]
    assert (codes["grid"], codes["each"]) == ([2, 2], 2)
    numbers = (np.array([ord(one) for one in codes["numbers"]]) - FIRST_NUMBER).reshape(3, 4, 2)
    levels = (np.array([ord(one) for one in codes["levels"]]) - FIRST_LEVEL).reshape(3, 4, 2)
    assert numbers[2, 0].tolist() == [WHALE, 1]
    # The 99th percentile of every concept is 0.5.
    assert levels[2, 0].tolist() == [N_LEVELS, round(N_LEVELS / 4)]
    assert levels[0, 0].tolist() == [round(N_LEVELS / 4), 0]
    assert {number: entry[:4] for number, entry in codes["names"].items()} == {
        "1": ["", "unlabelled", 0.5, 0.5],
        "2": ["whale", "object", 0.5, 0.5],
    }
    # The usual shares of all concepts of a table add up to 1.
    assert all(0 <= entry[4] <= 1 for entry in codes["names"].values())
    assert find_site(dictionary, site_key(HERE)) == HERE
    assert find_site(dictionary, "attic|cond") is None


def test_the_weakest_entries_are_dropped_first(dictionary: ConceptDictionary, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("core.ui.concepts.results.MAX_ENTRIES", 12)
    codes = json.loads(pack(dictionary, trace()))["sites"][site_key(HERE)]
    assert (codes["each"], len(codes["numbers"])) == (1, 12)
    assert ord(codes["numbers"][8]) - FIRST_NUMBER == WHALE


def test_a_card_shows_everything_about_a_concept(dictionary: ConceptDictionary) -> None:
    card = card_html(dictionary, HERE, WHALE, trace())
    text = unescape(re.sub("<[^>]+>", "", card))
    assert "whale concept (SAE feature 2) · middle, with the prompt" in text
    assert "It is active on 50 % of all cells" in text
    assert card.count("<figure") == 2
    assert "a &lt;whale&gt; in the sea, seed 4" in card
    assert "In your picture, step by step" in card
    # No decoder direction is near, so only the two best whales of two other blocks are offered.
    assert "No other concept here points in nearly the same direction" in text
    assert card.count("concept-button") == 2 * 2
    assert 'class="id-button id-steer"' in card
    assert "All concepts of “whale”" in text
    assert 'load_concepts("' in text
    assert "In your picture" not in card_html(dictionary, HERE, WHALE)
    assert "not active at any step" in card_html(dictionary, HERE, 3, trace())
    assert "more in <b>night</b> images" in card_html(dictionary, HERE, 7)
    assert "depends on the position alone" in card_html(dictionary, HERE, 8)
    assert "No class of the masks fits it better than chance" in card_html(dictionary, HERE, 1)


def test_a_search_covers_all_blocks_or_suggests_the_nearest_labels(dictionary: ConceptDictionary) -> None:
    found = search_html(dictionary, " Whale ", None)
    assert "6 concepts" in found
    assert found.index('data-number="2"') < found.index('data-number="0"')  # the better fitting first
    assert "No concept is labelled “zeppelin”" in (nothing := search_html(dictionary, "zeppelin", None))
    assert 2 <= nothing.count("data-find=") <= 5
    assert "&lt;b&gt;" in search_html(dictionary, "<b>", None)
    assert search_html(dictionary, " ", None) == kinds_html(dictionary)
    numbered = search_html(dictionary, "2", None)
    assert numbered.count('data-number="2"') == len(dictionary.tables)
    assert "none has the number 99999" in search_html(dictionary, "99999", None)
    assert MAX_HITS >= 6


def test_concepts_are_browsed_by_kind(dictionary: ConceptDictionary) -> None:
    browse = kinds_html(dictionary)
    assert re.findall(r'data-kind="([\w-]+)">[^<]+<b>(\d+)', browse) == [
        ("object", "18"), ("background", "3"), ("style", "3"), ("context-free", "3"), ("unlabelled", "3"),
    ]  # fmt: skip
    unnamed = kind_html(dictionary, "unlabelled")
    assert "nearest to sun" in unnamed
    assert unnamed.count("concept-button") == 3
    assert "depends on the position alone" in kind_html(dictionary, "context-free")
    assert "There is no kind" in kind_html(dictionary, "fruit")


def test_an_empty_panel_says_why(dictionary: ConceptDictionary, scene: Scene) -> None:
    runtime = ready(dictionary)
    panel = concepts_html(runtime, scene, trace())
    assert panel.count('type="radio"') == 3 + 1
    assert json.loads(unescape(re.search('data-codes="([^"]*)"', panel)[1]))["steps"] == 3  # type: ignore[index]
    assert "will appear here" in concepts_html(runtime, None, None)
    assert "python -m training labels" in concepts_html(ready(None), scene, None)


def test_a_card_that_cannot_be_opened_says_why(dictionary: ConceptDictionary) -> None:
    runtime = ready(dictionary)
    assert "There is no concept 99" in opened_html(runtime, site_key(HERE), 99, None)
    assert "There are no concepts at “&lt;attic" in opened_html(runtime, "<attic|cond", 1, None)
    for wrong in (None, "abc", "1.5", "nan", [1]):
        assert "must be a whole number" in opened_html(runtime, site_key(HERE), wrong, None)
    assert "whale" in opened_html(runtime, site_key(HERE), str(WHALE), None)
    assert "still being loaded" in opened_html(Runtime(engine=FakeEngine()), site_key(HERE), 1, None)
    assert "still being loaded" in found_html(Runtime(engine=FakeEngine()), "cat")
    assert "no labelled concepts" in opened_html(ready(None), site_key(HERE), 1, None)
    assert "no labelled concepts" in found_html(ready(None), "cat")


@pytest.fixture(scope="module")
def concepts_app(examples_dir: Path, dictionary: ConceptDictionary) -> Iterator[App]:
    """The page with concepts."""
    runtime = Runtime(engine=FakeEngine(), examples_dir=examples_dir)
    demo = build_demo(runtime)
    _, url, _ = demo.launch(prevent_thread_lock=True, quiet=True, **launch_options())
    runtime.start()
    assert runtime.ready.wait(20)
    runtime._dictionary = dictionary
    yield App(demo, runtime, url)
    demo.close()


def test_a_client_searches_and_looks_up(concepts_app: App) -> None:
    client = Client(concepts_app.url, verbose=False, ssl_verify=False)
    model, concepts_app.runtime._model = concepts_app.runtime._model, None  # the stand-in has no text encoder
    try:
        found = client.predict("ship", api_name="/concepts")
        assert [hit["hookpoint"] for hit in found["hits"]] == [DOWN, MIDDLE, UP]
        assert found["hits"][0]["number"] == 5
        assert found["nearest"] == []
        assert client.predict("zeppelin", api_name="/concepts")["nearest"]
    finally:
        concepts_app.runtime._model = model
    found: Any = client.predict("", "cond", WHALE, api_name="/concept")
    assert (found["hookpoint"], found["label"], found["kind"]) == (MIDDLE, "whale", "object")
    assert found["scores"]["held_out_iou"] == pytest.approx(0.6)
    assert [image["prompt"] for image in found["gallery"]] == ["a <whale> in the sea", "a ship"]
    assert len(found["neighbours"]) == min(8, len(NAMES) - 1)
    for wrong, message in (
        (("", "cond", len(NAMES)), "There is no concept 10"),
        (("", "cond", 1.5), "whole"),
        (("attic", "cond", 1), "no concepts at “attic”"),
        (("", "cond", "many"), "not “many”"),
    ):
        with pytest.raises(AppError, match=message):
            client.predict(*wrong, api_name="/concept")
    with pytest.raises(AppError, match="blank"):
        client.predict(" ", api_name="/concepts")


def test_a_cached_trace_is_shown(concepts_app: App) -> None:
    visitor = Visitor(concepts_app)
    cat = ("a cat", 0, 3, 4)
    ticket = int(visitor.run("begin_generate", *cat)["data"][0])
    concepts_app.runtime._dictionary, dictionary = None, concepts_app.runtime._dictionary
    try:
        visitor.run("generate_image", ticket, *cat, None)  # the stand-in cannot be traced
    finally:
        concepts_app.runtime._dictionary = dictionary
    scene = Scene(paint("a cat", 0), "a cat", 0, 3, 4.0)
    concepts_app.runtime.cache_trace(scene.key, trace())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("core.ui.events.layout_html", lambda *_: "")
        panel, browse, _ = visitor.run("trace", None, "")["data"]
    assert 'class="id-active"' in panel
    assert "Or browse" in browse
