"""A node that follows a policy, and one that is told to end: what it says, when it ends, and how."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from tests.patience import LIMIT

from shoal.cli import main as shoal
from shoal.cluster_view import coordinator_identity
from shoal.engine.errors import ShoalError
from shoal.engine.model_directory import Model
from shoal.engine.power import PowerReader, Readings
from shoal.net.connection import Connection
from shoal.net.dial import dial, open_tcp
from shoal.net.messages import Assign, Condition, Epoch, Loaded, Ping, Pong, Release
from shoal.net.policy import PHONE, Policy, parse_policy
from shoal.net.throttling import LEAVE_SECONDS, RAM_SECONDS, SHARES
from shoal.policy_enforcer import IDLE_SECONDS, LEAVING_SECONDS, LOOK_SECONDS, SETTLED_SECONDS, PolicyEnforcer
from shoal.processes import NodeSpec, RunningNode, nodes

TINY = Path(__file__).resolve().parents[1] / "fixtures" / "tiny-llama"
EPOCH = Epoch(9, 1)
GOOD = Readings(True, 80, 31, 55, 100, 3, 0, 2 * 10**9)
GOOD_CONDITION = Condition(battery=80.0, temperature=31.0)
PHONE_FILES: dict[str, object] = {
    "sys/class/power_supply/battery/type": "Battery",
    "sys/class/power_supply/battery/status": "Charging",
    "sys/class/power_supply/battery/capacity": 80,
    "sys/class/power_supply/battery/temp": 310,
    "sys/class/power_supply/usb/type": "USB",
    "sys/class/power_supply/usb/online": 1,
    "sys/class/thermal/thermal_zone0/type": "cpu-0-0-usr",
    "sys/class/thermal/thermal_zone0/temp": 55000,
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_max_freq": 2400000,
    "sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq": 2400000,
    "proc/pressure/cpu": "some avg10=1.00 avg60=0.00 avg300=0.00 total=1",
    "proc/pressure/memory": "some avg10=0.00 avg60=0.00 avg300=0.00 total=1",
    "proc/meminfo": "MemTotal: 8000000 kB\nMemAvailable: 3000000 kB",
}


def write(root: Path, files: Mapping[str, object]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return root


# Without a process: the clock jumps.


class FakeNode:
    """What a PolicyEnforcer asks of a node."""

    def __init__(self, *, holds: bool = True, stuck: str | None = None, idle: bool = False) -> None:
        self.holds_layers, self._stuck, self.idle = holds, stuck, idle
        self.coordinated = True

    def stuck(self) -> str | None:
        return self._stuck


class FakeReader:
    """Readings that a test changes."""

    def __init__(self, readings: Readings = GOOD) -> None:
        self.readings, self.reads = readings, 0

    def read(self) -> Readings:
        self.reads += 1
        return self.readings


async def inline(call: Callable[[], None]) -> None:
    await trio.lowlevel.checkpoint()
    call()


class Told:
    """Signals that arrive when a test says so."""

    def __init__(self) -> None:
        self.send, self._numbers = trio.open_memory_channel[int](10)

    def __aiter__(self) -> AsyncIterator[int]:
        return self._numbers.__aiter__()


def enforced(
    test: Callable[[PolicyEnforcer, FakeReader, Told, list[str]], Awaitable[None]],
    policy: str | None = "none",
    readings: Readings = GOOD,
) -> None:
    async def main() -> None:
        reader, log = FakeReader(readings), list[str]()
        chosen = None if policy is None else parse_policy(policy)
        enforcer = PolicyEnforcer(chosen, reader, log.append, trio.current_time, inline)  # type: ignore[arg-type]
        with trio.fail_after(3600):
            await test(enforcer, reader, Told(), log)

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_a_node_without_layers_ends_at_once_and_says_nothing() -> None:
    async def test(enforcer: PolicyEnforcer, reader: FakeReader, told: Told, log: list[str]) -> None:
        await enforcer.begin()
        assert enforcer.condition() is None
        told.send.send_nowait(signal.SIGTERM)
        assert await enforcer.until_left(FakeNode(holds=False), told) is None  # type: ignore[arg-type]
        assert (trio.current_time(), log, reader.reads) == (0.0, [], 0)

    enforced(test)


def test_a_node_that_is_told_to_end_waits_until_its_layers_have_moved() -> None:
    async def test(enforcer: PolicyEnforcer, reader: FakeReader, told: Told, log: list[str]) -> None:
        node = FakeNode()
        told.send.send_nowait(signal.SIGINT)

        async def empty() -> None:
            await trio.sleep(7)
            assert enforcer.condition() == Condition(1.0, True, "it was told to end")
            node.holds_layers = False

        async with trio.open_nursery() as tasks:
            tasks.start_soon(empty)
            assert await enforcer.until_left(node, told) is None  # type: ignore[arg-type]
        assert 7 + SETTLED_SECONDS <= trio.current_time() < 8
        (line,) = log
        assert line.startswith("shoal: leaving, since it was told to end: ends when its layers have moved")
        assert "after 30 s at most (Ctrl-C ends it at once)" in line

    enforced(test)


def test_a_coordinator_that_disconnects_soon_is_no_news() -> None:
    """As one that ends at the same time."""

    async def test(enforcer: PolicyEnforcer, reader: FakeReader, told: Told, log: list[str]) -> None:
        node = FakeNode()
        told.send.send_nowait(signal.SIGINT)

        async def disconnect() -> None:
            await trio.sleep(0.1)
            node.holds_layers = node.coordinated = False

        async with trio.open_nursery() as tasks:
            tasks.start_soon(disconnect)
            assert await enforcer.until_left(node, told) is None  # type: ignore[arg-type]
        assert trio.current_time() < 0.2
        assert log == []

    enforced(test)


def test_layers_that_do_not_move_are_waited_for_no_longer_than_the_bound() -> None:
    async def test(enforcer: PolicyEnforcer, reader: FakeReader, told: Told, log: list[str]) -> None:
        told.send.send_nowait(signal.SIGINT)
        assert await enforcer.until_left(FakeNode(), told) is None  # type: ignore[arg-type]
        assert trio.current_time() == pytest.approx(LEAVING_SECONDS, abs=0.3)
        assert log[1:] == ["shoal: its layers have not moved: the coordinator goes on as after a loss"]

    enforced(test)


def test_layers_that_nobody_uses_or_takes_are_not_waited_for() -> None:
    async def test(enforcer: PolicyEnforcer, reader: FakeReader, told: Told, log: list[str]) -> None:
        node = FakeNode(idle=True)

        async def use() -> None:
            await trio.sleep(2)
            node.idle = False
            await trio.sleep(4)
            node.idle = True

        told.send.send_nowait(signal.SIGINT)
        async with trio.open_nursery() as tasks:
            tasks.start_soon(use)
            assert await enforcer.until_left(node, told) is None  # type: ignore[arg-type]
        assert trio.current_time() == pytest.approx(6 + IDLE_SECONDS, abs=0.3)
        assert log[1:] == ["shoal: no answer uses its layers, and no other node takes them: it ends now"]

    enforced(test)


def test_a_second_signal_ends_the_wait() -> None:
    async def test(enforcer: PolicyEnforcer, reader: FakeReader, told: Told, log: list[str]) -> None:
        async def insist() -> None:
            told.send.send_nowait(signal.SIGINT)
            await trio.sleep(3)
            told.send.send_nowait(signal.SIGTERM)

        async with trio.open_nursery() as tasks:
            tasks.start_soon(insist)
            assert await enforcer.until_left(FakeNode(), told) == signal.SIGTERM  # type: ignore[arg-type]
        assert trio.current_time() == pytest.approx(3)

    enforced(test)


def test_layers_of_a_stage_that_hangs_are_not_waited_for() -> None:
    async def test(enforcer: PolicyEnforcer, reader: FakeReader, told: Told, log: list[str]) -> None:
        told.send.send_nowait(signal.SIGINT)
        assert await enforcer.until_left(FakeNode(stuck="it hangs"), told) is None  # type: ignore[arg-type]
        assert (trio.current_time(), log) == (0.0, [])

    enforced(test)


@pytest.mark.parametrize(
    ("policy", "bad", "seconds", "why"),
    [
        ("charging", {"plugged": False}, LEAVE_SECONDS, "it is not plugged in"),
        ("battery=30", {"battery": 12}, LEAVE_SECONDS, "its battery has 12 %, less than 30 %"),
        ("temperature=42", {"temperature": 50}, LEAVE_SECONDS, "its battery has 50 °C, more than 47 °C"),
        ("memory=9", {"memory_pressure": 60}, LEAVE_SECONDS, "its RAM is short 60 % of the time, more"),
        ("ram=100MB", {"ram": 5e7}, RAM_SECONDS, "programs can get 50 MB of RAM, less than 100 MB"),
        ("phone", {"battery": 12}, LEAVE_SECONDS, "its battery has 12 %, less than 30 %"),
    ],
)  # fmt: skip
def test_each_rule_that_is_broken_makes_the_node_leave(
    policy: str, bad: dict[str, Any], seconds: float, why: str
) -> None:
    async def test(enforcer: PolicyEnforcer, reader: FakeReader, told: Told, log: list[str]) -> None:
        await enforcer.begin()
        assert enforcer.condition() == GOOD_CONDITION
        node = FakeNode()

        async def spoil() -> None:
            await trio.sleep(100)
            reader.readings = replace(GOOD, **bad)
            await trio.sleep(seconds - LOOK_SECONDS)
            condition = enforcer.condition()
            assert condition is not None and not condition.leaving
            await trio.sleep(3 * LOOK_SECONDS)
            condition = enforcer.condition()
            assert condition is not None and condition.leaving and condition.reason.startswith(why)
            node.holds_layers = False

        async with trio.open_nursery() as tasks:
            tasks.start_soon(spoil)
            assert await enforcer.until_left(node, told) is None  # type: ignore[arg-type]
        assert trio.current_time() < 100 + seconds + 3 * LOOK_SECONDS + 1
        assert any(f"leaving, since {why}" in line for line in log)
        assert reader.reads == pytest.approx(trio.current_time() / LOOK_SECONDS, abs=4)

    enforced(test, policy)


@pytest.mark.parametrize(
    ("policy", "bad"),
    [
        ("temperature=42", {"temperature": 44}), ("chip=85", {"chip": 90}), ("clock=40", {"clock": 30}),
        ("cpu=50", {"cpu_pressure": 80}), ("phone", {"temperature": 44}),
    ],
)  # fmt: skip
def test_each_rule_of_heat_and_load_makes_the_share_smaller_and_larger_again(
    policy: str, bad: dict[str, Any]
) -> None:
    async def test(enforcer: PolicyEnforcer, reader: FakeReader, told: Told, log: list[str]) -> None:
        await enforcer.begin()
        seen = list[float]()

        async def watch() -> None:
            for i in range(1200):
                if i in (10, 200):
                    reader.readings = GOOD if i == 200 else replace(GOOD, **bad)
                condition = enforcer.condition()
                assert condition is not None and not condition.leaving
                if not seen or seen[-1] != condition.share:
                    seen.append(condition.share)
                await trio.sleep(1)
            told.send.send_nowait(signal.SIGINT)

        async with trio.open_nursery() as tasks:
            tasks.start_soon(watch)
            await enforcer.until_left(FakeNode(holds=False), told)  # type: ignore[arg-type]
        assert seen == [*SHARES, *SHARES[-2::-1]]
        assert len([line for line in log if "computes for at most" in line]) == 2 * (len(SHARES) - 1)
        assert log[1].startswith("shoal: this device computes for at most 70% of the time: its ")

    enforced(test, policy)


@pytest.mark.parametrize(
    ("policy", "readings", "message"),
    [
        ("charging", {"plugged": False}, "it is not plugged in; plug it in, or set another --policy"),
        ("battery=30", {"battery": 12}, "its battery has 12 %, less than 30 %; charge it, or set another"),
        ("temperature=42", {"temperature": 50}, "its battery has 50 °C, more than 47 °C; let it cool down"),
        ("ram=3GB", {}, "programs can get 2000 MB of RAM, less than 3000 MB; end other programs, or"),
    ],
)  # fmt: skip
def test_a_node_does_not_start_where_its_policy_allows_no_work(
    policy: str, readings: dict[str, Any], message: str
) -> None:
    async def test(enforcer: PolicyEnforcer, reader: FakeReader, told: Told, log: list[str]) -> None:
        with pytest.raises(ShoalError) as caught:
            await enforcer.begin()
        assert f"the policy of this device allows no work now: {message}" in str(caught.value)

    enforced(test, policy, replace(GOOD, **readings))


def test_rules_without_effect_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(enforcer: PolicyEnforcer, reader: FakeReader, told: Told, log: list[str]) -> None:
        await enforcer.begin()
        assert enforcer.condition() == Condition(0.6)
        assert log == [
            "shoal: the policy of this device is charging,battery>=30%,clock>=40%,time<=60%",
            "shoal: without effect, since this device hides the readings: charging and battery and clock",
            "shoal: this device computes for at most 60% of the time",
        ]

    monkeypatch.delenv("ANDROID_ROOT", raising=False)
    enforced(test, "charging,battery=30,clock=40,time=60", Readings(ram=10**9))


def test_a_phone_has_a_policy_of_its_own_and_is_told_of_termux(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(enforcer: PolicyEnforcer, reader: FakeReader, told: Told, log: list[str]) -> None:
        await enforcer.begin()
        assert enforcer.condition() == Condition()
        policy, hidden = log
        assert policy == f"shoal: the policy of this device is {PHONE}"
        assert hidden.startswith(
            "shoal: without effect, since this device hides the readings: battery and temper"
        )
        assert "pkg install termux-api" in hidden

    monkeypatch.setenv("ANDROID_ROOT", "/system")
    enforced(test, None, Readings(ram=10**9))
    monkeypatch.delenv("ANDROID_ROOT")

    async def elsewhere(enforcer: PolicyEnforcer, reader: FakeReader, told: Told, log: list[str]) -> None:
        await enforcer.begin()
        assert (enforcer.condition(), log, reader.reads) == (None, [], 0)

    enforced(elsewhere, None, Readings(False, 1, 90, 120, 1, 100, 100, 1))


BATTERY, SOME = "sys/class/power_supply/battery", "some avg10=77.00 avg60=0.00 avg300=0.00 total=1"
CHANGES: dict[str, tuple[dict[str, object], bool, float]] = {
    "unplugged": ({"sys/class/power_supply/usb/online": 0, f"{BATTERY}/status": "Discharging"}, True, 1.0),
    "battery": ({f"{BATTERY}/capacity": 29}, True, 1.0),
    "hot": ({f"{BATTERY}/temp": 431}, False, SHARES[1]),
    "too hot": ({f"{BATTERY}/temp": 481}, True, SHARES[1]),
    "chip": ({"sys/class/thermal/thermal_zone0/temp": 86000}, False, SHARES[1]),
    "clock": ({"sys/devices/system/cpu/cpu0/cpufreq/scaling_max_freq": 900000}, False, SHARES[1]),
    "cpu": ({"proc/pressure/cpu": SOME}, False, SHARES[1]),
    "memory": ({"proc/pressure/memory": SOME}, True, 1.0),
    "ram": ({"proc/meminfo": "MemTotal: 8000000 kB\nMemAvailable: 50000 kB"}, True, 1.0),
    "nothing": ({f"{BATTERY}/capacity": 79}, False, 1.0),
}


@pytest.mark.parametrize(("files", "leaves", "share"), CHANGES.values(), ids=CHANGES)
def test_files_that_change_lead_to_a_drain_or_a_smaller_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, object], leaves: bool, share: float
) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.delenv("ANDROID_ROOT", raising=False)
    root = write(tmp_path, PHONE_FILES)

    async def main() -> None:
        policy = Policy(True, 30, 42, 85, 40, 50, 20, 100e6)
        reader = PowerReader(root, usable=(0,))
        enforcer = PolicyEnforcer(policy, reader, lambda line: None, trio.current_time, inline)
        await enforcer.begin()
        assert enforcer.condition() == GOOD_CONDITION
        write(root, files)
        node, told = FakeNode(), Told()

        async def check() -> None:
            await trio.sleep(15)
            found = enforcer.condition()
            assert found is not None
            assert (found.leaving, found.share) == (leaves, share)
            assert bool(found.reason) == (leaves or share < 1)
            node.holds_layers = False
            told.send.send_nowait(signal.SIGINT)

        async with trio.open_nursery() as tasks:
            tasks.start_soon(check)
            await enforcer.until_left(node, told)  # type: ignore[arg-type]

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


# As a process.


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    path = tmp_path_factory.mktemp("policy") / "tiny"
    assert shoal(["convert", str(TINY), str(path), "--dtype", "f32"]) == 0
    return Model.open(path)


@asynccontextmanager
async def coordinated(model: Model, node: RunningNode) -> AsyncIterator[Connection]:
    """A coordinator's connection to a node that has the whole model from it."""
    me = coordinator_identity(model)
    async with dial(open_tcp, *node.address, me, "control", seconds=20) as (control, _):
        await control.send(Assign(EPOCH, 0, model.n_units, None, 4, me.incarnation))
        assert (await control.expect(Loaded)).epoch == EPOCH
        yield control


async def condition(control: Connection) -> Condition | None:
    await control.send(Ping(1))
    return (await control.expect(Pong)).condition


async def until_leaving(control: Connection) -> Condition:
    while True:
        told = await condition(control)
        if told is not None and told.leaving:
            return told
        await trio.sleep(0.05)


async def ends(process: subprocess.Popen[bytes]) -> int:
    with trio.fail_after(LIMIT):
        while process.poll() is None:  # noqa: ASYNC110 (it is another process)
            await trio.sleep(0.02)
    return process.wait()


def running(
    model: Model,
    tmp_path: Path,
    test: Callable[[RunningNode], Awaitable[None]],
    *options: str,
) -> str:
    """Starts a node, runs the test beside it, and returns what the node has printed."""
    spec = NodeSpec("phone", ram_mb=300, options=("--measure-seconds", "0.05", *options))
    with nodes(model.path, [spec], tmp_path) as (node,):

        async def main() -> None:
            with trio.fail_after(LIMIT):
                await test(node)

        trio.run(main)
    return (tmp_path / "phone.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_node_process_ends_when_its_layers_have_moved(
    model: Model, tmp_path: Path, number: signal.Signals
) -> None:
    async def test(node: RunningNode) -> None:
        async with coordinated(model, node) as control:
            assert await condition(control) is None
            node.process.send_signal(number)
            assert await until_leaving(control) == Condition(1.0, True, "it was told to end")
            await trio.sleep(1)
            assert node.process.poll() is None
            await control.send(Release(Epoch(9, 2)))
            assert await ends(node.process) == 0

    log = running(model, tmp_path, test)
    assert "leaving, since it was told to end" in log and "have not moved" not in log


def _ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_node_in_the_background_of_a_script_ends_at_either_signal(
    model: Model, tmp_path: Path, number: signal.Signals
) -> None:
    """A shell lets it ignore SIGINT."""
    options = ("--measure-seconds", "0.05")
    spec = NodeSpec("phone", ram_mb=300, options=options, enter=_ignore_interrupts)
    with nodes(model.path, [spec], tmp_path) as (node,):
        node.process.send_signal(number)
        assert node.process.wait(LIMIT) == 0
    assert "Warning" not in (tmp_path / "phone.log").read_text()


@pytest.mark.slow
def test_a_node_process_ends_when_its_coordinator_has_gone(model: Model, tmp_path: Path) -> None:
    async def test(node: RunningNode) -> None:
        async with coordinated(model, node) as control:
            node.process.send_signal(signal.SIGTERM)
            await until_leaving(control)
        assert await ends(node.process) == 0

    running(model, tmp_path, test)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_signal_ends_a_node_process_at_once(
    model: Model, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    async def test(node: RunningNode) -> None:
        async with coordinated(model, node) as control:
            node.process.send_signal(signal.SIGINT)
            await until_leaving(control)
            node.process.send_signal(number)
            assert await ends(node.process) == code

    assert "Traceback" not in running(model, tmp_path, test)


@pytest.mark.slow
def test_a_node_process_leaves_before_the_system_has_no_ram(model: Model, tmp_path: Path) -> None:
    root = write(tmp_path / "root", PHONE_FILES)

    async def test(node: RunningNode) -> None:
        async with coordinated(model, node) as control:
            assert await condition(control) == GOOD_CONDITION
            write(root, {"proc/meminfo": "MemTotal: 8000000 kB\nMemAvailable: 50000 kB"})
            assert await until_leaving(control) == Condition(
                1.0, True, "programs can get 51.2 MB of RAM, less than 100 MB", 80.0, 31.0
            )
            await control.send(Release(Epoch(9, 2)))
            assert await ends(node.process) == 0

    log = running(model, tmp_path, test, "--policy", "phone", "--power-files", str(root))
    assert "shoal: the policy of this device is battery>=30%,temperature<=42," in log
    assert "leaving, since programs can get 51.2 MB" in log


@pytest.mark.slow
def test_a_node_process_refuses_to_start_without_battery(model: Model, tmp_path: Path) -> None:
    root = write(tmp_path / "root", {**PHONE_FILES, "sys/class/power_supply/battery/capacity": 7})
    options = ("--policy", "battery=30", "--power-files", str(root))
    command = [sys.executable, "-m", "shoal", "node", str(model.path), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, env=dict(os.environ))
    assert (done.returncode, done.stdout) == (1, "")
    assert "its battery has 7 %, less than 30 %; charge it, or set another --policy" in done.stderr


def test_help_and_mistakes_of_the_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        shoal(["node", "--help"])
    assert "--policy RULE,..." in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        shoal(["node", "nowhere", "--policy", "battery>=130"])
    assert caught.value.code == 2
    assert (
        "argument --policy: 'battery>=130' is out of range: give a limit from 1 to 99 %"
        in capsys.readouterr().err
    )
