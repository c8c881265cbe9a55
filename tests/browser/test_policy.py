"""The content policy: the page needs nothing that it forbids."""

from collections.abc import Callable

import pytest
from playwright.sync_api import Page, expect

Open = Callable[..., Page]


@pytest.mark.slow
def test_every_tab_keeps_the_content_policy(open_page: Open) -> None:
    """`open_page` fails the test for any message of the browser about the policy."""
    page = open_page()
    page.wait_for_selector(".id-badge.ready")
    page.locator(".id-example").first.click()
    for name in ("Concepts", "Layout", "Attribution", "Interventions"):
        page.get_by_role("tab", name=name).click()
        expect(page.get_by_role("tab", name=name)).to_have_attribute("aria-selected", "true")
        page.wait_for_timeout(300)
    page.get_by_text("paint with a brush").click()
    expect(page.locator("#id-iv-brush canvas").first).to_be_visible()
