"""The Layout tab, with the real app, the real model and its concept tables."""

import json
import re
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from core.concepts.io import TABLE
from core.sae.collection import EMBEDDED
from tests.browser.conftest import Opener

PAINTED = "() => document.querySelector('.id-layout-map').toDataURL()"

pytestmark = pytest.mark.skipif(
    not any(EMBEDDED["picturebook"].glob(f"*/*/*/{TABLE}")), reason="there are no concept tables yet"
)


def open_layout(page: Page) -> None:
    page.wait_for_selector(".id-badge.ready")
    page.get_by_role("tab", name="Layout").click()
    page.wait_for_selector(".id-layout:not(.empty)")
    expect(page.locator(".id-layout-at")).not_to_be_empty()


def test_slider_and_film_strip_walk_together(page: Page) -> None:
    open_layout(page)
    expect(page.locator(".id-layout-at")).to_contain_text("step 1 of")
    expect(page.locator(".id-overlay")).to_be_visible()
    first = page.evaluate(PAINTED)
    page.locator(".id-layout-slider").fill("9")
    expect(page.locator("button.id-frame").nth(8)).to_have_attribute("aria-pressed", "true")
    expect(page.locator(".id-layout .id-bin.now")).to_have_attribute("data-step", "8")
    assert page.evaluate(PAINTED) != first
    preview = page.locator(".id-layout-preview").get_attribute("src")
    assert preview == page.locator("button.id-frame img").nth(8).get_attribute("src")
    page.locator("button.id-frame").nth(0).click()
    expect(page.locator(".id-layout-at")).to_contain_text("step 1 of")
    assert page.evaluate(PAINTED) == first
    assert "step=1" in page.url


@pytest.mark.slow
def test_another_readout_is_shown_without_the_server(open_page: Opener) -> None:
    page = open_page()
    open_layout(page)
    requested: list[str] = []
    page.on("request", lambda request: requested.append(request.url) if "queue" in request.url else None)
    before = page.evaluate(PAINTED)
    page.locator(".id-layout-options summary").click()
    page.get_by_label("decoder 1 up_blocks.0.attentions.0").check()
    page.get_by_label("all classes").check()
    assert page.evaluate(PAINTED) != before
    assert page.locator(".id-layout-summary:visible").count() == 1
    assert page.locator(".id-layout .id-line:visible").count() == 1
    assert requested == []
    assert "classes=any" in page.url

    again = open_page(query="?" + page.url.split("?")[1])
    again.wait_for_selector(".id-layout:not(.empty)")
    expect(again.locator(".id-layout-option")).to_have_text("decoder 1, with the prompt (conditional), all classes")


@pytest.mark.slow
def test_the_steps_play_like_a_film(open_page: Opener) -> None:
    page = open_page()
    open_layout(page)
    page.locator(".id-layout-slider").fill("20")
    page.locator(".id-layout-play").click()
    expect(page.locator(".id-layout-play")).to_have_text("Pause")
    expect(page.locator(".id-layout-at")).to_contain_text(re.compile(r"step 25 of 25"))
    expect(page.locator(".id-layout-play")).to_have_text("Play")
    page.emulate_media(reduced_motion="reduce")
    page.locator(".id-layout-slider").fill("3")
    expect(page.locator(".id-layout-play")).to_have_text("Next step")
    page.locator(".id-layout-play").click()
    page.wait_for_timeout(600)
    expect(page.locator(".id-layout-at")).to_contain_text("step 4 of")


@pytest.mark.slow
def test_another_image_has_another_layout(open_page: Opener) -> None:
    page = open_page()
    open_layout(page)
    before = page.locator(".id-layout-data").get_attribute("data-layout")
    page.locator(".id-example").nth(1).click()
    page.wait_for_function(
        "before => document.querySelector('.id-layout-data').dataset.layout !== before"
        " && !document.querySelector('.id-layout.old')",
        arg=before,
    )
    expect(page.locator(".id-overlay")).to_be_visible()


def test_the_downloads(page: Page, tmp_path: Path) -> None:
    open_layout(page)
    downloads = page.locator(".id-layout .id-downloads")
    for name in ("CSV", "JSON"):
        with page.expect_download() as download:
            downloads.get_by_text(name, exact=True).click()
        download.value.save_as(tmp_path / name)
    assert (
        (tmp_path / "CSV").read_text().startswith("hookpoint,branch,uses_prompt_classes,step_from_0,t,stage,mean_iou")
    )
    assert json.loads((tmp_path / "JSON").read_text())["settings"]["model"] == "picturebook"
    page.get_by_text("Repeat this in Python").last.click()
    assert "core.predict_layout(" in page.locator(".id-layout .id-code:visible pre").inner_text()


@pytest.mark.parametrize("width", [390, 1400])
def test_nothing_is_wider_than_the_page(page: Page, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 900})
    open_layout(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
