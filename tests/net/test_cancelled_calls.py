"""A call of a stage ends early once all of its sessions have been closed, and only then."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import trio
from tests.net.fake_stage import FakeStage
from tests.net.test_sockets import limited, nodes

from shoal.engine.batch import Result as StageResult
from shoal.engine.batch import Run, Want
from shoal.engine.errors import CancelledRunError
from shoal.net.coordinator import Coordinator
from shoal.net.inbox import Batch
from shoal.net.messages import Close, Epoch, Failed, Open, Step, Work
from shoal.net.placement import plan_at
from shoal.net.work import StageWork

EPOCH = Epoch(1, 1)


def opened(session: int) -> Open:
    return Open(session, EPOCH, 20)


def rows(session: int, first: int, tokens: tuple[int, ...]) -> Step:
    return Step(session, EPOCH, first, tokens, Want.NOTHING)


class Cancellable(FakeStage):
    """A stage that calls `during` in the middle of a call, and then ends it if it has been cancelled."""

    during: Callable[[], None] = staticmethod(lambda: None)

    def run(self, batch: Sequence[Run]) -> list[StageResult]:
        self.cancels.clear()  # a cancel before the call does not concern it
        self.during()
        if any(run.sequence in self.cancels for run in batch):
            raise CancelledRunError("cancelled")
        return super().run(batch)


def begun(*sessions: int) -> tuple[Cancellable, StageWork]:
    """A stage with sessions of three positions each."""
    stage = Cancellable(0, 2)
    work = StageWork(stage, EPOCH, 2)
    work.do(Batch(tuple(map(opened, sessions)), tuple(rows(s, 0, (4, 5, 6)) for s in sessions)))
    stage.batches.clear()
    return stage, work


def test_rows_of_closed_sessions_are_dropped_and_the_closes_go_on() -> None:
    stage, work = begun(1, 2)
    stage.during = lambda: [work.closed(Close(s, EPOCH)) for s in (2, 1)] and None
    batch = Batch((), (rows(1, 3, (7, 8)), rows(2, 3, (9,))))
    with work.rewinds() as noted:
        assert work.do(batch) == []
    assert noted == {1: 3, 2: 3} and set(stage.cancels) == {1, 2}
    assert [work.sessions[s].positions for s in (1, 2)] == [3, 3]
    work.count(batch, 5.0)
    assert work.stats().prefill == Work(0, 0, 0.0)
    closes = Close(2, EPOCH), Close(1, EPOCH)
    assert work.do(Batch(closes, ())) == list(closes)
    assert not work.cancelled and not work.busy and not stage.sequences


OLD = Epoch(1, 0)


@pytest.mark.parametrize(
    "closes",
    [
        [Close(1, EPOCH)],
        [Close(1, EPOCH), Close(1, EPOCH), Close(3, EPOCH)],
        [Close(1, OLD), Close(2, OLD)],
    ],
    ids=["one", "not in the call", "another epoch"],
)
def test_a_call_with_rows_of_a_living_session_is_not_cancelled(closes: list[Close]) -> None:
    stage, work = begun(1, 2, 3)
    stage.during = lambda: [work.closed(close) for close in closes] and None
    assert len(work.do(Batch((), (rows(1, 3, (7, 8)), rows(2, 3, (9,)))))) == 2
    assert not stage.cancels and not work.cancelled


def test_a_close_before_or_after_the_call_cancels_no_later_one() -> None:
    """The session may be open again under its number by then."""
    stage, work = begun(1)
    work.closed(Close(1, EPOCH))
    again = Batch((Close(1, EPOCH), opened(1)), (rows(1, 0, (7, 8)),))
    assert len(work.do(again)) == 3 and not work.cancelled and not stage.cancels
    assert work.sessions[1].positions == 2


def test_a_close_while_sessions_are_opened_drops_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    stage, work = begun(1)
    begin = stage.open_sequence

    def meanwhile(*where: Any) -> None:
        begin(*where)
        work.closed(Close(1, EPOCH))

    monkeypatch.setattr(stage, "open_sequence", meanwhile)
    assert work.do(Batch((opened(2),), (rows(1, 3, (7,)),))) == [opened(2)]
    assert not stage.batches and work.cancelled


def test_another_session_begins_with_what_a_cancelled_one_held() -> None:
    stage, work = begun(1)
    stage.during = lambda: work.closed(Close(1, EPOCH))
    assert work.do(Batch((), (rows(1, 3, (7, 8)),))) == []
    fork = replace(opened(2), source=1, positions=3)
    stage.during = lambda: None
    answers = work.do(Batch((fork, Close(1, EPOCH)), (rows(2, 3, (9,)),)))
    assert len(answers) == 3 and not any(isinstance(answer, Failed) for answer in answers)
    assert work.sessions[2].positions == 4


def test_a_call_cannot_end_between_the_look_at_its_sessions_and_its_cancel() -> None:
    """Else the cancel would end the next call of the same session."""
    stage, work = begun(1)
    inside, go, done = threading.Event(), threading.Event(), threading.Event()
    ended: list[bool] = []

    def during() -> None:
        inside.set()
        assert go.wait(20)

    def cancel(sequence: int) -> None:
        go.set()  # the call returns now
        ended.append(done.wait(0.1))

    def call() -> None:
        work.do(Batch((), (rows(1, 3, (7,)),)))
        done.set()

    stage.during, stage.cancel = during, cancel  # type: ignore[method-assign]
    thread = threading.Thread(target=call)
    thread.start()
    assert inside.wait(20)
    work.closed(Close(1, EPOCH))
    thread.join(20)
    assert ended == [False] and done.is_set()


@pytest.mark.parametrize("own_thread", [True, False], ids=["thread", "task"])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_an_answer_that_is_left_ends_the_call_on_its_node_and_is_closed_on_all(
    lab: ModuleType, which: int, own_thread: bool
) -> None:
    async def main() -> None:
        async with nodes(lab, 3, own_thread=own_thread) as (addresses, net):
            plan = plan_at((0, 2, 4, 6), 4)
            async with Coordinator.open(addresses, lab.identity("laptop", 9), lab.SHAPE, plan) as coordinator:
                stages = [net.nodes[7001 + i].stages[-1] for i in range(3)]
                stage, inside, stopped = stages[which], trio.Event(), threading.Event()
                run, token = stage.run, trio.lowlevel.current_trio_token()

                def endless(batch: Sequence[Run]) -> list[StageResult]:
                    token.run_sync_soon(inside.set)
                    assert stopped.wait(20), "the call was not cancelled"
                    raise CancelledRunError("cancelled")

                stage.run, stage.cancel = endless, lambda sequence: stopped.set()
                async with trio.open_nursery() as tasks:
                    tasks.start_soon(lab.collect, coordinator, [1, 2, 3], 5)
                    await inside.wait()
                    assert all(stage.sequences for stage in stages[: which + 1])
                    tasks.cancel_scope.cancel()
                while any(stage.sequences for stage in stages):  # noqa: ASYNC110
                    await trio.sleep(0.001)
                assert stopped.is_set()
                stage.run = run
                assert await lab.collect(coordinator, [1, 2, 3], 5) == lab.oracle([1, 2, 3], 5)

    limited(main)
