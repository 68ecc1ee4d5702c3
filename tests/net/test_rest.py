"""A node that may compute for a share of the time only: its stage rests after each call, and is not taken for
one that hangs."""

from __future__ import annotations

import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import trio
from tests.patience import LIMIT

from shoal.engine.batch import Result as StageResult
from shoal.engine.batch import Run, Want
from shoal.engine.wait import Spin, Wait, waiter
from shoal.net import stage_loop
from shoal.net.connection import in_thread
from shoal.net.coordinator import Coordinator
from shoal.net.dial import dial, open_tcp
from shoal.net.inbox import STRETCH, Batch, Inbox
from shoal.net.messages import Assign, Condition, Epoch, Loaded, Open, Ping, Pong, Progress, Result, Step
from shoal.net.pace import NodePace
from shoal.net.placement import Links, NodeInfo, Placement, plan_at

EPOCH = Epoch(1, 1)
Spans = list[tuple[float, float]]


def share(of: float) -> Callable[[], Condition]:
    return lambda: Condition(of)


def timed_hop(seconds: float, spans: Spans) -> Callable[[Callable[[], Any]], Awaitable[Any]]:
    """A hop that takes that long; when it began and ended."""

    async def hop(call: Callable[[], Any], /) -> Any:
        start = trio.current_time()
        with trio.CancelScope(shield=True):
            await trio.sleep(seconds)
        spans.append((start, trio.current_time()))
        return call()

    return hop


def rests(spans: Spans) -> list[float]:
    """The time between the end of each call and the start of the next."""
    return [after[0] - before[1] for before, after in pairwise(spans)]


@pytest.mark.parametrize("of", [1.0, 0.6, 0.25])
def test_a_stage_rests_after_each_call(lab: ModuleType, of: float) -> None:
    async def main() -> None:
        async with lab.network() as net:
            spans: Spans = []
            net.add("a", hop=timed_hop(0.1, spans), condition=share(of))
            async with net.coordinator(plan=plan_at((0, 6))) as coordinator:
                spans.clear()  # of loading
                assert await lab.collect(coordinator, [3, 4], 12) == lab.oracle([3, 4], 12)
            calls = spans[1:13]  # the first one opens the session
            assert rests(calls) == pytest.approx([0.1 * (1 / of - 1)] * len(rests(calls)), abs=1e-6)
            busy = sum(end - start for start, end in calls)
            assert busy / (calls[-1][1] - calls[0][0] + 0.1 * (1 / of - 1)) == pytest.approx(of)

    lab.run(main)


def test_the_share_may_change_while_a_stage_works(lab: ModuleType) -> None:
    async def main() -> None:
        async with lab.network() as net:
            spans, now = Spans(), [1.0]
            net.add("a", hop=timed_hop(0.1, spans), condition=lambda: Condition(now[0]))
            async with (
                net.coordinator(plan=plan_at((0, 6))) as coordinator,
                coordinator.generate([3], max_tokens=12) as tokens,
            ):
                found = []
                async for token in tokens:
                    found.append(token)
                    now[0] = 0.5 if len(found) > 6 else 1.0
                assert found == lab.oracle([3], 12)
            assert {round(rest, 3) for rest in rests(spans[2:13])} == {0.0, 0.1}

    lab.run(main)


@pytest.mark.slow
def test_long_rests_are_waited_for(lab: ModuleType) -> None:
    """Of ten seconds and more, in which no stage finishes a call."""

    async def main() -> None:
        async with lab.network() as net:
            for name in "ab":
                net.add(name, hop=lab.slow_hop(0.5), condition=share(0.04), expect=lambda *_: lambda *_: 0.5)
            said: list[str] = []
            async with net.coordinator(plan=plan_at((0, 3, 6)), log=said.append) as coordinator:
                start = trio.current_time()
                assert await lab.collect(coordinator, [3, 4], 12) == lab.oracle([3, 4], 12)
                assert trio.current_time() - start > 100
                assert coordinator.recoveries == 0
                assert [
                    line for line in said if not line.endswith("computes for at most 4% of the time")
                ] == []

    lab.run(main)


def test_a_node_tells_its_condition(lab: ModuleType) -> None:
    async def main() -> None:
        async with lab.network() as net:
            told: list[Condition | None] = [None]
            net.add("a", condition=lambda: told[0])
            me = lab.identity("laptop", 99)
            async with dial(net.open_stream, "host", 7001, me, "control", seconds=5) as (control, _):
                for i, one in enumerate((None, Condition(0.35), Condition(1.0, True, "its battery has 3 %"))):
                    told[0] = one
                    await control.send(Ping(i))
                    assert await control.expect(Pong) == Pong(i, condition=one)

    lab.run(main)


def test_a_coordinator_counts_the_share_as_a_slower_pace(lab: ModuleType) -> None:
    """From the first plan on, and after each change."""
    asked: list[dict[str, float]] = []

    def plan(nodes: Sequence[NodeInfo], links: Links) -> Placement:
        asked.append({node.label: node.slower for node in nodes})
        return plan_at((0, 3, 6))(nodes, links)

    async def main() -> None:
        async with lab.network() as net:
            now = [0.5]
            net.add("a", condition=lambda: Condition(now[0]))
            net.add("b")
            async with net.coordinator(plan=plan, measure_links=True) as coordinator:
                assert asked == [{"a": 2.0, "b": 1.0}]
                for of in (0.25, 1.0):
                    now[0] = of
                    await trio.sleep(3)  # longer than a heartbeat
                    assert [node.slower for node in coordinator.nodes] == [1 / of, 1.0]

    lab.run(main)


# Threads and sockets.


def sleepy(lab: ModuleType, seconds: float, spans: Spans) -> Callable[[int, int], Any]:
    """Opens stages whose calls take that long, in a thread."""

    class Sleepy(lab.FakeStage):  # type: ignore[name-defined,misc]
        def run(self, batch: Sequence[Run]) -> list[StageResult]:
            start = time.perf_counter()
            time.sleep(seconds)
            found: list[StageResult] = super().run(batch)
            spans.append((start, time.perf_counter()))
            return found

    return Sleepy


@asynccontextmanager
async def node(lab: ModuleType, **changes: Any) -> AsyncIterator[tuple[tuple[str, int], Any]]:
    """A node with threads that listens on a port of its own: its address, and the network of its peers."""
    async with lab.network() as net:
        net.add("a", hop=in_thread, open_stream=open_tcp, own_thread=True, spin=True, **changes)
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        await net.nursery.start(net.nodes[7001].node.serve, listeners)
        yield listeners[0].socket.getsockname()[:2], net


def in_time(main: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        with trio.fail_after(LIMIT):
            await main()

    trio.run(limited)


@pytest.mark.slow
@pytest.mark.alone
def test_a_thread_rests_after_each_call(lab: ModuleType) -> None:
    async def main() -> None:
        spans = Spans()
        async with node(lab, open_stage=sleepy(lab, 0.02, spans), condition=share(0.2)) as (address, _):
            me, plan = lab.identity("laptop", 9), plan_at((0, 6))
            async with Coordinator.open([address], me, lab.SHAPE, plan) as coordinator:

                async def one(seed: int) -> None:
                    assert await lab.collect(coordinator, [seed], 4) == lab.oracle([seed], 4)

                async with trio.open_nursery() as answers:
                    for seed in range(6):
                        answers.start_soon(one, seed)
                for rest, (begin, end) in zip(rests(spans), spans, strict=False):
                    assert rest >= 4 * (end - begin)
                assert sum(rests(spans)) < 2 * 4 * sum(end - begin for begin, end in spans)
                assert coordinator.recoveries == 0

    in_time(main)


@pytest.mark.slow
@pytest.mark.alone
def test_a_thread_that_rests_does_not_look_for_rows(lab: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither again and again, nor at rows for which its inbox has no room."""
    looks: list[float] = []
    waits: list[float] = []

    def counted() -> Wait:
        wait = waiter()

        def counting(handles: Sequence[int], spin_s: float, wait_s: float | None) -> int:
            waits.append(time.perf_counter())
            return wait(handles, spin_s, wait_s)

        return counting

    class Looks(Spin):
        def looks(self, *how: Any) -> Iterator[None]:
            looks.append(time.perf_counter())
            return super().looks(*how)

    monkeypatch.setattr(stage_loop, "Spin", Looks)
    monkeypatch.setattr(stage_loop, "waiter", counted)

    async def main() -> None:
        spans = Spans()
        stage = sleepy(lab, 0.1, spans)
        async with node(lab, open_stage=stage, condition=share(0.2), enough=0) as (address, net):
            me = lab.identity("laptop", 99)
            async with dial(open_tcp, *address, me, "control", seconds=5) as (control, _):
                await control.send(Assign(EPOCH, 0, 6, None, 4, 99))
                await control.expect(Loaded)
                peer = net.peer(7001)
                async with dial(open_tcp, *address, me, "step", seconds=5, peer=peer) as (steps, _):
                    for session in (1, 2, 3):
                        await steps.send(Open(session, EPOCH, 30))
                        await steps.send(Step(session, EPOCH, 0, (5,), Want.TOKEN))
                        if session == 1:
                            await control.expect(Result)
                        await trio.sleep(0.05)
                    await control.expect(Result)
                    await control.expect(Result)
        (_, first), (second, _), *_ = spans
        assert second - first >= 0.4
        assert looks and not [at for at in looks if first + 0.01 < at < first + 0.39]
        assert len([at for at in waits if first < at < second]) < 20

    in_time(main)


# What measures a stage's calls.


def batch(rows: int = 1) -> Batch:
    return Batch((), (Step(1, EPOCH, 0, (5,) * rows, Want.TOKEN),))


def test_a_rest_is_told_as_a_call_that_may_take_as_long() -> None:
    pace = NodePace()
    pace.assigned(lambda steps, idle: 0.01)
    pace.began(batch())
    pace.returned()
    pace.rests(7.5)
    assert pace.progress(EPOCH, 9) == Progress(EPOCH, 1, 0.0, 7.5, 9)
    assert pace.stuck(100) is None
    pace.tick(0.0)
    pace.tick(100.0)
    assert pace.stuck() is None
    pace.rests(0.0)
    assert pace.progress(EPOCH, 9) == Progress(EPOCH, 1, None, None, 9)
    pace.rests(7.5)
    pace.assigned(None)
    assert pace.progress(EPOCH, 9) == Progress(EPOCH, 0, None, None, 9)


def test_a_rest_does_not_make_a_node_slower() -> None:
    """A coordinator divides by the share, which it knows at once."""
    pace = NodePace()
    pace.assigned(lambda steps, idle: 0.01)
    for i in range(50):
        pace.count(batch(), i, i + 0.01)
        pace.rests(0.99)
    assert pace.slower == pytest.approx(1.0)


@pytest.mark.parametrize("of", [1.0, 0.5, 0.25])
def test_a_prompt_leaves_room_for_the_rests_between_tokens(of: float) -> None:
    """A sequence decodes beside a long prompt, with 20 ms on other stages; its tokens keep to the stretch."""
    inbox = Inbox(EPOCH, 64, 64, expect=lambda loads, idle: 0.001 * sum(rows for rows, _, _ in loads))
    now, position, back, ends = 0.0, 0, 0.0, list[float]()
    inbox.put(Open(1, EPOCH, 4000), now)
    while len(ends) < 120:
        if now >= back:
            inbox.put(Step(1, EPOCH, position, (5,), Want.TOKEN), now)
            position, back = position + 1, math.inf
        if len(ends) == 40:  # the prompt begins
            for i in range(100 if not inbox.bytes > 10_000 else 0):
                inbox.put(Step(2, EPOCH, 64 * i, (5,) * 64, Want.NOTHING), now)
        found = inbox.take(now)
        if not isinstance(found, Batch):
            now = min(back, math.inf if found is None else found)
            continue
        end = now + 0.001 * sum(step.rows for step in found.steps)
        rest = (end - now) * (1 / of - 1)
        inbox.ran(found, now, end, rest)
        if any(step.session == 1 for step in found.steps):
            ends.append(end)
            back = end + 0.020
        now = end + rest
    periods = [after - before for before, after in pairwise(ends)]
    assert max(periods[5:39]) == pytest.approx(0.021)
    assert max(periods[80:]) <= 1.2 * STRETCH * 0.021
    assert sum(periods[80:]) / len(periods[80:]) > 1.2 * 0.021
