"""What a visitor does, with the real app, the real model and a real browser."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import Page, expect

from tests.browser.conftest import READY, Opener, wait_while_it_goes_on


def generate(page: Page, prompt: str, steps: int = 6) -> None:
    """Type a prompt and press Enter, with few steps."""
    page.wait_for_selector(READY)
    if not page.locator("#id-options input").first.is_visible():
        page.get_by_text("Seed, steps, guidance").click()
    field = page.get_by_label("Steps")
    expect(field).not_to_have_value("")
    field.fill(str(steps))
    page.locator("#id-prompt textarea").fill(prompt)
    # Nobody types within a moment of unfolding a control for the first time, while the page still sets it up.
    page.evaluate("() => new Promise((done) => requestIdleCallback(() => requestAnimationFrame(done)))")
    if field.input_value() != str(steps):
        field.fill(str(steps))
    expect(field).to_have_value(str(steps))
    page.locator("#id-prompt textarea").press("Enter")


def wait_until_measured(page: Page, word: str) -> None:
    wait_while_it_goes_on(
        page,
        "word => document.querySelector(`.id-panel:not(.running) .id-chip[data-word='${word}']`)"
        " && !document.querySelector('.id-status .id-bar i')",
        word,
    )


@pytest.mark.slow
@pytest.mark.timeout(1200)  # on a busy machine
def test_a_prompt_becomes_an_image_and_its_words_get_bits(open_page: Opener) -> None:
    page = open_page()
    page.get_by_label("20%").check()
    generate(page, "a cat on the grass")
    expect(page.locator(".id-status")).to_contain_text(re.compile(r"left|Reading|Waiting"))
    wait_until_measured(page, "grass")
    assert page.locator("button.id-frame").count() == 6

    page.locator(".id-chip[data-word='cat']").click()
    expect(page.locator(".id-chip[data-word='cat']")).to_have_attribute("aria-pressed", "true")
    lead = page.locator(".id-card:not([hidden]) .id-lead").inner_text()
    assert re.fullmatch(r"“cat” contributed [\d.]+ ± [\d.]+ bits beyond the other words\.", lead)
    overlay = page.locator(".id-overlay")
    expect(overlay).to_be_visible()
    cat = overlay.get_attribute("src")
    page.locator(".id-chip[data-word='cat']").press("ArrowRight")
    assert overlay.get_attribute("src") != cat
    assert "word=on" in page.url

    page.locator("button.id-frame").nth(2).click()
    expect(page.locator(".id-preview")).to_be_visible()
    expect(overlay).to_be_hidden()
    expect(page.locator(".id-tag")).to_contain_text("step 3")
    page.locator("button.id-frame").nth(2).click()
    expect(overlay).to_be_visible()

    with page.expect_download() as download:
        page.get_by_role("link", name="JSON").click()
    stored = json.loads(Path(download.value.path()).read_text())
    assert stored["settings"]["prompt"] == "a cat on the grass"
    with page.expect_download() as download:
        page.get_by_role("button", name="PNG").click()
    with Image.open(download.value.path()) as image:
        assert image.size == (1024, 1220)

    again = open_page(query="?" + page.url.partition("?")[2])
    wait_until_measured(again, "grass")
    assert again.locator(".id-image").get_attribute("src") == page.locator(".id-image").get_attribute("src")
    expect(again.locator(".id-chip[data-word='on']").first).to_have_attribute("aria-pressed", "true")


def test_a_start_logs_two_lines(page: Page, log: Path) -> None:  # noqa: ARG001 - the page waited for the model
    first, second = log.read_text(encoding="utf-8").splitlines()[:2]
    assert first.startswith("The page is at http://127.0.0.1:")
    assert re.fullmatch(r"\S+ is ready after [\d.]+ s", second)


def test_an_unknown_word_offers_words_to_click(page: Page) -> None:
    field = page.locator("#id-prompt textarea")
    field.fill("a catt on the grass")
    suggestion = page.locator(".id-suggest", has_text=re.compile("^cat$"))
    suggestion.wait_for()
    page.locator("#id-generate").click()
    expect(page.locator("#id-bar")).to_contain_text("This model does not know 'catt'")
    # The message outlives the progress of other events: what a search, a question and Cancel show comes later.
    page.get_by_role("tab", name="Concepts").click()
    page.locator("#id-concept-query textarea, #id-concept-query input").first.fill("zeppelin")
    expect(page.locator("#id-concept-found")).to_contain_text("No concept is labelled “zeppelin”")
    page.get_by_role("tab", name="Attribution").click()
    page.locator(".id-pair-go").click()
    page.locator(".id-stop").first.click()
    expect(page.locator(".id-question-progress").first).to_contain_text("Stopped.")
    expect(page.locator("#id-prompt")).to_contain_text("This model does not know 'catt'")
    suggestion.click()
    expect(field).to_have_value("a cat on the grass")
    expect(page.locator(".id-unknown")).to_have_count(0)
    expect(page.locator("#id-prompt")).not_to_contain_text("does not know")


def test_a_narrow_page_does_not_scroll_sideways(page: Page) -> None:
    page.set_viewport_size({"width": 390, "height": 844})
    for scheme in ("dark", "light"):
        page.emulate_media(color_scheme=scheme)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert page.evaluate("window.scrollTo(99, 0), window.scrollX") == 0


def test_the_page_goes_on_after_cancel(page: Page) -> None:
    generate(page, "a cat", steps=150)
    expect(page.locator(".id-status")).to_contain_text("Drawing")  # until then, Cancel is about what ran before
    page.locator("#id-cancel").click()
    expect(page.locator(".id-status")).to_contain_text("Cancelled")
    expect(page.locator("#id-cancel")).to_be_hidden()
    generate(page, "a dog", steps=4)
    expect(page.locator(".id-status")).to_contain_text("Reading the words")
    expect(page.locator("button.id-frame")).to_have_count(4)
    page.locator("#id-cancel").click()  # what the words are worth, a slow test waits for
    expect(page.locator("#id-cancel")).to_be_hidden()


@pytest.mark.slow
def test_the_error_curves_stay_unfolded_from_word_to_word(open_page: Opener) -> None:
    page = open_page(width=390, height=844)
    page.wait_for_selector(READY)
    page.wait_for_selector(".id-overlay:not([hidden])")
    chart = page.locator(".id-card:not([hidden]) .id-curves svg").first
    expect(chart).to_be_hidden()
    page.locator(".id-card:not([hidden]) .id-curves summary").click()
    expect(chart).to_have_attribute("aria-label", re.compile("“penguin”"))
    expect(chart).to_be_visible()
    page.locator(".id-chip[data-word='tree']").click()
    expect(chart).to_have_attribute("aria-label", re.compile("“tree”"))
    expect(chart).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.locator(".id-example").nth(1).click()  # another image, and a new panel
    page.wait_for_selector(".id-chip[data-word='balloon']")
    expect(chart).to_be_visible()
    page.locator(".id-card:not([hidden]) .id-curves summary").click()
    page.locator(".id-chip[data-word='house']").click()
    expect(chart).to_be_hidden()
