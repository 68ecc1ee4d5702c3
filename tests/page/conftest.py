"""A real Chromium, a house of real processes, and what every page must keep to: it asks nobody but its own
server, and nothing goes wrong in it that a test has not foreseen."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import pytest
from tests.e2e.test_home import SECONDS, House
from tests.models import smollm2_dir, tiny_chat_model

import shoal
from shoal.processes import end

DESKTOP, PHONE = (1280, 800), (390, 844)


@pytest.fixture(scope="session")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """A laptop with `shoal up`, and a phone. Each can hold a good half of the model, with a context in which
    an answer outlasts what a test does to the devices meanwhile."""
    made = House(tmp_path_factory.mktemp("house"), smollm2_dir(), positions=2048)
    try:
        up = made.up(str(made.model))
        made.joins(made.phone)
        up.says("ready:", "phone", "laptop")
        yield made
    finally:
        end([program.process for program in made.running.values()])


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[shoal.LLM]:
    """A tiny model that speaks noise, in this process."""
    directory = tmp_path_factory.mktemp("tiny")
    tiny_chat_model(directory)
    with shoal.LLM(directory / "tiny", context=300) as opened:
        yield opened


@dataclass
class Tab:
    """A page in a browser that has kept nothing yet. `foreseen`: patterns of errors that may be logged."""

    page: Any
    url: str = ""
    errors: list[str] = field(default_factory=list)
    asked: set[str] = field(default_factory=set)
    foreseen: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.page.set_default_timeout(SECONDS * 1000)
        self.page.on("request", lambda request: self.asked.add(request.url))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", self._heard)

    def _heard(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.errors.append(f"{message.text} {message.location.get('url', '')}")

    def opens(self, url: str, view: str = "chat") -> Any:
        """Opens a view; returns the page."""
        self.url = url
        self.page.goto(f"{url}/#{view}")
        return self.page

    def until(self, script: str) -> Any:
        """Waits until an expression of JavaScript is true; returns its value. The page's policy forbids the
        driver's own way of waiting, which evaluates text."""
        end = time.monotonic() + SECONDS
        while not (value := self.page.evaluate(script)):
            assert time.monotonic() < end, script
            self.page.wait_for_timeout(20)
        return value

    def asks(self, text: str) -> None:
        """Writes a message and sends it with the keyboard."""
        self.page.get_by_label("Your message").fill(text)
        self.page.keyboard.press("Enter")

    def answered(self) -> str:
        """The text of the last answer as it is kept, when it has ended."""
        self.page.locator("#send").wait_for()
        return str(self.conversation()["messages"][-1]["text"])

    def conversation(self) -> Any:
        """What is kept of the conversation that is shown."""
        return self.page.evaluate("JSON.parse(localStorage['shoal.chat.' + sessionStorage['shoal.current']])")

    def sets(self, **values: object) -> None:
        """Changes settings in their dialog."""
        self.page.get_by_role("button", name="Settings").click()
        for name, value in values.items():
            self.page.locator(f"dialog [name={name}]").fill(str(value))
        self.page.get_by_role("button", name="Save").click()

    def check(self) -> None:
        """Nobody else was asked, and nothing went wrong that was not foreseen."""
        assert {url for url in self.asked if not url.startswith((f"{self.url}/", "data:", "blob:"))} == set()
        assert [text for text in self.errors if not any(re.search(one, text) for one in self.foreseen)] == []


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """Debian's Chromium. Its sandbox does not let root in."""
    with import_module("playwright.sync_api").sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def opened(chromium: Any, size: tuple[int, int] = DESKTOP, **options: Any) -> Iterator[Tab]:
    """A tab of a browser with its own storage, in a window of this size."""
    context = chromium.new_context(viewport={"width": size[0], "height": size[1]}, **options)
    try:
        made = Tab(context.new_page())
        yield made
        made.check()
    finally:
        context.close()


@pytest.fixture
def tab(chromium: Any) -> Iterator[Tab]:
    """A tab on a desktop."""
    with opened(chromium) as made:
        yield made
