"""Waiting for sockets: what ends a wait, and when a thread looks instead of sleeping."""

import math
import os
import socket
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from shoal.engine import wait as waiting
from shoal.engine.power import on_mains
from shoal.engine.wait import CALM_WAITS, GAVE_UP, SPIN_SECONDS, Spin, waiter

WAITS = [waiter(), waiting._sleeping]


@pytest.mark.parametrize("wait", WAITS, ids=["library", "select"])
@pytest.mark.parametrize("spin", [0.0, 10.0])
def test_a_wait_ends_once_something_can_be_read(wait: waiting.Wait, spin: float) -> None:
    here, there = socket.socketpair()
    read, write = os.pipe()
    try:
        assert wait([here.fileno(), read], min(spin, 0.001), 0.002) % GAVE_UP == 0
        os.write(write, b"!")
        assert wait([here.fileno(), read], spin, None) % GAVE_UP == 1
        there.send(b"x")
        assert wait([here.fileno(), read], spin, 60.0) % GAVE_UP == 2
        there.close()  # an end can be read, too
        assert here.recv(9) == b"x" and os.read(read, 9) == b"!"
        assert wait([here.fileno(), read], spin, 60.0) % GAVE_UP == 1
    finally:
        here.close()
        os.close(read)
        os.close(write)


@pytest.mark.parametrize("wait", WAITS, ids=["library", "select"])
def test_a_wait_lasts_as_long_as_it_should_and_lets_other_threads_run(wait: waiting.Wait) -> None:
    read, write = os.pipe()
    try:
        start = time.monotonic()
        assert wait([read], 0.0, 0.03) % GAVE_UP == 0
        assert time.monotonic() - start >= 0.03
        threading.Timer(0.02, os.write, (write, b"!")).start()
        assert wait([read], 30.0, 60.0) % GAVE_UP == 1  # the timer's thread needs the interpreter's lock
    finally:
        os.close(read)
        os.close(write)


class Answers:
    """A wait that returns what it is told, and notes how long it was asked to look."""

    def __init__(self, *answers: int) -> None:
        self.answers, self.asked = list(answers), list[tuple[float, float | None]]()

    def __call__(self, handles: Sequence[int], spin_s: float, wait_s: float | None) -> int:
        self.asked.append((spin_s, wait_s))
        return self.answers.pop(0)


def test_a_spin_looks_until_something_arrives() -> None:
    wait = Answers(0, 0, 1)
    assert len(list(Spin(wait).looks([3], 0.0005))) == 2
    assert [spin for spin, _ in wait.asked] == [0.0005] * 3


def test_a_spin_ends_after_its_time() -> None:
    def slept(handles: Sequence[int], spin_s: float, wait_s: float | None) -> int:
        assert wait_s is not None and wait_s <= 0.004
        time.sleep(wait_s)
        return 0

    assert 1 <= len(list(Spin(slept).looks([3], 0.004))) <= math.ceil(SPIN_SECONDS / 0.004)
    assert list(Spin(slept).looks([3], 0.004, until=time.perf_counter())) == []


def test_a_spin_is_left_out_after_long_waits_and_comes_back_after_short_ones() -> None:
    spin = Spin(lambda handles, spin_s, wait_s: 0)
    for _ in range(5):
        spin.waited(10.0)
    assert list(spin.looks([3], 1.0)) == []
    for _ in range(2):
        spin.waited(0.001)
    assert next(spin.looks([3], 1.0), "none") is None


@pytest.mark.parametrize("found", [GAVE_UP, GAVE_UP + 1])
def test_a_spin_rests_where_another_program_wants_the_core(found: int) -> None:
    wait = Answers(found, *[0] * 100)
    spin = Spin(wait)
    list(spin.looks([3], 1.0))
    for _ in range(CALM_WAITS):
        assert list(spin.looks([3], 1.0)) == []
    assert len(wait.asked) == 1
    assert next(spin.looks([3], 1.0), "none") is None


MAINS = {"type": "Mains\n", "online": "1\n"}
BATTERY = {"type": "Battery\n"}
CASES = [
    ({}, True),
    ({"AC": MAINS}, True),
    ({"AC": MAINS, "BAT0": BATTERY}, True),
    ({"AC": {**MAINS, "online": "0\n"}, "BAT0": BATTERY}, False),
    ({"BAT0": BATTERY}, False),
    ({"hidpp_battery_0": {**BATTERY, "scope": "Device\n"}}, True),
    ({"usb": {"type": "USB\n", "online": "1\n"}, "battery": {**BATTERY, "scope": "System\n"}}, True),
]


@pytest.mark.parametrize(("supplies", "expected"), CASES, ids=[str(sorted(case[0])) for case in CASES])
def test_mains_power_is_what_the_system_tells(
    tmp_path: Path, supplies: dict[str, dict[str, str]], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.delenv("ANDROID_ROOT", raising=False)
    folder = tmp_path / "sys/class/power_supply"
    folder.mkdir(parents=True)
    for name, texts in supplies.items():
        (folder / name).mkdir()
        for key, text in texts.items():
            (folder / name / key).write_text(text)
    assert on_mains(tmp_path) is expected


def test_a_system_that_tells_nothing_is_not_on_mains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ANDROID_ROOT", raising=False)
    monkeypatch.setattr("sys.platform", "linux")
    assert on_mains(tmp_path)  # a machine without such supplies, as in a container
    monkeypatch.setenv("ANDROID_ROOT", "/system")
    assert not on_mains(tmp_path)
    monkeypatch.setattr("sys.platform", "darwin")
    assert not on_mains(tmp_path)
