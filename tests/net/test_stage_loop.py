"""The thread of a stage, and the task that reads for it while a call takes long."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from tests.net.test_rest import EPOCH, in_time, node, sleepy
from tests.patience import LIMIT

from shoal.engine.batch import Want
from shoal.engine.wait import Wait, waiter
from shoal.net import stage_loop
from shoal.net.connection import Connection
from shoal.net.dial import dial, open_tcp
from shoal.net.messages import Assign, Loaded, Message, Open, Result, Step
from shoal.planner.groups import Grouping


def test_rows_that_a_task_has_read_wake_the_thread_that_looked_for_them_before(
    lab: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task sees that the thread computes, and reads its socket. But the thread has come back, has found
    nothing in the inbox, and is about to wait for that socket."""
    task_reads, thread_waits, task_has_read = threading.Event(), threading.Event(), threading.Event()
    sender = list[Connection]()

    def late() -> Wait:
        wait = waiter()

        def waits(handles: Sequence[int], spin_s: float, wait_s: float | None) -> int:
            if wait_s is None and task_reads.is_set() and not task_has_read.is_set():
                thread_waits.set()
                assert task_has_read.wait(LIMIT)
            return wait(handles, spin_s, wait_s)

        return waits

    read = stage_loop.ThreadLoop._read

    def reads(self: Any, source: Any, *, at_once: bool) -> None:
        if threading.current_thread() is not threading.main_thread() or task_has_read.is_set():
            read(self, source, at_once=at_once)
            return
        task_reads.set()
        assert thread_waits.wait(LIMIT)
        sender[0].post(Open(2, EPOCH, 30), Step(2, EPOCH, 0, (5,), Want.TOKEN))
        read(self, source, at_once=at_once)
        task_has_read.set()

    monkeypatch.setattr(stage_loop, "waiter", late)
    monkeypatch.setattr(stage_loop.ThreadLoop, "_read", reads)

    async def main() -> None:
        async with node(lab, open_stage=sleepy(lab, 0.5, [])) as (address, net):
            me = lab.identity("laptop", 99)
            async with dial(open_tcp, *address, me, "control", seconds=LIMIT) as (control, _):
                await control.send(Assign(EPOCH, 0, 6, None, 4, 99))
                await control.expect(Loaded)
                peer = net.peer(7001)
                async with dial(open_tcp, *address, me, "step", seconds=LIMIT, peer=peer) as (steps, _):
                    sender.append(steps)
                    await steps.send(Open(1, EPOCH, 30))
                    await steps.send(Step(1, EPOCH, 0, (5, 6), Want.TOKEN))
                    results = [await control.expect(Result), await control.expect(Result)]
        assert [result.session for result in results] == [1, 2]

    in_time(main)
    assert task_has_read.is_set()


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("columns", [0, 5])
def test_a_rehearsal_goes_from_the_bytes_of_rows_to_those_of_their_answer(columns: int, last: bool) -> None:
    hidden = np.ones((1, columns), np.float32) if columns else None
    step = Step(7, EPOCH, 63, () if columns else (3,), Want.TOKEN, hidden, tags=(1,))
    rehearsal, sent = stage_loop.Rehearsal(step, (Grouping(1, 0.001),), last=last), list[Message]()
    send = rehearsal._answers.send

    def sends(message: Message) -> list[bytes]:
        sent.append(message)
        return send(message)

    rehearsal._answers.send = sends  # type: ignore[method-assign]
    for _ in range(3):
        rehearsal.play()
    assert [type(message) for message in sent] == [Result if last else Step] * 3
