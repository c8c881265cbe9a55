"""Further questions, with the real app and the real model: a word pair, a removed word, captions, likelihood."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import Page, expect

from tests.browser.conftest import Opener, wait_while_it_goes_on

pytestmark = pytest.mark.timeout(1200)  # on a busy machine


def wait_for_answer(page: Page, name: str) -> None:
    wait_while_it_goes_on(
        page,
        "answer => document.querySelector(answer) !== null",
        f".id-{name}.id-answer:not(.empty):not(.running):not(.old)",
    )


def open_example(page: Page) -> None:
    """The first stored example, with a model that is ready."""
    page.wait_for_selector(".id-badge.ready")
    page.wait_for_selector(".id-overlay:not([hidden])")
    page.get_by_text("How it is measured").click()
    page.get_by_label("20%").check()
    wait_while_it_goes_on(page, "() => !document.querySelector('.id-status .id-bar i')")


@pytest.mark.slow
def test_two_words_are_decomposed_and_restored_by_the_link(open_page: Opener, tmp_path: Path) -> None:
    page = open_page()
    open_example(page)
    page.locator(".id-chip[data-word='penguin']").click()
    page.locator(".id-chip[data-word='snow']").press("Shift+Enter")
    expect(page.locator(".id-question-progress").first).to_contain_text(re.compile("Waiting|Measuring"))
    wait_for_answer(page, "pair")
    expect(page.locator(".id-pair .id-lead")).to_contain_text("“penguin” and “snow” together contributed")
    expect(page.locator(".id-chip.second")).to_have_attribute("data-word", "snow")

    overlay = page.locator(".id-overlay")
    of_word = overlay.get_attribute("src")
    page.locator("button.id-part[data-part='first']").click()
    expect(page.locator(".id-tag")).to_have_text("only by “penguin”")
    expect(page.locator(".id-legend")).to_contain_text("−")
    assert overlay.get_attribute("src") != of_word
    page.locator(".id-chip[data-word='penguin']").click()
    assert overlay.get_attribute("src") == of_word

    for name in ("CSV", "JSON", "PNG"):
        with page.expect_download() as download:
            page.locator(".id-pair .id-downloads").get_by_text(name, exact=True).click()
        download.value.save_as(tmp_path / name)
    assert json.loads((tmp_path / "JSON").read_text())["words"] == ["penguin", "snow"]
    with Image.open(tmp_path / "PNG") as image:
        assert image.width == 4 * 384

    again = open_page(query="?" + page.url.partition("?")[2])
    again.wait_for_selector(".id-pair:not(.empty)")
    expect(again.locator(".id-pair .id-lead")).to_contain_text("“penguin” and “snow” together contributed")


def test_a_question_is_stopped(page: Page) -> None:
    page.get_by_role("tab", name="Attribution").click()
    page.locator(".id-pair-go").click()
    page.locator(".id-stop").first.click()
    expect(page.locator(".id-question-progress").first).to_contain_text("Stopped.")
    expect(page.locator(".id-stop")).to_have_count(0)


@pytest.mark.slow
def test_a_word_is_removed(open_page: Opener) -> None:
    page = open_page()
    open_example(page)
    page.locator(".id-chip[data-word='penguin']").click()
    other = page.get_by_label("Or replace it by another word")
    other.fill("pengiun")
    expect(page.locator(".id-counterfactual-go")).to_have_text(re.compile("with “pengiun” for\\s+“penguin”"))
    page.locator(".id-counterfactual-go").click()
    expect(page.locator("#id-other-word")).to_contain_text("This model does not know 'pengiun'")
    other.fill("")
    page.locator(".id-counterfactual-go").click()
    wait_for_answer(page, "counterfactual")
    error = re.search(r"reproduces the picture to ([\d.]+)%", page.locator(".id-counterfactual").inner_text())
    change = re.search(r"([\d.]+)% of the picture changes", page.locator(".id-counterfactual .id-lead").inner_text())
    assert error
    assert change
    assert float(error[1]) < 3 < float(change[1])
    expect(page.locator(".id-counterfactual")).to_contain_text("correlation of")
    assert "without=penguin" in page.url


@pytest.mark.slow
def test_the_likelihood_is_measured(open_page: Opener) -> None:
    page = open_page(width=390, height=844)
    open_example(page)
    page.locator(".id-likelihood-go").click()
    wait_for_answer(page, "likelihood")
    lead = page.locator(".id-likelihood .id-lead").inner_text()
    found = re.search(r"has (.+) ± 0.02 bits per dimension with its prompt, and (.+) ± 0.02 without", lead)
    assert found
    with_prompt, without = (float(number.replace("−", "-")) for number in found.groups())
    assert with_prompt < without < 0
    assert "likelihood=1" in page.url
    again = open_page(query="?" + page.url.partition("?")[2])
    again.wait_for_selector(".id-likelihood:not(.empty)")
    expect(again.locator(".id-likelihood .id-lead")).to_contain_text("bits per dimension")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.locator(".id-example").nth(1).click()
    expect(page.locator(".id-likelihood.old .id-old")).to_have_text("previous picture")


@pytest.mark.slow
def test_captions_are_ranked(open_page: Opener) -> None:
    page = open_page(width=390, height=844)
    open_example(page)
    page.get_by_text("Which caption fits this picture?").click()
    field = page.locator("#id-caption-lines textarea")
    field.wait_for()
    page.wait_for_timeout(500)  # while the page still sets up what was unfolded
    field.fill("a penguin on the snow")
    page.locator("#id-compare").click()
    expect(page.locator("#id-captions")).to_contain_text("Write two captions or more")
    field.fill("a whale in the sea\na penguin and a tree on the snow")
    page.locator("#id-compare").click()
    wait_for_answer(page, "ranking")
    expect(page.locator(".id-ranking .id-lead")).to_contain_text("“a penguin and a tree on the snow” fits better")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert "captions=" in page.url
    page.locator(".id-example").nth(1).click()
    expect(page.locator(".id-ranking.old .id-old")).to_have_text("previous picture")
