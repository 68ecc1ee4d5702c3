"""How the page looks, for eyes and for those who do not see: both views, both themes, on a phone and on a
desktop, with pictures in build/page."""

from __future__ import annotations

from importlib.resources import files
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from tests.e2e.test_home import House

from .conftest import DESKTOP, PHONE, opened

pytestmark = pytest.mark.page
PICTURES = Path(__file__).resolve().parents[2] / "build" / "page"
QUESTION = "Name three fish, each with one sentence. Then write a small Python function that counts them."
FAULTS = """async () => (await axe.run()).violations
    .filter(({ impact }) => ["serious", "critical"].includes(impact))
    .map(({ id, nodes }) => [id, nodes.map(node => node.failureSummary + " " + node.html)])"""

SMALL = """[...document.querySelectorAll("button, a, input")].filter(it => it.checkVisibility())
    .filter(it => it.getBoundingClientRect().height < 24 && !it.matches(".skip")).map(it => it.outerHTML)"""


@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_each_view_in_each_theme_has_no_serious_fault(
    chromium: Any, house: House, size: tuple[int, int]
) -> None:
    PICTURES.mkdir(parents=True, exist_ok=True)
    axe = files("axe_playwright_python").joinpath("axe.min.js").read_text()
    with opened(chromium, size) as tab:
        page = tab.opens(house.url)
        tab.sets(max_tokens=72, temperature=0)
        tab.asks(QUESTION)
        tab.answered()
        tab.asks(QUESTION)
        for view, theme in product(("house", "chat"), ("dark", "light")):
            page.emulate_media(color_scheme=theme)
            page.evaluate("view => location.hash = view", view)
            page.locator(f"#{view}").wait_for()
            if view == "house":
                page.locator("#devices li.working").first.wait_for()
            else:
                tab.answered()
            page.evaluate(axe)
            assert page.evaluate(FAULTS) == []
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing sticks out"
            picture = PICTURES / f"{view}-{theme}-{size[0]}.png"
            page.screenshot(path=picture, full_page=view == "house")


def test_the_switch_of_the_theme_is_kept(chromium: Any, house: House) -> None:
    paper = "getComputedStyle(document.body).backgroundColor"
    with opened(chromium, color_scheme="light") as tab:
        page = tab.opens(house.url)
        light = page.evaluate(paper)
        switch = page.get_by_role("button", name="Theme")
        assert switch.inner_text() == "Theme: auto"
        switch.click()
        switch.click()
        assert switch.inner_text() == "Theme: dark" and page.evaluate(paper) != light
        page.reload()
        assert switch.inner_text() == "Theme: dark" and page.evaluate(paper) != light


@pytest.mark.parametrize("view", ["chat", "house"])
def test_the_smallest_phone_shows_all_and_nothing_moves_for_who_wants_no_motion(
    chromium: Any, house: House, view: str
) -> None:
    with opened(chromium, (360, 640), reduced_motion="reduce", has_touch=True) as tab:
        page = tab.opens(house.url)
        tab.sets(max_tokens=60)
        tab.asks(QUESTION)
        page.evaluate("view => location.hash = view", view)
        tab.until("document.querySelector('#pulse').textContent.includes('tokens/s')")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert page.locator(".fish").count() == 0
        assert page.evaluate("document.getAnimations().length") == 0
        assert page.evaluate(SMALL) == [], "fingers need room"
