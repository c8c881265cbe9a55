"""Further questions: a word pair, a counterfactual word change, captions, likelihood; on the page and by the API."""

import csv
import io
import json
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError

from core.arrays import Floats
from core.ui.backend.inputs import captions_problem
from core.ui.backend.runtime import Runtime
from core.ui.look.colours import _VISIONS, SIGNED, _linear, _linear_to_oklab, signed_scale_in_oklab
from core.ui.look.images import signed_layer
from core.ui.look.scene import Scene
from core.ui.look.words import given_phrase
from core.ui.questions.counterfactual import (
    agreement,
    counterfactual_csv,
    counterfactual_html,
    counterfactual_json,
    counterfactual_python,
)
from core.ui.questions.jobs import Counterfactual
from core.ui.questions.likelihood import likelihood_csv, likelihood_html, likelihood_json, likelihood_python
from core.ui.questions.pair import pair_html
from core.ui.questions.pair_export import pair_csv, pair_json, pair_python
from core.ui.questions.ranking import chance, ranking_html, ranking_json, ranking_python, ranking_rows
from tests.core.ui.conftest import App, Visitor
from tests.core.ui.test_app import drawn, problems
from tests.fakes.engine import FakeEngine, attribution, decomposition, likelihood, paint, ranking

PROMPT = ("a cat and a dog", 1, 4, 4)
PAIR = {"first": "cat", "second": "dog", "given": "rest"}
CAPTIONS = ("a cat", "a cat and a dog", "a cat on the grass")


@pytest.fixture
def scene() -> Scene:
    return Scene(paint("a cat and a dog", 1), "a cat and a dog", 1, 4, 4.0, ("data:,",) * 4)


@pytest.fixture
def runtime() -> Runtime:
    return Runtime(engine=FakeEngine(), examples_dir=Path("/nowhere"))


def ask(visitor: Visitor, begin: str, run: str, *inputs: Any, event: Any = None, more: tuple[Any, ...] = ()) -> Any:
    """(panel, status) of a question about the visitor's image."""
    ticket, query, _ = visitor.run(begin, None, *inputs, event=event)["data"]
    return visitor.run(run, ticket, query, None, *more)["data"]


# --- colours ----------------------------------------------------------------------------------------------------------


def test_the_signed_scale_is_symmetric_in_lightness() -> None:
    lab = signed_scale_in_oklab()
    middle = len(lab) // 2
    assert len(lab) % 2 == 1
    np.testing.assert_allclose(lab[::-1, 0], lab[:, 0], atol=0.01)
    assert (np.diff(lab[middle:, 0]) > 0).all()
    np.testing.assert_allclose(_linear_to_oklab(_linear(SIGNED)), lab, atol=0.015)  # a screen can show it


def test_positive_and_negative_differ_with_any_colour_vision() -> None:
    middle = len(SIGNED) // 2
    for vision in _VISIONS:
        seen = _linear_to_oklab(np.clip(_linear(SIGNED) @ vision.T, 0, 1))
        less, more = seen[: middle - 31], seen[middle + 32 :]  # a quarter of the largest and beyond
        assert np.linalg.norm(less[:, None] - more[None], axis=2).min() > 0.1


def test_an_uncertain_signed_cell_looks_like_a_zero() -> None:
    flat = np.ones((4, 4))
    more, less, unsure, none = (
        np.asarray(signed_layer(bits * flat, half * flat, 1.0))[80, 80].astype(int)
        for bits, half in ((1, 0), (-1, 0), (-1, 2), (0, 0))
    )
    assert more[0] - more[2] > 20 > -20 > less[0] - less[2]
    assert more[3] == less[3] > none[3]
    np.testing.assert_array_equal(unsure, none)


# --- panels -----------------------------------------------------------------------------------------------------------


def test_a_pair_is_shown_in_four_parts_on_one_scale(runtime: Runtime, scene: Scene) -> None:
    d = decomposition(("cat", "dog"), "rest", 0, 8)
    panel = pair_html(runtime, scene, d)
    assert panel.count('<button type="button" class="id-part"') == 4
    assert "“cat” and “dog” together contributed" in panel
    assert "beyond the other words" in panel
    assert "only by “cat”" in panel
    pair = d.pairs[0]
    assert f'data-top="{max(abs(part.map).max() for part in pair.parts):.2g}"' in panel
    assert "Negative: together" in panel  # the synergy of these two is negative
    assert "measure the two words “on their own”" in panel


def test_a_pair_that_is_the_whole_prompt_has_no_other_words(runtime: Runtime, scene: Scene) -> None:
    d = replace(decomposition(("cat", "dog"), "rest", 0, 8), prompt="cat, dog")
    assert "compared with an empty prompt" in pair_html(runtime, scene, d)
    assert given_phrase("rest", "Cat!", ["cat"]) == given_phrase("nothing", "a cat", ["cat"])
    assert given_phrase("rest", "a cat", ["cat"]) == " beyond the other words"


def test_the_larger_part_is_named(runtime: Runtime, scene: Scene) -> None:
    d = decomposition(("cat", "dog"), "nothing", 0, 8, (12.0, 2.0))
    assert sum(part.bits for part in d.unique) > d.redundancy.bits > d.synergy.bits
    panel = pair_html(runtime, scene, d)
    assert "Mostly unique: " in panel
    assert "“cat” 12.0 and “dog” 2.0" in panel
    assert "“dog” contributed more bits than that" in panel
    assert "“cat” contributed more" not in panel


def test_the_downloads_of_a_pair_add_up(scene: Scene) -> None:
    d = decomposition(("cat", "dog"), "nothing", 0, 8, (12.0, 9.0))
    rows = {row["part"]: float(row["bits"]) for row in csv.DictReader(io.StringIO(pair_csv(d)))}
    parts = sum(rows[name] for name in ("redundancy", "unique: cat", "unique: dog", "synergy"))
    assert parts == pytest.approx(rows["together"], abs=0.001)
    assert rows["redundancy"] + rows["unique: cat"] == pytest.approx(rows["alone: cat"], abs=0.001)
    assert "synergy, by surprisal" in rows
    document = json.loads(pair_json(scene, d, "picturebook"))
    assert document["image"]["seed"] == 1
    assert np.sum(document["pairs"][0]["redundancy"]["map"]) == pytest.approx(d.redundancy.bits, abs=1e-3)
    lines = pair_python(scene, d, "picturebook")
    compile(lines, "lines", "exec")
    assert 'core.decompose(\n    model, image, "a cat and a dog", "cat", "dog",\n    given="nothing"' in lines


def change(**more: Any) -> Any:
    cells: Floats = np.zeros((16, 16))
    cells[:, :8] = np.arange(128).reshape(16, 8)
    fields: dict[str, Any] = {
        "word": "cat",
        "to": None,
        "prompt": "a cat",
        "changed_prompt": "a",
        "change": cells,
        "n_evals": 150,
    }
    images = {"before": paint("a cat", 0), "after": paint("a dog", 1)}
    return SimpleNamespace(**{**fields, **images, "relative_change": 0.4, "reconstruction_error": 0.007, **more})


def test_the_change_is_compared_with_the_map_of_the_word(runtime: Runtime, scene: Scene) -> None:
    a = attribution("a cat", ("a", "cat"), "rest", 0.1, 0, 4, 8)
    changed = change()
    counterfactual = Counterfactual(changed, a)
    assert agreement(counterfactual) == pytest.approx(np.corrcoef(changed.change.ravel(), a.maps[1].ravel())[0, 1])
    assert agreement(Counterfactual(change(change=a.maps[1]), a)) == pytest.approx(1)
    assert agreement(Counterfactual(change(change=np.ones((16, 16))), a)) is None
    assert agreement(Counterfactual(changed, None)) is None
    panel = counterfactual_html(runtime, scene, counterfactual)
    assert "<strong>40%</strong> of the picture changes" in panel
    assert "<b>0.7%</b>" in panel
    assert "being measured" in counterfactual_html(runtime, scene, Counterfactual(changed, None))
    assert "hardly more than by redrawing it" in counterfactual_html(
        runtime, scene, Counterfactual(change(relative_change=0.01), a)
    )
    assert "an empty prompt" in counterfactual_html(runtime, scene, Counterfactual(change(changed_prompt=""), a))
    assert "with “dog” for “cat”" in counterfactual_html(runtime, scene, Counterfactual(change(to="dog"), a))


def test_the_downloads_of_a_counterfactual_reproduce_it(scene: Scene) -> None:
    a = attribution("a cat", ("cat",), "rest", 0.1, 0, 4, 8)
    counterfactual = Counterfactual(change(to="dog"), a)
    rows = list(csv.DictReader(io.StringIO(counterfactual_csv(counterfactual))))
    assert len(rows) == 256
    assert sum(float(row["bits"]) for row in rows) == pytest.approx(a.bits[0], abs=1e-3)
    document = json.loads(counterfactual_json(scene, counterfactual, "picturebook"))
    assert document["reconstruction_error"] == 0.007
    lines = counterfactual_python(scene, counterfactual, "picturebook")
    compile(lines, "lines", "exec")
    assert 'core.change_word(model, image, "a cat and a dog", "cat", "dog")' in lines


def test_captions_are_ordered_by_their_direct_bits(runtime: Runtime, scene: Scene) -> None:
    r = ranking(CAPTIONS, 0.95, 0, 8)
    rows = ranking_rows(r)
    assert [row["caption"] for row in rows] == ["a cat on the grass", "a cat and a dog", "a cat"]
    assert rows[0]["behind_best"] == 0
    assert rows[2]["behind_best"] == pytest.approx(rows[0]["bits"] - rows[2]["bits"], abs=1e-3)
    assert rows[2]["p_ahead_of_next"] is None
    panel = ranking_html(runtime, scene, r)
    assert "“a cat on the grass” <strong>fits best</strong>" in panel
    assert "would put “a cat” first" in panel
    assert panel.index("a cat on the grass") < panel.index('<th scope="row"><b>3</b> a cat<')
    document = json.loads(ranking_json(scene, r, "picturebook"))
    assert document["order"] == [2, 1, 0]
    assert document["orthogonal_order"] == [0, 1, 2]
    lines = ranking_python(scene, r, "picturebook")
    compile(lines, "lines", "exec")


def test_an_uncertain_order_is_not_stated_as_a_fact(runtime: Runtime, scene: Scene) -> None:
    panel = ranking_html(runtime, scene, ranking(("a cat", "a dog"), 0.95, 1, 8))
    assert "may not be the best" in panel
    assert "fits better" not in panel
    assert [chance(p) for p in (0.5, 0.953, 0.9951, 0.99999)] == ["50%", "95%", "99.5%", "over 99.9%"]


def test_bits_per_dimension_with_and_without_the_prompt(runtime: Runtime, scene: Scene) -> None:
    found = likelihood(scene.prompt, 0.01, 0, 4, 8)
    half = found.interval_factor() * found.gain_stderr
    panel = likelihood_html(runtime, scene, found)
    assert "<strong>−0.51 ± 0.02 bits per dimension</strong> with its prompt, and −0.50 ± 0.02 without" in panel
    assert f"The prompt saves <strong>15.0 ± {half:.1f} bits</strong> in all" in panel
    assert "noise has 2.05" in panel
    assert panel.count("<svg") == 1
    assert "The prompt costs <strong>15.0" in likelihood_html(runtime, scene, replace(found, gain=-15.0))
    assert "within the error" in likelihood_html(runtime, scene, replace(found, gain=half / 2))


def test_the_downloads_of_a_likelihood_reproduce_it(scene: Scene) -> None:
    found = likelihood(scene.prompt, 0.01, 7, 4, 8)
    rows = list(csv.DictReader(io.StringIO(likelihood_csv(found))))
    assert [float(row["error_with"]) for row in rows] == pytest.approx(found.errors[1], abs=1e-5)
    document = json.loads(likelihood_json(scene, found, "picturebook"))
    assert document["image"]["prompt"] == document["prompt"] == scene.prompt
    assert document["unprompted_bits_per_dim"] == -0.5
    lines = likelihood_python(scene, found, "picturebook")
    compile(lines, "lines", "exec")
    assert "error=0.01, seed=7,\n    num_inference_steps=4" in lines


# --- the page ---------------------------------------------------------------------------------------------------------


def test_two_words_are_decomposed(visitor: Visitor) -> None:
    drawn(visitor, *PROMPT)
    panel, status = ask(visitor, "begin_pair", "pair", event=PAIR, more=(0.1,))
    assert 'data-first="cat" data-second="dog" data-given="rest"' in panel
    assert "id-stop" not in status
    alone, _ = ask(visitor, "begin_pair", "pair", event={**PAIR, "given": "nothing"}, more=(0.1,))
    assert "compared with an empty prompt" in alone
    assert "surprisal</dfn> is how many bits" in alone  # the embedded model's words have one


def test_a_word_is_removed_and_replaced(visitor: Visitor) -> None:
    drawn(visitor, *PROMPT)
    panel, _ = ask(visitor, "begin_counterfactual", "counterfactual", "", event={"word": "cat"})
    assert "without “cat”" in panel
    assert "being measured" not in panel  # the bits of the word were measured, too
    panel, _ = ask(visitor, "begin_counterfactual", "counterfactual", "crab", event={"word": "cat"})
    assert "with “crab” for “cat”" in panel


def test_captions_are_ranked(visitor: Visitor) -> None:
    drawn(visitor, *PROMPT)
    panel, _ = ask(visitor, "begin_captions", "ranking", "a cat\n\n a cat and a dog \n")
    assert "“a cat and a dog” <strong>fits better</strong>" in panel
    restored = visitor.run("restore_captions", None, event={"captions": "a cat\na crab"})["data"]
    assert restored[0] == "a cat\na crab"
    assert restored[1]["open"] is True
    assert "“a crab” <strong>fits better</strong>" in visitor.run("ranking", *restored[2:4], None)["data"][0]


def test_the_likelihood_of_an_image_is_measured(visitor: Visitor) -> None:
    drawn(visitor, *PROMPT)
    panel, status = ask(visitor, "begin_likelihood", "measure_likelihood")
    assert "The prompt saves <strong>15.0" in panel
    assert "the requested precision was reached" in panel
    assert "id-stop" not in status


@pytest.mark.parametrize(
    ("event", "says"),
    [
        ({**PAIR, "second": "cat"}, "'cat' was given twice"),
        ({**PAIR, "second": "crab"}, "'crab' is not in the prompt"),
        ({**PAIR, "second": ""}, "is not in the prompt"),
    ],
)
def test_invalid_pairs_are_reported_below_the_question(visitor: Visitor, event: dict[str, str], says: str) -> None:
    drawn(visitor, *PROMPT)
    ticket, query, _ = visitor.run("begin_pair", None, event=event)["data"]
    status = visitor.run("pair", ticket, query, None, 0.1)["data"][1]
    assert says in status.replace("&#x27;", "'")
    assert 'role="alert"' in status


def test_a_question_without_a_picture_is_answered(app: App) -> None:
    visitor = Visitor(app)
    app.runtime.examples_dir, examples_dir = None, app.runtime.examples_dir
    try:
        ticket, query, status = visitor.run("begin_pair", None, event=PAIR)["data"]
    finally:
        app.runtime.examples_dir = examples_dir
    assert (ticket, query) == (0, "") or "Waiting" in status


@pytest.mark.parametrize(
    ("captions", "says"),
    [
        ("", "two captions or more"),
        ("a cat", "two captions or more"),
        ("a cat\na  Cat", "Captions 1 and 2 are the same"),
        ("a cat\na zebra", "does not know 'zebra'"),
        ("a cat\n" + "a cat and " * 8, "reads at most 20 words"),
        ("a cat\n" + "cat " * 200, "Caption 2 has more than 500 characters"),
        ("\n".join(["a cat"] * 17), "at most 16"),
        ("a cat\n!", "in a few words"),
    ],
)
def test_invalid_captions_are_reported_next_to_the_field(visitor: Visitor, captions: str, says: str) -> None:
    answer = problems(visitor.join("begin_captions", None, captions))
    assert list(answer) == ["captions"]
    assert says in answer["captions"].replace("prompt is empty. Describe the image", "")


def test_captions_are_checked_before_the_model_is_loaded(runtime: Runtime) -> None:
    assert "two captions" in str(captions_problem(runtime, "a cat"))
    assert captions_problem(runtime, "a cat\na zebra") is None  # only the model knows its vocabulary


def test_an_unknown_replacement_is_reported_next_to_the_field(visitor: Visitor) -> None:
    answer = problems(visitor.join("begin_counterfactual", None, "zebra", event={"word": "cat"}))
    assert list(answer) == ["replacement"]
    assert "zebra" in answer["replacement"]


def test_a_stopped_question_keeps_its_partial_answer(app: App, visitor: Visitor) -> None:
    drawn(visitor, *PROMPT)
    ticket, query, _ = visitor.run("begin_pair", None, event=PAIR)["data"]
    before = len(app.model.calls)
    app.runtime.engine.model.delay = 0.3
    try:
        visitor.join("pair", ticket, query, None, 0.1)
        time.sleep(1.3)
        Visitor(app, visitor.session).join("stop")
        messages = list(visitor.results())
    finally:
        app.runtime.engine.model.delay = 0.02
    assert "Stopped." in json.dumps(messages)
    assert "stopped early" in json.dumps(messages)
    assert len(app.model.calls) - before < 8


def test_a_question_does_not_cancel_another(visitor: Visitor) -> None:
    drawn(visitor, *PROMPT)
    first = visitor.run("begin_pair", None, event=PAIR)["data"]
    second = visitor.run("begin_captions", None, "a cat\na dog and a cat")["data"]
    assert "“cat” and “dog”" in visitor.run("pair", *first[:2], None, 0.1)["data"][0]
    assert "fits better" in visitor.run("ranking", *second[:2], None)["data"][0]


# --- the API ---------------------------------------------------------------------------------------------------------


def test_a_client_decomposes_words(client: Client, image_file: Path) -> None:
    file = handle_file(str(image_file))
    found = client.predict(file, "a cat and a dog", "cat, dog", "nothing", 0.1, 0, api_name="/decompose")
    (pair,) = found["pairs"]
    assert pair["words"] == ["cat", "dog"]
    assert sum(pair[name]["bits"] for name in ("redundancy", "synergy")) + sum(
        part["bits"] for part in pair["unique"]
    ) == pytest.approx(pair["together"]["bits"])
    assert len(pair["by_surprisal"]["surprisals"]) == 2
    for wrong, says in (
        (("a cat and a dog", "cat, cat"), "given twice"),
        (("a cat and a dog", "cat"), "Two different words are needed"),
        (("cat", ""), "Two different words are needed"),
        (("a cat", "a, dog"), "'dog' is not in the prompt"),
        (("a zebra", ""), "zebra"),
        (("a cat and a dog", "a, b, c, d, e, f, g, h, i"), "at most 8"),
    ):
        with pytest.raises(AppError, match=says):
            client.predict(file, *wrong, "rest", 0.1, 0, api_name="/decompose")


def test_a_client_ranks_captions(client: Client, image_file: Path) -> None:
    file = handle_file(str(image_file))
    found = client.predict(file, "\n".join(CAPTIONS), 0.9, 0, api_name="/rank_captions")
    assert found["order"] == [2, 1, 0]
    assert found["settings"]["certainty"] == 0.9
    for captions, certainty, says in (
        ("a cat", 0.9, "two captions or more"),
        ("a cat\na cat", 0.9, "are the same"),
        ("a cat\na zebra", 0.9, "zebra"),
        ("a cat\na dog", 2, "above 0.5 and below 1"),
    ):
        with pytest.raises(AppError, match=says):
            client.predict(file, captions, certainty, 0, api_name="/rank_captions")


def test_a_client_changes_a_word(client: Client, image_file: Path) -> None:
    file = handle_file(str(image_file))
    before, after, found = client.predict(file, "a cat and a dog", "cat", "crab", api_name="/change_word")
    assert Path(before).read_bytes() != Path(after).read_bytes()
    assert found["changed_prompt"] == "a crab and a dog"
    assert np.shape(found["change"]) == (16, 16)
    for word, to, says in (("crab", "", "is not in the prompt"), ("cat", "zebra", "zebra")):
        with pytest.raises(AppError, match=says):
            client.predict(file, "a cat and a dog", word, to, api_name="/change_word")


def test_a_client_measures_a_likelihood(client: Client, image_file: Path) -> None:
    file = handle_file(str(image_file))
    found = client.predict(file, "a cat and a dog", 0.02, 3, api_name="/likelihood")
    assert found["gain"] == 15
    assert found["seed"] == 3
    assert np.shape(found["errors"]) == (2, 25)
    for prompt, error, says in (
        ("a zebra", 0.02, "zebra"),
        ("a cat", 0, "bits per dimension from 0.001"),
        ("", 0.02, "Describe"),
    ):
        with pytest.raises(AppError, match=says):
            client.predict(file, prompt, error, 0, api_name="/likelihood")
