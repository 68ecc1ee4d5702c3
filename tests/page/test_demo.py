"""`shoal demo --page`: the demo's nodes in the page, and what letters on the terminal do to them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.e2e.test_home import SECONDS, wait
from tests.models import smollm2_dir

from shoal.processes import end

from .conftest import Tab

pytestmark = pytest.mark.page


def test_the_demo_shows_a_death_and_a_return(tab: Tab, tmp_path: Path) -> None:
    smollm2_dir()
    environ = {name: value for name, value in os.environ.items() if "DISPLAY" not in name}
    command = [sys.executable, "-m", "shoal", "demo", "--page"]
    said = tmp_path / "said"
    with said.open("w") as log:
        demo = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=log, stderr=log, text=True, env=environ
        )
    assert demo.stdin is not None

    def says(text: str) -> None:
        wait(lambda: text in said.read_text() or demo.poll() is not None, said.read_text)
        assert text in said.read_text()

    def types(letter: str) -> None:
        print(letter, file=demo.stdin, flush=True)

    try:
        says("shoal: listening on http")
        page = tab.opens(said.read_text().rpartition("listening on ")[2].split()[0], "house")
        page.locator("#devices li.working").nth(2).wait_for()
        assert page.locator("#devices li").count() == 4
        types("h")
        says("gets hot: each of its steps takes 5 times as long")
        types("k")
        says(" dies")
        page.locator("#devices li.lost").wait_for()
        types("s")
        page.locator("#events li", has_text=" is back").wait_for()
        demo.stdin.close()  # which ends no node
        page.wait_for_timeout(1000)
        assert page.locator("#events li", has_text="leaving").count() == 0
        demo.send_signal(signal.SIGINT)
        assert demo.wait(SECONDS) == 0, said.read_text()
    finally:
        end([demo])
    tab.foreseen = ("ERR_CONNECTION_REFUSED", "ERR_INCOMPLETE_CHUNKED")
