"""The Interventions tab in a real browser, with the embedded model and its concepts."""

import json
import re
from pathlib import Path
from urllib.parse import parse_qs, urlencode, urlsplit

import pytest
from PIL import Image
from playwright.sync_api import Page, expect

from core.concepts.io import TABLE
from core.sae.collection import EMBEDDED
from tests.browser.conftest import Opener, wait_while_it_goes_on

RESULT = ".id-iv[data-query]:not(.running, .old)"
PENGUIN = {"kind": "move", "label": "penguin", "region": "top-left", "stage": "early", "strength": 4}
SETTINGS = {"prompt": "a penguin on the snow", "seed": 1, "steps": 6, "guidance": 4, "tab": "interventions"}
"""Few steps: what is looked at is the page."""

pytestmark = pytest.mark.skipif(
    not any(EMBEDDED["picturebook"].glob(f"*/*/*/{TABLE}")), reason="there are no concept tables yet"
)


def link(*edits: dict[str, object], **more: object) -> str:
    return "?" + urlencode({**SETTINGS, "edits": json.dumps(edits), **more})


def wait_until_done(page: Page) -> None:
    wait_while_it_goes_on(
        page,
        "result => document.querySelector(result) && !document.querySelector('.id-status .id-bar i')",
        RESULT,
    )


def open_interventions(page: Page) -> None:
    page.wait_for_selector(".id-badge.ready")
    page.get_by_role("tab", name="Interventions").click()
    expect(page.locator("#id-iv-what input").first).not_to_have_value("")


@pytest.mark.slow
def test_a_link_restores_an_edit(open_page: Opener, tmp_path: Path) -> None:
    page = open_page(query=link(PENGUIN))
    wait_until_done(page)
    expect(page.locator(".id-iv-lead")).to_contain_text("penguin → top left · early · strength 4")
    findings = page.locator(".id-iv-findings")
    expect(findings).to_contain_text(re.compile("penguin.*(region|segmenter)"))
    expect(findings).to_contain_text("normal range")
    expect(page.locator(".id-preview")).to_be_visible()
    expect(page.locator(".id-tag")).to_have_text("edited")
    page.get_by_label("show what changed").check()
    expect(page.locator(".id-overlay")).to_be_visible()
    expect(page.locator(".id-tag")).to_have_text("edited · what changed")
    assert json.loads(parse_qs(urlsplit(page.url).query)["edits"][0]) == [PENGUIN]

    downloads = page.locator(".id-iv .id-downloads")
    for name in ("PNG unedited", "PNG edited", "JSON"):
        with page.expect_download() as download:
            downloads.get_by_text(name, exact=True).click()
        download.value.save_as(tmp_path / name)
    with Image.open(tmp_path / "PNG unedited") as before, Image.open(tmp_path / "PNG edited") as after:
        assert before.size == after.size == (128, 128)
        assert before.tobytes() != after.tobytes()
    document = json.loads((tmp_path / "JSON").read_text())
    assert document["settings"]["seed"] == 1
    assert document["results"][0]["edits"] == [PENGUIN]
    page.get_by_text("Repeat this in Python").last.click()
    assert 'core.SpatialEdit(label="penguin"' in page.locator(".id-iv .id-code pre").inner_text()

    # The three stages, and one of them on the large picture.
    page.locator("#id-iv-compare").click()
    page.wait_for_selector(".id-iv-choose")
    expect(page.locator(".id-iv-table")).to_contain_text("worked?")
    late = page.locator(".id-iv-choose").nth(2)
    late.click()
    expect(late).to_have_attribute("aria-pressed", "true")
    expect(page.locator(".id-preview")).to_have_attribute("src", str(late.get_attribute("data-edited")))
    assert "compare=stages" in page.url


def test_an_edit_is_suggested_and_invalid_input_reported(page: Page) -> None:
    open_interventions(page)
    what = page.locator("#id-iv-what input").first
    expect(what).to_have_value("penguin")
    expect(page.locator("#id-iv-where input:checked")).to_have_value("top-left")  # it is on the right
    expect(page.get_by_label("From step")).to_have_value("1")
    expect(page.get_by_label("to step")).to_have_value("10")
    page.locator("#id-iv-when label", has_text=re.compile(r"^\s*late")).click()
    expect(page.get_by_label("From step")).to_have_value("21")
    page.locator("#id-iv-kind label", has_text="Remove").click()
    expect(page.locator("#id-iv-when input:checked")).to_have_value("early to late")
    expect(page.get_by_label("From step")).to_have_value("1")
    expect(page.get_by_label("to step")).to_have_value("25")
    expect(page.locator("#id-iv-strength input").first).to_have_value("1.5")

    what.fill("pengin")
    what.press("Tab")
    near = page.locator(".id-iv-near", has_text=re.compile("^penguin$"))
    near.wait_for()
    page.locator("#id-iv-show").click()
    expect(page.locator("#id-iv-what")).to_contain_text("No concept has the label 'pengin'")
    near.click()
    expect(what).to_have_value("penguin")

    page.get_by_label("to step").fill("99")
    expect(page.locator("#id-iv-when input:checked")).to_have_value("custom")
    page.locator("#id-iv-show").click()
    expect(page.locator("#id-iv-window")).to_contain_text("within this picture's steps, 1 to 25")
    page.locator("#id-iv-when label", has_text=re.compile(r"^\s*early\s*$")).click()
    expect(page.get_by_label("to step")).to_have_value("10")

    page.locator("#id-iv-where label", has_text="brush").click()
    page.locator("#id-iv-show").click()
    expect(page.locator("#id-iv-where")).to_contain_text("The region is empty")

    # A click on the picture chooses what lies there; at a step, the concepts that are active there.
    page.locator("#id-iv-where label", has_text="everywhere").click()
    box = page.locator(".id-canvas").bounding_box()
    assert box
    page.locator(".id-canvas").click(position={"x": 0.28 * box["width"], "y": 0.7 * box["height"]})
    expect(what).to_have_value("pine")
    page.locator("button.id-frame").nth(12).click()
    page.locator(".id-canvas").click(position={"x": 0.28 * box["width"], "y": 0.7 * box["height"]})
    expect(what).to_have_value(re.compile(r"^\d+, \d+"))
    expect(page.locator(".id-iv-hint")).to_contain_text("middle, with the prompt")


@pytest.mark.slow
def test_edits_are_painted_listed_and_cancelled(open_page: Opener) -> None:
    page = open_page(query="?" + urlencode({**SETTINGS, "steps": 20}))
    expect(page.get_by_label("to step")).to_have_value("8")  # the form is that of the new picture
    page.locator("#id-iv-where label", has_text="brush").click()
    page.locator(".id-canvas").click()
    page.locator("#id-iv-add").click()
    expect(page.locator(".id-iv-chips")).to_contain_text("penguin → painted region · early")
    page.locator("#id-iv-show").click()
    expect(page.locator(".id-status")).to_contain_text(re.compile("Redrawing|Waiting"))
    page.locator("#id-cancel").click()
    expect(page.locator(".id-status")).to_contain_text("Cancelled")
    expect(page.locator("#id-cancel")).to_be_hidden()
    page.locator(".id-iv-drop").click()
    expect(page.locator(".id-iv-drop")).to_have_count(0)


@pytest.mark.parametrize("width", [390, 1400])
def test_nothing_is_wider_than_the_page(page: Page, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 900})
    open_interventions(page)
    page.locator("#id-iv-where label", has_text="brush").click()
    expect(page.locator(".id-iv-brush")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
