"""The page's parts: colours, charts, chips, downloads, links, tickets, stored examples."""

import csv
import dataclasses
import io
import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from urllib.parse import parse_qs

import numpy as np
import pytest

from core.information.results import Attribution
from core.information.stored import load_attribution, save_attribution
from core.spec import BUILT_IN, Stage
from core.ui.attribution.ceiling import ceilings_html
from core.ui.attribution.tab import panel_html
from core.ui.backend.link import PageLink, read_link
from core.ui.backend.runtime import Runtime
from core.ui.backend.tickets import Tickets
from core.ui.examples import load_examples
from core.ui.look.colours import SCALE, ink_on, scale_hex, scale_in_oklab
from core.ui.look.export import link_query, python_lines, steps_csv, to_csv, to_json
from core.ui.look.images import layer
from core.ui.look.scene import Scene, contradicts, direct_half_width, half_width, stage_shares, step_stages, unsure
from core.ui.look.timeline import difference_svg, errors_svg, merge_narrow, nice_ceiling, timeline_svg
from core.ui.look.viewer import viewer_html
from core.ui.look.words import cards, chips, hints, plus_minus
from tests.fakes.engine import attribution, paint

SPEC = BUILT_IN["picturebook"]
PROMPT = "A small blue cat, and a dog"
WORDS = ("a", "small", "blue", "cat", "and", "dog")


@pytest.fixture
def a() -> Attribution:
    return attribution(PROMPT, WORDS, "rest", 0.1, 0, 25, 16, "converged")


@pytest.fixture
def scene() -> Scene:
    return Scene(paint(PROMPT, 0), PROMPT, 7, 25, 4.0)


def luminance(rgb: np.ndarray) -> np.ndarray:
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return linear @ np.array([0.2126, 0.7152, 0.0722])


def test_scale_is_perceptually_even_and_rises_in_lightness() -> None:
    steps = np.linalg.norm(np.diff(scale_in_oklab(), axis=0), axis=1)
    assert steps.max() / steps.min() < 1.01
    assert (np.diff(luminance(SCALE)) > 0).all()
    # Still rising with deuteranopia (Machado et al. 2009, severity 1).
    deuteranopia = np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]]
    )
    assert (np.diff(luminance(np.clip(SCALE @ deuteranopia.T, 0, 1))) > -1e-4).all()


@pytest.mark.parametrize("share", np.linspace(0, 1, 21))
def test_text_on_chips_can_be_read(share: float) -> None:
    def of(colour: str) -> float:
        return float(luminance(np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255))

    light, dark = sorted((of(scale_hex(share)), of(ink_on(share))), reverse=True)
    assert (light + 0.05) / (dark + 0.05) >= 4.5


def test_an_uncertain_cell_looks_like_a_zero() -> None:
    bits = np.array([[1.0, 1.0], [0.5, 0.0]])
    half = np.array([[0.0, 2.0], [0.0, 0.1]])
    seen = np.asarray(layer(bits, half, 1.0)).astype(float)
    assert seen[0, 0, 3] > 0.95 * 255
    # Both are transparent, so that the image is seen as it is.
    np.testing.assert_allclose(seen[0, -1, 3], 0, atol=12)
    np.testing.assert_allclose(seen[-1, -1, 3], 0, atol=12)


def test_timeline_areas_are_the_bits(a: Attribution) -> None:
    i = WORDS.index("cat")
    svg = timeline_svg(a.timeline.edges, a.timeline.bits[i], a.timeline.stderr[i], "cat")
    area = next(p for p in ET.fromstring(svg).iter("path") if p.get("class") == "id-area")
    points = [float(v) for v in re.findall(r"-?\d+\.?\d*", area.get("d", ""))]
    # M x0,y0 then V y H x for each bin, then back along the axis.
    xs, ys = [points[0], *points[3:-2:2]], points[2:-2:2]
    baseline = points[-2]
    _, joined, errors = merge_narrow(a.timeline.edges, a.timeline.bits[i], a.timeline.stderr[i], step_stages(25))
    top = nice_ceiling(float((joined + errors).max()))
    span = a.timeline.edges[-1] - a.timeline.edges[0]
    unit = (xs[-1] - xs[0]) / span * (baseline - 34) / top
    drawn = sum((x1 - x0) * (baseline - y) for x0, x1, y in zip(xs, xs[1:], ys, strict=False))
    assert drawn / unit == pytest.approx(a.bits[i], rel=0.02)


def steps_of(path: str) -> tuple[np.ndarray, np.ndarray]:
    """Edges [S + 1] and heights [S] of what `M x0,y0 V y H x...` draws, up to a closing `Z`."""
    points = [float(v) for v in re.findall(r"-?\d+\.?\d*", path)]
    return np.array([points[0], *points[3::2]]), np.array(points[2::2])


def paths(svg: str, kind: str) -> list[str]:
    return [p.get("d", "") for p in ET.fromstring(svg).iter("path") if p.get("class") == kind]


def test_error_curves_are_drawn_by_their_logarithm() -> None:
    edges = np.array([-4.0, -2.0, 0.0, 4.0])
    errors = np.array([[10.0, 100.0, 1000.0], [10.0, 50.0, 0.0]])
    svg = errors_svg(edges, errors, np.zeros_like(errors), "two", (Stage("late", 0.0, 1.0),))
    (without,), (with_it,) = (paths(svg, f"id-line{kind}") for kind in (" dashed", ""))
    xs, ys = steps_of(without)
    assert np.diff(xs) / (xs[-1] - xs[0]) == pytest.approx([0.25, 0.25, 0.5], abs=1e-3)
    assert ys[0] - ys[1] == pytest.approx(ys[1] - ys[2], abs=0.2)
    _, below = steps_of(with_it)
    assert (below[1] - ys[1]) / (ys[0] - ys[1]) == pytest.approx(np.log10(2), abs=0.01)
    assert below[2] == ys[0]  # zero has no logarithm: it is drawn at the smallest error
    small = errors_svg(edges, errors / 1000, np.zeros_like(errors), "two", (Stage("late", 0.0, 1.0),))
    assert ">.01</text>" in small
    assert [t.text for t in ET.fromstring(svg).iter("text") if "end" in str(t.get("class"))][:3] == ["10", "100", "1k"]


def test_a_difference_below_zero_hangs_below_the_axis() -> None:
    edges = np.linspace(-6.0, 6.0, 4)
    bits, half = np.array([2.0, -1.0, 0.5]), np.array([0.0, 1.0, 0.0])
    stages = (Stage("late", 0.0, 1.0),)
    svg = difference_svg(edges, bits, half, "one", stages)
    area = paths(svg, "id-area")[0]
    zero = float(re.findall(r"V(-?\d+\.?\d*)H[\d.]+Z", area)[0])
    _, ys = steps_of(paths(svg, "id-line")[0])
    assert (zero - ys) / (zero - ys[0]) * 2 == pytest.approx(bits, abs=0.02)
    assert paths(svg, "id-band") != paths(difference_svg(edges, bits, None, "one", stages), "id-band")


def test_stored_error_curves_are_shown_folded(a: Attribution) -> None:
    html = cards(a)
    assert html.count('<details class="id-more id-curves">') == len(WORDS)  # closed, all of them
    half = direct_half_width(a)
    assert f"<b>{plus_minus(a.direct_bits[3], half[3])} bits</b>" in html
    assert ", with its band:" in html
    assert a.curves is not None
    old = dataclasses.replace(a, curves=a.curves._replace(difference_stderr=None))
    assert ", with its band:" not in cards(old)
    assert "with no prompt" in cards(dataclasses.replace(a, given="nothing"))
    assert "<details" not in cards(dataclasses.replace(a, curves=None))


def test_a_card_says_what_a_word_can_tell_and_what_a_perfect_model_could_not_have_told(
    a: Attribution, tmp_path: Path
) -> None:
    (tmp_path / "surprisals.json").write_text('{"cat": 4.0, "dog": 5.0}')
    (tmp_path / "ceilings.json").write_text('{"cat": ["object", 3.5, 5.25], "dog": ["object", 4.5, 6.25]}')
    kinds = {"object": {"bits": 9.5, "low": 7.4, "high": 11.5, "n_words": 148, "half_width": None}}
    (tmp_path / "excess.json").write_text(json.dumps({"unet": "", "kinds": kinds}))
    spec = dataclasses.replace(SPEC, source=str(tmp_path / "none"), assets=tmp_path)
    bits = np.array([0.0, 0.0, 0.0, 21.0, 0.0, 6.0])
    a = dataclasses.replace(a, direct_bits=bits, direct_stderr=np.full(6, 0.5))
    notes = ceilings_html(spec, a)
    assert [bool(note) for note in notes] == [word in ("cat", "dog") for word in WORDS]
    assert "5.2 bits" in notes[3]
    assert "<b>75%</b> of the 21.0 bits" in notes[3]  # 1 - 5.25 / 21
    assert "9.5 bits too many on average (7.4 to 11.5); it varies too much" in notes[3]
    assert "could not have been told" not in notes[5]  # 6 bits of 6.25
    assert notes[3] in cards(a, notes=notes)
    alone = ceilings_html(spec, dataclasses.replace(a, given="nothing"))
    assert "4.0 bits" in alone[3]
    assert "on average" not in alone[3]
    assert not any(ceilings_html(BUILT_IN["sd-v1-4"], a))
    corrected = {"object": {**kinds["object"], "half_width": 2.0}}
    (tmp_path / "other").mkdir()
    for name, text in (
        ("ceilings.json", '{"cat": ["object", 3.5, 5.25]}'),
        ("excess.json", json.dumps({"unet": "", "kinds": corrected})),
    ):
        (tmp_path / "other" / name).write_text(text)
    assert "leaves 11.5 ± 2.0 bits" in ceilings_html(dataclasses.replace(spec, assets=tmp_path / "other"), a)[3]


@pytest.mark.parametrize(
    ("value", "top"), [(0.0, 1.0), (0.013, 0.02), (0.2, 0.2), (3.1, 5.0), (9.9, 10.0), (float("nan"), 1.0)]
)
def test_nice_ceiling(value: float, top: float) -> None:
    assert nice_ceiling(value) == pytest.approx(top)


def test_stages_of_the_strip_and_shares(a: Attribution) -> None:
    names = step_stages(25)
    assert (names.count("early"), names.count("middle"), names.count("late")) == (10, 10, 5)
    assert stage_shares(a).sum(axis=1) == pytest.approx(np.ones(len(WORDS)))


def test_every_occurrence_of_a_word_has_a_chip(a: Attribution) -> None:
    html = chips(PROMPT, a)
    assert re.findall(r'data-word="([^"]+)"', html) == ["a", "small", "blue", "cat", "and", "a", "dog"]
    assert '<span class="id-gap">,</span>' in html
    assert f"<b>{a.bits[3]:.1f}</b> ± {half_width(a)[3]:.1f}" in html


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [(203.4, 12.3, "203 ± 12"), (4.73, 0.92, "4.7 ± 0.9"), (-0.149, 0.07, "−0.15 ± 0.07"), (0.8, 2.81, "0.8 ± 2.8")],
)
def test_errors_decide_how_many_digits_are_shown(value: float, error: float, text: str) -> None:
    assert plus_minus(value, error) == text


def test_narrow_bins_are_merged_within_their_stage_and_areas_preserved(a: Attribution) -> None:
    names = step_stages(25)
    edges, bits, half = merge_narrow(a.timeline.edges, a.timeline.bits[3], a.timeline.stderr[3], names)
    assert (bits * np.diff(edges)).sum() == pytest.approx(a.bits[3])
    assert len(bits) < 25
    assert len(half) == len(bits)
    for first_of_stage in (names.index("middle"), names.index("late")):
        assert a.timeline.edges[first_of_stage] in edges


def test_contradicting_and_uncertain_words_are_marked(a: Attribution) -> None:
    assert [w for w, wrong in zip(WORDS, contradicts(a), strict=True) if wrong] == ["blue"]
    loud = dataclasses.replace(a, stderr=a.bits.copy())
    assert unsure(loud).all()
    assert not contradicts(loud).any()
    assert "contradicts the picture" in chips(PROMPT, a)
    assert "not sure" in chips(PROMPT, loud)


def test_user_input_is_escaped(a: Attribution) -> None:
    evil = '<script>alert(1)</script>" onload="x'
    scene = Scene(paint("cat", 0), evil + PROMPT, 0, 25, 4.0)
    runtime = Runtime(examples_dir=Path("/nowhere"))
    for html in (panel_html(runtime, scene, a), viewer_html(scene), hints({evil: [evil]}, "m")):
        assert "<script" not in html
        assert 'onload="x' not in html


def test_csv_and_json_hold_all_numbers(a: Attribution, scene: Scene) -> None:
    rows = list(csv.DictReader(io.StringIO(to_csv(a))))
    assert [row["word"] for row in rows] == list(WORDS)
    assert float(rows[3]["bits"]) == pytest.approx(a.bits[3], abs=1e-4)
    assert float(rows[3]["bits_95"]) == pytest.approx(2.131 * a.stderr[3], rel=1e-3)
    stored = json.loads(to_json(scene, a, "picturebook"))
    assert stored["settings"]["seed"] == 7
    assert stored["settings"]["rel_error"] == 0.1
    assert np.array(stored["maps"]).sum((1, 2)) == pytest.approx(a.bits, abs=1e-3)
    assert len(stored["timeline"]["edges"]) == 26
    assert a.curves is not None
    assert np.array(stored["curves"]["with_word"]) == pytest.approx(a.curves.with_word, abs=1e-5)
    assert json.loads(to_json(scene, dataclasses.replace(a, curves=None), "m"))["curves"] is None


def test_rows_by_step_add_up_to_both_kinds_of_bits(a: Attribution) -> None:
    rows = [row for row in csv.DictReader(io.StringIO(steps_csv(a))) if row["word"] == "cat"]
    assert [row["stage"] for row in rows] == step_stages(25)
    numbers = {name: np.array([float(row[name]) for row in rows]) for name in rows[0] if name not in ("word", "stage")}
    widths = numbers["log_snr_to"] - numbers["log_snr_from"]
    assert numbers["bits"] @ widths == pytest.approx(a.bits[3], rel=1e-3)
    apart = (numbers["error_without"] - numbers["error_with"]) @ widths / (2 * np.log(2))
    assert apart == pytest.approx(a.direct_bits[3], rel=1e-3)
    assert a.curves is not None
    old = dataclasses.replace(a, curves=a.curves._replace(difference_stderr=None))
    assert "error_with_95" in steps_csv(old)
    assert "difference" not in steps_csv(old)
    assert "error" not in steps_csv(dataclasses.replace(a, curves=None))


def test_python_lines_are_python(a: Attribution, scene: Scene) -> None:
    tricky = dataclasses.replace(scene, prompt='a "cat"\non \\ grass')
    for shown in (scene, tricky, dataclasses.replace(scene, uploaded=True)):
        compile(python_lines(shown, a, "picturebook"), "lines", "exec")
    assert "seed=7" in python_lines(scene, a, "picturebook")


def test_a_link_restores_its_settings(a: Attribution, scene: Scene) -> None:
    query = {name: values[0] for name, values in parse_qs(link_query(scene, a)).items()}
    assert read_link(query, SPEC) == PageLink(PROMPT, 7, 25, 4.0, "rest")
    assert read_link({}, SPEC) is None
    assert link_query(dataclasses.replace(scene, uploaded=True), a) == ""


@pytest.mark.parametrize(
    "wrong", [{"seed": "abc"}, {"seed": "nan"}, {"steps": "0"}, {"guidance": "1e9"}, {"seed": "1.5"}]
)
def test_a_wrong_link_says_what_is_wrong(wrong: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="link cannot be restored"):
        read_link({"prompt": "a cat", **wrong}, SPEC)


def test_a_ticket_is_claimed_once_and_a_newer_one_ends_it() -> None:
    tickets = Tickets()
    first = tickets.issue("me")
    other = tickets.issue("you")
    assert tickets.claim(first, "draw")
    assert not tickets.claim(first, "draw")
    second = tickets.issue("me")
    assert not tickets.live(first)
    assert tickets.live(second)
    assert tickets.live(other)
    tickets.cancel("me")
    assert not tickets.claim(second, "draw")
    assert not tickets.claim(99, "draw")


def test_stored_attribution_comes_back(a: Attribution, tmp_path: Path) -> None:
    save_attribution(a, tmp_path / "a.safetensors")
    back = load_attribution(tmp_path / "a.safetensors")
    assert back.words == a.words
    assert back.settings == a.settings
    assert (back.n_evals, back.stopped, back.given) == (a.n_evals, a.stopped, a.given)
    for name in ("bits", "maps", "direct_stderr"):
        assert getattr(back, name) == pytest.approx(getattr(a, name), rel=1e-6)
    assert back.timeline.bits == pytest.approx(a.timeline.bits, rel=1e-6)
    assert a.curves is not None
    assert back.curves is not None
    for mine, theirs in zip(back.curves, a.curves, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-6)
    old = dataclasses.replace(a, curves=a.curves._replace(difference_stderr=None))
    for without in (old, dataclasses.replace(a, curves=None)):
        save_attribution(without, tmp_path / "b.safetensors")
        again = load_attribution(tmp_path / "b.safetensors").curves
        assert (again is None) == (without.curves is None)
        assert again is None or again.difference_stderr is None


def test_broken_or_missing_examples_are_skipped(tmp_path: Path, examples_dir: Path) -> None:
    assert load_examples(None) == []
    assert load_examples(tmp_path) == []
    (tmp_path / "index.json").write_text("{")
    assert load_examples(tmp_path) == []
    example = load_examples(examples_dir)[0]
    assert len(example.scene.frames) == example.steps
    assert example.scene.image.tobytes() == paint(example.prompt, example.seed).tobytes()
