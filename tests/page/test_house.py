"""The view of the house stays live while devices join, leave and die, with an answer under way."""

from __future__ import annotations

import shutil
import signal
from dataclasses import replace
from typing import Any

import httpx
import pytest
from tests.e2e.test_home import Device, House
from tests.local.test_status import STATUS
from tests.server.conftest import serving

import shoal
from shoal.net.errors import NodeLostError
from shoal.status import Status

from .conftest import Tab, opened

pytestmark = pytest.mark.page
LONG = "Write a very long story about the sea, with many chapters."
MEASURED = """[...document.querySelectorAll("#devices .working")]
    .filter(card => /[0-9.]+ ms, predicted [0-9.]+ ms/.test(card.textContent)).length"""


def test_a_join_a_move_and_a_death_are_seen_as_they_happen(chromium: Any, tab: Tab, house: House) -> None:
    """One tab shows the house and is never loaded again. Another one has an answer, which goes on."""
    page = tab.opens(house.url, "house")

    def happens(text: str) -> None:
        page.locator("#events li", has_text=text).first.wait_for()

    def is_(state: str, device: Device) -> None:
        page.locator(f"#devices li.{state} h3", has_text=device.name).wait_for()

    happens("Connected: ")
    is_("working", house.laptop)
    is_("working", house.phone)
    held = "cache/shoal/fetched"  # with its files, the tablet can take what the phone has, at any time
    shutil.copytree(house.phone.place / held, house.tablet.place / held)
    house.joins(house.tablet)
    happens("tablet has joined")
    is_("ready", house.tablet)
    with opened(chromium) as other:
        other.opens(house.url)
        other.sets(temperature=0)
        other.asks(LONG)
        page.locator("#figures").get_by_text("1 answer").wait_for()
        page.locator("#chain .fish").wait_for(state="attached")
        tab.until(f"({MEASURED}) === 2")

        assert house.running["phone"].stop(signal.SIGTERM) == 0
        happens("phone is leaving")
        happens("from phone to tablet")
        happens("tablet computes")
        is_("working", house.tablet)

        house.node(house.phone)
        happens("phone is back")
        is_("ready", house.phone)
        house.running["tablet"].stop(signal.SIGKILL)
        happens("tablet is lost")
        is_("working", house.phone)
        happens("Answers went on after the loss of a device")

        so_far = (
            "JSON.parse(localStorage['shoal.chat.' + sessionStorage['shoal.current']]).messages[1].tokens"
        )
        other.until(f"{so_far} > {other.until(so_far)}")
        other.page.get_by_role("button", name="Stop").click()
        told, tokens = other.answered(), other.until(so_far)
    body = {"messages": [{"role": "user", "content": LONG}], "temperature": 0, "max_tokens": tokens}
    reply = httpx.post(f"{house.url}/v1/chat/completions", json=body, timeout=None, trust_env=False)
    alone = reply.json()["choices"][0]["message"]["content"]
    assert len(told) > 100 and (told.startswith(alone) or alone.startswith(told))
    house.node(house.tablet)


def test_a_server_of_one_process_says_that_there_is_no_house(tab: Tab, tiny: shoal.LLM) -> None:
    tab.foreseen = (r"404 .*/house/events",)
    with serving(tiny) as served:
        page = tab.opens(f"http://127.0.0.1:{served.port}", "house")
        page.get_by_text("The model runs in one process of this device").wait_for()
        assert not page.locator("#house-live").is_visible()


def test_what_a_head_tells_is_shown(tab: Tab, tiny: shoal.LLM) -> None:
    """Battery, heat, weights on their way, links and waits, of a status that is played; and its end."""
    told: list[Status] = [STATUS]
    with serving(tiny, status=lambda: told[0] if told else lost()) as served:
        page = tab.opens(f"http://127.0.0.1:{served.port}", "house")
        phone = page.locator("#devices li", has=page.get_by_role("heading", name="phone"))
        for text in ("81%", "44 °C", "its battery is at 44 °C", "20 of 32 units"):
            phone.get_by_text(text, exact=True).wait_for()
        assert phone.locator(".hot").inner_text() == "44 °C"
        (transfer,) = STATUS.transfers
        bar = page.get_by_label(f"Weights for {transfer.device}")
        assert abs(float(bar.evaluate("bar => bar.value")) - transfer.got / transfer.wanted) < 1e-6
        told[0] = replace(STATUS, transfers=(), recoveries=STATUS.recoveries + 1, devices=STATUS.devices[:2])
        for text in (
            f"{transfer.device} fetches no more weights",
            "Answers went on after the loss of a device",
            f"{STATUS.devices[2].name} has left the list",
        ):
            page.locator("#events li", has_text=text).wait_for()
        assert not bar.is_visible() and phone.is_visible()
        told.clear()
        page.get_by_text("There is no word from the head: the head has ended").wait_for()
        told.append(STATUS)
        page.locator("#events li", has_text="Connected: ").nth(1).wait_for()


def test_a_server_that_falls_silent_is_asked_again(tab: Tab, tiny: shoal.LLM) -> None:
    """As one whose device has lost its network: nothing ends the connection."""
    silent: list[Any] = []
    tab.page.clock.install()
    tab.page.route("**/house/events", lambda route: silent.append(route))
    with serving(tiny, status=lambda: STATUS) as served:
        page = tab.opens(f"http://127.0.0.1:{served.port}", "house")
        while not silent:
            page.wait_for_timeout(20)
        page.clock.fast_forward(30_000)
        page.get_by_text("There is no word from the server").wait_for()
        page.unroute_all(behavior="ignoreErrors")
        page.locator("#events li", has_text="Connected: ").wait_for()


def lost() -> Status:
    raise NodeLostError("the head has ended")
