"""The large picture and what surrounds it, in a real browser: touch, keyboard, small screens, reloads."""

import re
from collections.abc import Callable
from urllib.parse import parse_qs, urlencode, urlsplit

import pytest
from playwright.sync_api import Page, expect

Open = Callable[..., Page]
PROMPT = "#id-prompt textarea"
SHORT = {"prompt": "a dog on the beach", "seed": 1, "steps": 4, "guidance": 4}
"""An image that is no stored example, in few steps."""


def prompt_of(page: Page) -> str:
    return parse_qs(urlsplit(page.url).query).get("prompt", [""])[0]


def test_words_are_clicked_into_a_prompt(open_page: Open) -> None:
    page = open_page()
    field = page.locator(PROMPT)

    def write(menu: str, word: str) -> None:
        if not page.locator(f".id-write[data-word='{word}']").is_visible():
            page.locator(".id-menu summary", has_text=menu).click()
        page.locator(f".id-write[data-word='{word}']").click()

    field.fill("")
    write("Objects", "cat")
    expect(field).to_have_value("a cat")
    write("Objects", "tree")
    write("Backgrounds", "sea")
    write("Styles", "night")
    expect(field).to_have_value("a cat and a tree in the sea, night style")
    write("Backgrounds", "snow")
    write("Objects", "moon")
    expect(field).to_have_value("a cat, a tree and a moon on the snow, night style")
    page.keyboard.press("Escape")
    expect(page.locator(".id-menu[open]")).to_have_count(0)
    # What was typed outlives a reload.
    page.reload()
    expect(field).to_have_value("a cat, a tree and a moon on the snow, night style")


def test_keys_walk_along_strip_words_and_picture(open_page: Open) -> None:
    page = open_page()
    page.wait_for_selector(".id-chip")
    for row in ("button.id-frame", ".id-chip"):
        stops = page.eval_on_selector_all(row, "all => all.filter((one) => one.tabIndex === 0).length")
        assert stops == 1, row
    frames = page.locator("button.id-frame")
    frames.first.focus()
    page.keyboard.press("End")
    expect(frames.last).to_be_focused()
    expect(page.locator(".id-tag")).to_contain_text("step 25")
    page.keyboard.press("Home")
    expect(frames.first).to_be_focused()
    page.locator(".id-canvas").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    expect(page.locator(".id-cursor")).to_be_visible()
    expect(page.locator(".id-spoken")).to_have_text("row 5, column 5")


def test_on_a_phone_the_map_of_a_word_is_in_view(open_page: Open) -> None:
    page = open_page(390, 844)
    chip = page.locator(".id-chip[data-word='tree']")
    chip.scroll_into_view_if_needed()
    page.mouse.wheel(0, 300)
    chip.click()
    box = page.locator(".id-overlay").bounding_box()
    assert box
    assert box["y"] >= 0
    assert box["y"] + box["height"] < 844 / 2
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_the_first_view_holds_prompt_picture_strip_and_words(open_page: Open) -> None:
    page = open_page(1400, 900)
    page.wait_for_selector(".id-chip")
    for part in (PROMPT, ".id-overlay", ".id-strip .id-group-name", ".id-words", ".id-card:not([hidden]) .id-lead"):
        box = page.locator(part).first.bounding_box()
        assert box, part
        assert box["y"] + box["height"] <= 900, part
    expect(page.locator(".id-chip[aria-pressed='true'] .id-word")).to_have_text("penguin")


def test_the_brush_paints_on_the_picture_at_once(open_page: Open) -> None:
    page = open_page()
    page.wait_for_selector(".id-badge.ready")
    page.get_by_role("tab", name="Interventions").click()
    expect(page.locator("#id-iv-what input").first).not_to_have_value("")
    page.locator("#id-iv-where label", has_text="brush").click()
    box = page.locator(".id-canvas").bounding_box()
    assert box
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 30, y + 30, steps=4)
    page.mouse.up()
    expect(page.locator(".id-paint")).to_be_visible()
    cells = page.locator("#id-iv-cells textarea").input_value()
    assert len(cells) == 256
    page.locator("#id-iv-add").click()
    expect(page.locator(".id-iv-chips")).to_contain_text("painted region")
    page.locator(".id-iv-clear").click()
    assert page.locator("#id-iv-cells textarea").input_value() == ""


@pytest.mark.slow
def test_an_object_is_dragged_and_the_picture_shows_the_edit(open_page: Open) -> None:
    query = {"prompt": "a penguin on the snow", "seed": 1, "steps": 6, "guidance": 4, "tab": "interventions"}
    page = open_page(query="?" + urlencode(query))
    page.wait_for_selector(".id-panel[data-query*='penguin+on+the+snow']:not(.running)", state="attached")
    expect(page.get_by_label("to step")).to_have_value("2")
    original = page.locator(".id-image").get_attribute("src")
    # Where it is, says the form: the suggestion moves it to the opposite side.
    region = page.locator("#id-iv-where input:checked").input_value()
    start = {"left": 0.7, "right": 0.3}["left" if "left" in region else "right"]
    box = page.locator(".id-canvas").bounding_box()
    assert box
    x, y = box["x"] + start * box["width"], box["y"] + 0.55 * box["height"]
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + (0.5 - start) * box["width"], y, steps=6)
    expect(page.locator(".id-arrow")).to_be_visible()
    page.mouse.up()
    page.wait_for_selector(".id-iv[data-query]:not(.running)")
    preview = page.locator(".id-preview")
    expect(preview).to_be_visible()
    assert preview.get_attribute("src") != original
    expect(page.locator(".id-tag")).to_have_text("edited")
    page.keyboard.down("b")
    expect(preview).to_be_hidden()
    expect(page.locator(".id-tag")).to_have_text("original")
    page.keyboard.up("b")
    expect(preview).to_be_visible()
    page.get_by_label("show what changed").check()
    expect(page.locator(".id-overlay")).to_be_visible()
    assert "region%22%3A%22painted" in page.url


@pytest.mark.slow
def test_cancel_a_reload_and_back_lose_nothing(open_page: Open) -> None:
    page = open_page()
    page.wait_for_selector(".id-badge.ready")
    page.locator(PROMPT).fill("a crab on the beach")
    page.locator("#id-generate").click()
    # The address is that of the image to come, so that a reload in mid-job restores it.
    page.wait_for_function("new URLSearchParams(location.search).get('prompt') === 'a crab on the beach'")
    page.wait_for_selector(".id-panel.running .id-chip[data-word='crab']")
    page.locator("#id-cancel").click()
    expect(page.locator(".id-status")).to_contain_text("Cancelled")
    expect(page.locator(".id-card:not([hidden])")).to_have_count(1)
    expect(page.locator(".id-chip[aria-pressed='true']").first).to_be_visible()
    assert prompt_of(page) == "a crab on the beach"
    page.locator("[data-example='whale']").click()
    page.wait_for_function("new URLSearchParams(location.search).get('prompt')?.includes('whale')")
    page.go_back()
    expect(page.locator(".id-image")).to_have_attribute("alt", "a crab on the beach")


@pytest.mark.slow
def test_a_concept_opens_at_its_start_and_is_the_one_on_the_picture(open_page: Open) -> None:
    page = open_page()
    page.wait_for_selector(".id-badge.ready")
    page.get_by_role("tab", name="Concepts").click()
    page.locator("#id-concept-query textarea, #id-concept-query input").first.fill("cat")
    hit = page.locator("#id-concept-found .id-concept-button").nth(3)
    hit.click()
    card = page.locator(".id-concept-card")
    expect(card.locator("h3")).to_be_focused()
    number = card.get_attribute("data-number")
    page.wait_for_function("Math.abs(document.querySelector('.id-concept-card').getBoundingClientRect().top) < 60")
    expect(page.locator(".id-tag")).to_contain_text(re.compile(rf"feature {number}$"))


def test_axe_finds_nothing(open_page: Open) -> None:
    """Accessibility rules of axe-core on the page as it opens."""
    check_with_axe(open_page(), "Attribution")


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1400])
def test_axe_finds_nothing_on_any_tab(open_page: Open, width: int, scheme: str) -> None:
    page = open_page(width, scheme=scheme)
    page.wait_for_selector(".id-badge.ready")
    for tab in ("Attribution", "Concepts", "Layout", "Interventions"):
        page.get_by_role("tab", name=tab).click()
        check_with_axe(page, tab)


def check_with_axe(page: Page, tab: str) -> None:
    from axe_playwright_python.sync_playwright import Axe

    page.wait_for_selector(".id-chip")
    found = Axe().run(page).response["violations"]
    told = [f"{one['id']} at {node['target']}: {node['html'][:160]}" for one in found for node in one["nodes"]]
    assert told == [], f"{tab}: {told}"
