"""The status of a head: what it is made from, and how it reads."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.net.clusters import GONE, TO_SERVE, after, fresh

from shoal.engine import strict
from shoal.net.errors import MismatchError
from shoal.net.events import Heard, Left, Moved, Shift
from shoal.net.holding import FetchReport
from shoal.net.messages import Condition, Epoch, Stats, Work
from shoal.net.moves import Move
from shoal.net.overview import NodeOverview, Overview
from shoal.net.placement import StageReport
from shoal.planner import LinkSpeed
from shoal.reporting import StepTimes, status_of
from shoal.status import (
    DeviceStatus,
    LinkStatus,
    MoveStatus,
    PlanStatus,
    Status,
    TransferStatus,
)
from shoal.status_text import render

MODEL: Any = SimpleNamespace(path=SimpleNamespace(name="tiny"), hash="aa")


def test_a_status_tells_what_the_coordinator_knows() -> None:
    state, _ = after(fresh(), *TO_SERVE)
    state, _ = after(
        state, Heard(1, condition=Condition(0.5, False, "its battery is at 44 °C", 81.0, 44.0)), Left(2, GONE)
    )
    state = state.changed(1, held=frozenset({2, 3}))
    nodes = (
        NodeOverview(0.25, 300_000_000, frozenset()),
        NodeOverview(None, 200_000_000, frozenset({4})),
        NodeOverview(None, None, frozenset()),
    )
    moved = Moved(None, "phone is slow", (Shift(2, 3, "a", "b"),), seconds=1.5, sent=4096)
    overview = Overview(
        state,
        nodes,
        {
            ("coordinator", "a"): LinkSpeed(0.001, float("inf"), 0.002),
            ("a", "b"): LinkSpeed(0.002, 1e7, 0.004),
        },
        77,
        12.5,
        2,
        1,
        3,
        (Move(moved, 6, standstill=0.02, before=10.0),),
        (FetchReport("b", 100, 40, 5.0, ""), FetchReport("a", 100, 100, 0.0, "")),
    )
    status = status_of(MODEL, overview, None, {"a": 0.02})
    assert strict.decode(Status, strict.encode(status)) == status
    a, b, c = status.devices
    assert (a.name, a.state, a.units, a.layers) == ("a", "working", (0, 2), "embedding + layer 1")
    assert (a.waiting, a.ram, a.ram_promise, a.measured_s) == (0.25, 300_000_000, 10**9, 0.02)
    assert (b.state, b.share, b.reason, b.copies) == ("working", 0.5, "its battery is at 44 °C", 1)
    assert (b.battery, b.temperature, b.held) == (81.0, 44.0, 2)
    assert status.transfers == (TransferStatus("b", 40, 100, 5.0),)
    assert (c.state, c.reason) == ("lost", "gone")
    assert status.links == (
        LinkStatus("a", "b", 0.002, 0.004, 1e7),
        LinkStatus("coordinator", "a", 0.001, 0.002, None),
    )
    assert (status.tokens, status.tokens_per_s, status.running, status.queued) == (77, 12.5, 2, 1)
    assert status.moves[0].text.startswith("moved layer 2 from a to b (phone is slow): 4.1 kB sent in 1.5 s")
    refused, _ = after(fresh(), Left(1, MismatchError("other model")))
    told = status_of(MODEL, replace(overview, state=refused, running=0), None, {})
    assert [device.state for device in told.devices] == ["joining", "refused", "joining"]
    assert (told.tokens_per_s, told.context) == (0.0, 0)


def test_step_times_are_those_since_the_last_look() -> None:
    def report(epoch: int, steps: int, seconds: float) -> StageReport:
        stats = Stats(Epoch(1, epoch), Work(steps, steps, seconds), Work(0, 0, 0.0))
        return StageReport("a", 0, 6, 0.0, 0, stats)

    times = StepTimes()
    assert times.look([report(1, 0, 0.0)]) == {}
    assert times.look([report(1, 10, 1.0)]) == {"a": 0.1}
    assert times.look([report(1, 12, 1.5)]) == {"a": 0.25}
    assert times.look([report(1, 12, 1.5)]) == {"a": 0.25}
    assert times.look([report(2, 0, 0.0)]) == {}
    assert times.look([report(2, 5, 1.0)]) == {"a": 0.2}
    assert times.look([]) == {}


DEVICES = (
    DeviceStatus(
        "laptop", "192.168.1.2:7001", "working", "", (0, 16), "embedding + layers 0-14", 2, 2_048_000_000,
        412_300_000, 1.0, 0.0201, 0.0214, 0.123,
    ),
    DeviceStatus(
        "phone", "192.168.1.7:7000", "working", "its battery is at 44 °C", (16, 32), "layers 15-29 + LM head",
        0, 800_000_000, 210_000_000, 0.5, 0.031, None, None, 20, 81.0, 44.0,
    ),
    DeviceStatus("tablet", "192.168.1.9:7000", "lost", "tablet closed the connection"),
)  # fmt: skip
STATUS = Status(
    1, "0.1.0", "smollm2-135m", "aa", 32, 2048, "serving", "", 4, DEVICES,
    (
        LinkStatus("coordinator", "laptop", 0.0001, 0.0002, None),
        LinkStatus("laptop", "phone", 0.0021, 0.004, 11.2e6),
        LinkStatus("phone", "coordinator", 0.0022, 0.005, 10e6),
        LinkStatus("phone", "laptop", 0.0022, 0.005, 10e6),
    ),
    PlanStatus(23.5, "laptop", 19.2), 12345, 22.04, 2, 1, 1,
    (MoveStatus("gave up a change of the plan (x): y", True, 1.0, 0.0, 0, None, None),
     MoveStatus("moved layers 3-5 from phone to laptop", False, 1.0, 0.02, 10, 20.0, 22.0)),
    (TransferStatus("tablet", 312_000_000, 1_090_000_000, 8.2e6),),
)  # fmt: skip
GOLDEN = """\
smollm2-135m: serving
2 answers and 1 waiting, 22.0 tokens/s, 12,345 tokens so far, went on once after a loss
planned 23.5 tokens/s for one answer, laptop alone 19.2; context 2,048 tokens; epoch 4

device  state    layers                         RAM MB  step ms  planned  waits  link ms  MB/s
laptop  working  embedding + layers 0-14  412 of 2,048     21.4     20.1    12%      0.1     -
phone   working  layers 15-29 + LM head     210 of 800        -     31.0      -      2.1  11.2
tablet  lost     -                                   -        -        -      -        -     -
  back                                                                               2.2  10.0

laptop: copies of 2 more units in RAM
phone: computes 50% of the time, battery 81%, 44 °C, files of 20 of 32 units on disk, its battery is at 44 °C
tablet: tablet closed the connection

weights on their way
tablet  [#####...............]  312.0 of 1,090.0 MB  8.2 MB/s  95 s left

latest changes of the plan
moved layers 3-5 from phone to laptop
gave up a change of the plan (x): y
"""


def test_a_status_reads_well() -> None:
    assert "\n".join(render(STATUS)) + "\n" == GOLDEN


def test_a_small_terminal_shows_the_beginning() -> None:
    lines = render(STATUS, width=40, height=7)
    assert lines == [
        "smollm2-135m: serving",
        "2 answers and 1 waiting, 22.0 tokens/s,…",
        "planned 23.5 tokens/s for one answer, l…",
        "",
        "device  state    layers                …",
        "laptop  working  embedding + layers 0-1…",
        "phone   working  layers 15-29 + LM head…",
    ]


def test_a_head_without_devices_says_what_to_do() -> None:
    told = replace(
        STATUS, phase="waiting", reason="12 MB are missing", devices=(), links=(), plan=None, moves=(),
        transfers=(), running=1, queued=0, recoveries=0, tokens_per_s=0.0, tokens=0, context=0,
    )  # fmt: skip
    assert render(told) == [
        "smollm2-135m: waiting (12 MB are missing)",
        "1 answer, 0.0 tokens/s, 0 tokens so far",
        "",
        "no device yet: `shoal invite` prints what to type on one",
    ]


@pytest.mark.parametrize(
    "kind",
    [Status, DeviceStatus, LinkStatus, PlanStatus, MoveStatus, TransferStatus],
    ids=lambda k: k.__name__,
)
def test_the_page_names_the_fields(kind: type) -> None:
    page = (Path(__file__).parents[2] / "docs" / "status.md").read_text(encoding="utf-8")
    section = page.split(f"### {kind.__name__}\n")[1].split("###")[0]
    assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == [field.name for field in fields(kind)]
