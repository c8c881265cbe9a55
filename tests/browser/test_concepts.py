"""The Concepts tab in a real browser, with the embedded model and its tables."""

from urllib.parse import parse_qs, urlsplit

import pytest
from playwright.sync_api import Page, expect

from core.concepts.io import TABLE
from core.sae.collection import EMBEDDED
from tests.browser.conftest import Opener

pytestmark = pytest.mark.skipif(
    not any(EMBEDDED["picturebook"].glob(f"*/*/*/{TABLE}")), reason="there are no concept tables yet"
)


def open_concepts(page: Page) -> None:
    page.wait_for_selector(".id-badge.ready")
    page.get_by_role("tab", name="Concepts").click()
    page.wait_for_selector(".id-active-item")


def test_a_step_and_a_point_are_shown_without_the_server(page: Page) -> None:
    open_concepts(page)
    requested: list[str] = []
    page.on("request", lambda request: requested.append(request.url) if "queue" in request.url else None)
    at, listed = page.locator(".id-active-at"), page.locator(".id-active-list")
    expect(at).to_contain_text("step 25 of 25 (late), in the whole picture")
    last = listed.inner_text()
    page.locator("button.id-frame").nth(0).click()
    expect(at).to_contain_text("step 1 of 25 (early)")
    assert listed.inner_text() != last
    whole = listed.inner_text()
    page.locator(".id-canvas").click(position={"x": 40, "y": 40})
    expect(at).to_contain_text("at row 1, column 1")
    assert listed.inner_text() != whole
    page.locator(".id-canvas").click(position={"x": 40, "y": 40})
    expect(at).to_contain_text("in the whole picture")
    assert listed.inner_text() == whole
    page.evaluate("window.idPage.clicks.Concepts(1.2, 0.5); window.idPage.clicks.Concepts(0.5, -0.1)")
    assert "in the whole picture" in at.inner_text()  # a click outside the map does nothing
    page.locator(".id-active-named input").uncheck()
    assert page.locator(".id-active-item").count() > 0
    before = page.locator(".id-overlay").get_attribute("src")
    page.locator(".id-active-item").nth(2).hover()
    expect(page.locator(".id-overlay")).not_to_have_attribute("src", before or "")
    assert requested == []


@pytest.mark.slow
def test_a_concept_has_a_page_that_a_link_opens(page: Page, open_page: Opener) -> None:
    open_concepts(page)
    page.locator(".id-active-item").first.focus()
    page.keyboard.press("Enter")
    card = page.locator(".id-concept-card")
    expect(card).to_contain_text("SAE feature")
    assert card.locator(".id-concept-card-gallery figure").count() > 0
    number = card.get_attribute("data-number")
    page.wait_for_function("() => location.search.includes('concept=')")
    assert parse_qs(urlsplit(page.url).query)["concept"] == [number]
    other = card.locator(".id-concept-group .id-concept-button").first
    wanted = other.get_attribute("data-number") or ""
    other.click()
    expect(card).to_have_attribute("data-number", wanted)

    again = open_page(query="?" + page.url.split("?")[1])
    expect(again.locator(".id-concept-card")).to_have_attribute("data-number", wanted)
    again.locator(".id-concept-card-close").click()
    expect(again.locator(".id-concept-card")).to_be_hidden()
    assert "concept=" not in again.url


@pytest.mark.slow
def test_a_card_follows_the_picture_and_can_be_opened_again(open_page: Opener) -> None:
    page = open_page()
    open_concepts(page)
    page.locator(".id-active-item").first.click()
    card, curve = page.locator(".id-concept-card"), page.locator("#id-concept .id-line")
    before = curve.get_attribute("d") or ""
    card.locator(".id-concept-card-close").click()
    expect(card).to_be_hidden()
    page.locator(".id-active-item").first.click()
    expect(card).to_be_visible()
    page.locator(".id-example").nth(1).click()
    expect(page.locator(f'#id-concept .id-line[d="{before}"]')).to_have_count(0)
    expect(card).to_be_visible()


@pytest.mark.slow
def test_concepts_can_be_searched_and_browsed(open_page: Opener) -> None:
    page = open_page()
    open_concepts(page)
    field = page.locator("#id-concept-query textarea, #id-concept-query input").first
    field.fill("cat")
    expect(page.locator("#id-concept-found li b").first).to_have_text("cat")
    field.fill("zeppelin")
    expect(page.locator("#id-concept-found")).to_contain_text("No concept is labelled “zeppelin”")
    nearest = page.locator("#id-concept-found .id-find").first
    label = nearest.inner_text()
    nearest.click()
    expect(page.locator("#id-concept-found li b").first).to_have_text(label)
    field.fill("")
    page.locator("#id-concept-found [data-kind=unlabelled]").click()
    expect(page.locator("#id-concept-found summary").first).to_contain_text("nearest to")
    page.locator("#id-concept-found summary").first.click()
    page.locator("#id-concept-found details .id-concept-button").first.click()
    expect(page.locator(".id-concept-card")).to_contain_text("unnamed")


@pytest.mark.parametrize("width", [390, 1400])
def test_nothing_is_wider_than_the_page(page: Page, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 900})
    open_concepts(page)
    page.locator(".id-active-item").first.click()
    page.wait_for_selector(".id-concept-card")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
