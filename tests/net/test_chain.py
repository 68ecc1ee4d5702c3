"""Sessions between two chains: held, carried with what the stages hold, dropped, or filled again."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from itertools import count
from types import ModuleType
from typing import Any

import pytest
import trio
import trio.testing

from shoal.engine.batch import Sampling, Want
from shoal.engine.errors import ContextError, ShoalError
from shoal.net.admission import Admission, ChainRoom
from shoal.net.chain import Chain
from shoal.net.errors import NodeLostError, RemoteProtocolError
from shoal.net.generation import Fill, Flow, Generation, Loss, Part, loss_of
from shoal.net.messages import Close, Epoch, Failed, Kept, Message, Open, Refill, Result, Step
from shoal.net.session import Session

FIRST, SECOND = Epoch(9, 1), Epoch(9, 2)
STAGES = [Part(0, 0, 3), Part(1, 3, 6)]
LAST = 1


class Line:
    """A connection that accepts everything until it ends, and records it."""

    def __init__(self) -> None:
        self.sent: list[Message] = []
        self.ended = False

    def post(self, *messages: Message) -> bool:
        if self.ended:
            raise NodeLostError("the connection has ended")
        self.sent += messages
        return True

    def take(self) -> list[Message]:
        taken, self.sent = self.sent, []
        return taken


class Chains:
    """A source of chains, as a coordinator is one."""

    def __init__(self, pages: int | None = None) -> None:
        self.admission = Admission(8)
        self.numbers = count()
        self.current: Chain | None = None
        self.line = Line()
        self.changed = trio.Event()
        self.room = ChainRoom("b", pages, 4)
        self.quiet: list[tuple[Kept, ...]] = []

    async def chain(self) -> Chain:
        while self.current is None or not self.current.open:
            await self.changed.wait()
        return self.current

    def new(self, epoch: Epoch, stages: Sequence[Part] = STAGES) -> Chain:
        self.line = Line()
        return Chain(Flow(epoch, 4, 3), self.line, stages, trio.CancelScope())  # type: ignore[arg-type]

    def begin(self, chain: Chain) -> None:
        self.current = chain
        self.changed.set()
        self.changed = trio.Event()

    def session(self) -> Session:
        return Session(self, Generation(0, Sampling(), 50, 100), self.admission, self.numbers)

    def hold(self) -> None:
        assert self.current is not None
        self.current.hold(self.quiet.append)


def served(step: Message, token: int = 50) -> Result:
    assert isinstance(step, Step)
    wanted = token if step.want is Want.TOKEN else None
    return Result(step.session, step.epoch, step.first, step.rows, wanted)


async def settle() -> None:
    await trio.testing.wait_all_tasks_blocked()


async def reader(session: Session, prompt: Sequence[int], most: int, got: list[int], **how: Any) -> None:
    async with session.answer(prompt, max_tokens=most, **how) as tokens:
        async for token in tokens:
            got.append(token)  # noqa: PERF401, since tests look at it while it grows


async def leaver(session: Session, prompt: Sequence[int], leave: trio.CancelScope) -> None:
    with leave, suppress(ShoalError):
        await reader(session, prompt, 9, [], keep=False)


def scenario(lab: ModuleType, main: Any, pages: int | None = None) -> None:
    async def run() -> None:
        chains = Chains(pages)
        chains.admission.open(chains.room)
        chains.begin(chains.new(FIRST))
        async with trio.open_nursery() as tasks:
            await main(chains, tasks)
            tasks.cancel_scope.cancel()

    lab.run(run)


def test_a_held_chain_sends_no_steps_and_is_quiet_when_the_last_result_is_there(lab: ModuleType) -> None:
    async def main(chains: Chains, tasks: trio.Nursery) -> None:
        one, two, chain = list[int](), list[int](), chains.current
        assert chain is not None
        tasks.start_soon(reader, chains.session(), [1], 9, one)
        await settle()
        tasks.start_soon(reader, chains.session(), list(range(20)), 9, two)
        await settle()
        sent = [m for m in chains.line.take() if isinstance(m, Step)]
        assert [(m.session, m.first) for m in sent] == [(0, 0), (1, 0), (1, 4), (1, 8)]
        chain.deliver(LAST, [served(sent[1])])
        chains.hold()
        chain.deliver(LAST, [served(sent[2])])
        chain.deliver(LAST, [served(sent[3])])
        assert [m.first for m in chains.line.take() if isinstance(m, Step)] == [12]  # before the hold
        chain.deliver(LAST, [Result(1, FIRST, 12, 4, None)])
        assert chains.quiet == []
        chain.deliver(LAST, [served(sent[0], 60)])
        assert chains.quiet == [(Kept(0, 1), Kept(1, 16))]
        assert chains.line.take() == []
        await settle()
        assert one == [60]  # tokens are read meanwhile

    scenario(lab, main)


def test_sequences_that_decode_go_on_until_prompts_on_their_way_have_been_read(lab: ModuleType) -> None:
    async def main(chains: Chains, tasks: trio.Nursery) -> None:
        chain, line = chains.current, chains.line
        assert chain is not None
        tasks.start_soon(reader, chains.session(), [1], 30, [])
        await settle()
        tasks.start_soon(reader, chains.session(), list(range(20)), 9, [])
        await settle()
        decode, *chunks = [m for m in line.take() if isinstance(m, Step)]
        assert [m.first for m in chunks] == [0, 4, 8]
        chains.hold()
        tasks.start_soon(reader, chains.session(), [7], 9, [])  # waits for the next chain
        await settle()
        for i, chunk in enumerate(chunks):
            assert line.take() == [] and chains.quiet == [] and not chain.open
            chain.deliver(LAST, [served(decode, 50 + i)])
            (decode,) = line.take()
            assert decode == Step(0, FIRST, 1 + i, (50 + i,), Want.TOKEN)
            chain.deliver(LAST, [served(chunk)])
        assert line.take() == [] and chains.quiet == []
        chain.deliver(LAST, [served(decode, 60)])
        assert line.take() == [] and chains.quiet == [(Kept(0, 4), Kept(1, 12))]
        chain.resume()
        resumed = [(m.session, m.first) for m in line.take() if isinstance(m, Step)]
        assert resumed == [(0, 4), (1, 12), (1, 16)]

    scenario(lab, main)


@pytest.mark.parametrize("end", ["close", "fail"])
def test_a_prompt_that_ends_lets_the_others_stop(lab: ModuleType, end: str) -> None:
    async def main(chains: Chains, tasks: trio.Nursery) -> None:
        chain, leave = chains.current, trio.CancelScope()
        assert chain is not None
        tasks.start_soon(reader, chains.session(), [1], 30, [])
        await settle()
        tasks.start_soon(leaver, chains.session(), list(range(20)), leave)
        await settle()
        decode = chains.line.take()[1]
        chains.hold()
        if end == "close":
            leave.cancel()
            await settle()
        else:
            chain.deliver(LAST, [Failed(1, FIRST, 1, "its rows are invalid")])
        assert chains.quiet == []
        chain.deliver(LAST, [served(decode)])
        assert chains.quiet == [(Kept(0, 1),)]

    scenario(lab, main)


@pytest.mark.parametrize("code", [ContextError.exit_code, RemoteProtocolError.exit_code])
def test_only_a_lack_of_room_costs_idle_sessions_their_state(lab: ModuleType, code: int) -> None:
    """Else, a request that no stage can compute would never end while others leave their state."""

    async def main(chains: Chains, tasks: trio.Nursery) -> None:
        chain, line, idle = chains.current, chains.line, chains.session()
        assert chain is not None
        tasks.start_soon(reader, idle, [1, 2], 1, [])
        await settle()
        chain.deliver(LAST, [served(line.take()[-1], 60)])
        await settle()
        bad = chains.session().answer([9, 9], max_tokens=2)

        async def ask() -> None:
            with pytest.raises(ShoalError, match="not finite"):
                async with bad as tokens:
                    await anext(tokens)

        tasks.start_soon(ask)
        await settle()
        sent = line.take()
        chain.deliver(LAST, [Failed(1, FIRST, code, "its rows are not finite")])
        await settle()
        again = [(type(m), m.session) for m in line.take() if isinstance(m, Open | Close)]
        if code == ContextError.exit_code:
            assert again == [(Close, 1), (Close, 0), (Open, 2)] and idle.held == 0
            chain.deliver(LAST, [Failed(2, FIRST, code, "its rows are not finite")])
            await settle()
        else:
            assert again == [(Close, 1)] and idle.held == 2
        assert [m.session for m in sent if isinstance(m, Open)] == [1]

    scenario(lab, main)


class Hasty(Admission):
    """Sets a session aside when it comes to need three positions, and lets it go on at once."""

    set_aside = 0

    def grow(self, session: Any, positions: int) -> bool:
        if positions == 3 and not self.set_aside:
            self.set_aside += 1
            self._set_aside(session)
            self._settle()
        return super().grow(session, positions)


def test_a_session_that_is_set_aside_and_admitted_again_at_once_begins_anew(lab: ModuleType) -> None:
    async def main(chains: Chains, tasks: trio.Nursery) -> None:
        got, chain, line, admission = list[int](), chains.current, chains.line, Hasty(8)
        assert chain is not None
        chains.admission = admission
        admission.open(chains.room)
        tasks.start_soon(reader, chains.session(), [1, 2], 2, got)
        await settle()
        chain.deliver(LAST, [served(line.take()[-1], 60)])
        await settle()
        assert admission.set_aside == 1
        close, opening, step = line.take()
        assert isinstance(close, Close) and isinstance(opening, Open) and isinstance(step, Step)
        assert (close.session, opening.session, step.first, step.tokens) == (0, 1, 0, (1, 2, 60))
        chain.deliver(LAST, [served(step, 61)])
        await settle()
        assert got == [60, 61]

    scenario(lab, main)


def test_carried_sessions_go_on_at_their_position_and_nothing_is_sent_again(lab: ModuleType) -> None:
    async def main(chains: Chains, tasks: trio.Nursery) -> None:
        got, chain, line = list[int](), chains.current, chains.line
        assert chain is not None
        tasks.start_soon(reader, chains.session(), [1, 2], 3, got)
        await settle()
        chains.hold()
        chain.deliver(LAST, [served(line.take()[-1], 60)])
        new = chains.new(SECOND)
        assert chain.carry(new, lambda session: None) == []
        chains.begin(new)
        assert new.due_steps() == [Step(0, SECOND, 2, (60,), Want.TOKEN)]
        chain.end()
        new.deliver(LAST, [Result(0, SECOND, 2, 1, 61)])
        assert chains.line.take() == [Step(0, SECOND, 3, (61,), Want.TOKEN)]
        new.deliver(LAST, [Result(0, FIRST, 3, 1, 99)])  # of the old chain
        new.deliver(LAST, [Result(0, SECOND, 3, 1, 62)])
        await settle()
        assert got == [60, 61, 62]
        assert line.take() == []

    scenario(lab, main)


def test_an_aborted_transition_lets_all_sessions_go_on(lab: ModuleType) -> None:
    async def main(chains: Chains, tasks: trio.Nursery) -> None:
        got, chain = list[int](), chains.current
        assert chain is not None
        tasks.start_soon(reader, chains.session(), [1, 2], 9, got)
        await settle()
        step = chains.line.take()[-1]
        chains.hold()
        chain.resume()  # before it is quiet
        chain.deliver(LAST, [served(step, 60)])
        assert chains.quiet == []
        (step,) = chains.line.take()
        chains.hold()
        chain.deliver(LAST, [served(step, 61)])
        assert chains.quiet == [(Kept(0, 3),)] and chains.line.take() == []
        chain.resume()
        assert chains.line.take() == [Step(0, FIRST, 3, (61,), Want.TOKEN)]

    scenario(lab, main)


@pytest.mark.parametrize("aborted", [False, True])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_session_that_ends_during_a_hold_is_closed_in_the_epoch_that_knows_it(
    lab: ModuleType, when: str, aborted: bool
) -> None:
    async def main(chains: Chains, tasks: trio.Nursery) -> None:
        chain, line = chains.current, chains.line
        assert chain is not None
        leave = trio.CancelScope()
        tasks.start_soon(leaver, chains.session(), [1], leave)
        await settle()
        tasks.start_soon(reader, chains.session(), [3], 9, [])
        await settle()
        steps = [m for m in line.take() if isinstance(m, Step)]
        chains.hold()
        chain.deliver(LAST, [served(steps[0])])
        if when == "before":
            leave.cancel()
            await settle()
            assert line.take() == [Close(0, FIRST)]
            chain.deliver(LAST, [served(steps[1])])
            assert chains.quiet == [(Kept(1, 1),)]
        else:
            chain.deliver(LAST, [served(steps[1])])
            assert chains.quiet == [(Kept(0, 1), Kept(1, 1))]
            leave.cancel()
            await settle()
            assert line.take() == []
        due = [Step(1, SECOND, 1, (50,), Want.TOKEN)]
        if aborted:
            chain.resume()
            closed = [Close(0, FIRST)] if when == "after" else []
            assert line.take() == [*closed, Step(1, FIRST, 1, (50,), Want.TOKEN)]
        else:
            new = chains.new(SECOND)
            assert chain.carry(new, lambda session: None) == [Close(0, SECOND)] * (when == "after")
            assert new.due_steps() == due

    scenario(lab, main)


def test_the_last_session_that_ends_makes_the_chain_quiet(lab: ModuleType) -> None:
    async def main(chains: Chains, tasks: trio.Nursery) -> None:
        leave = trio.CancelScope()
        tasks.start_soon(leaver, chains.session(), [1, 2], leave)
        await settle()
        chains.hold()
        assert chains.quiet == []
        leave.cancel()
        await settle()
        assert chains.quiet == [()]

    scenario(lab, main)


def test_a_chain_without_answers_is_quiet_at_once_and_sessions_between_answers_are_carried(
    lab: ModuleType,
) -> None:
    async def main(chains: Chains, tasks: trio.Nursery) -> None:
        got, session, chain = list[int](), chains.session(), chains.current
        assert chain is not None
        tasks.start_soon(reader, session, [1, 2], 2, got)
        await settle()
        chain.deliver(LAST, [served(chains.line.take()[-1], 60)])
        chain.deliver(LAST, [Result(0, FIRST, 2, 1, 61)])
        await settle()
        assert got == [60, 61]
        chains.hold()
        assert chains.quiet == [(Kept(0, 3),)]
        new = chains.new(SECOND)
        chain.carry(new, lambda session: None)
        chains.begin(new)
        assert new.due_steps() == []
        tasks.start_soon(reader, session, [1, 2, 60, 61, 5], 2, got)
        await settle()
        assert chains.line.take() == [Step(0, SECOND, 3, (61, 5), Want.TOKEN)]

    scenario(lab, main)


def test_sessions_that_begin_during_a_hold_join_the_next_chain(lab: ModuleType) -> None:
    async def main(chains: Chains, tasks: trio.Nursery) -> None:
        chain, line = chains.current, chains.line
        assert chain is not None
        old = chains.session()
        tasks.start_soon(reader, old, [1, 2], 1, [])
        await settle()
        chain.deliver(LAST, [served(line.take()[-1])])
        await settle()
        chains.hold()
        tasks.start_soon(reader, chains.session(), [3, 4], 9, [])
        await settle()
        tasks.start_soon(reader, old, [1, 9], 9, [])  # a session of the chain, back at position 1
        await settle()
        assert line.take() == []
        new = chains.new(SECOND)
        chain.carry(new, lambda session: None)
        chains.begin(new)
        new.send(new.due_steps())
        await settle()
        assert chains.line.take() == [
            Step(0, SECOND, 1, (9,), Want.TOKEN),
            Open(1, SECOND, 50),
            Step(1, SECOND, 0, (3, 4), Want.TOKEN),
        ]

    scenario(lab, main)


def test_a_session_that_has_failed_is_not_carried_and_begins_anew(lab: ModuleType) -> None:
    async def main(chains: Chains, tasks: trio.Nursery) -> None:
        chain = chains.current
        assert chain is not None
        session = chains.session()
        tasks.start_soon(reader, session, [1, 2], 2, [])
        await settle()
        chain.deliver(LAST, [served(chains.line.take()[-1])])
        chain.deliver(LAST, [Result(0, FIRST, 2, 1, 61)])
        await settle()
        tasks.start_soon(reader, session, [1, 2, 3], 2, [])
        await settle()
        chains.hold()
        assert chains.quiet == []
        chain.deliver(LAST, [Failed(0, FIRST, 1, "its rows are invalid")])
        assert chains.quiet == [()]
        new = chains.new(SECOND)
        assert chain.carry(new, lambda session: None) == []
        chains.begin(new)
        await settle()
        opening, step = chains.line.take()
        assert isinstance(opening, Open) and isinstance(step, Step)
        assert (step.session, step.tokens, step.epoch) == (1, (1, 2, 3), SECOND)

    scenario(lab, main)


def test_of_a_chain_that_has_ended_the_confirmed_positions_are_carried(lab: ModuleType) -> None:
    async def main(chains: Chains, tasks: trio.Nursery) -> None:
        got, chain, line = list[int](), chains.current, chains.line
        assert chain is not None
        tasks.start_soon(reader, chains.session(), list(range(14)), 3, got)
        await settle()
        steps = [m for m in line.take() if isinstance(m, Step)]
        chain.deliver(LAST, [Result(0, FIRST, 0, 2, None)])
        chains.hold()  # for a transition that is given up, since a node is lost
        line.ended = True
        chain.end()
        assert chains.quiet == [] and not chain.due
        chain.deliver(LAST, [Result(0, FIRST, 2, 2, None)])  # all stages have run it
        chains.hold()
        assert chains.quiet == [(Kept(0, 4),)]
        chain.deliver(LAST, [served(steps[1])])  # too late
        new = chains.new(SECOND)
        assert chain.carry(new, lambda session: None) == []
        chains.begin(new)
        assert new.due_steps() == [
            Step(0, SECOND, 4, (4, 5, 6, 7), Want.NOTHING),
            Step(0, SECOND, 8, (8, 9, 10, 11), Want.NOTHING),
            Step(0, SECOND, 12, (12, 13), Want.TOKEN),
        ]
        new.deliver(LAST, [Result(0, SECOND, 4, 10, 70)])
        await settle()
        assert got == [70]

    scenario(lab, main)


def test_lost_units_are_filled_by_kept_rows_of_the_stage_that_has_them(lab: ModuleType) -> None:
    async def main(chains: Chains, tasks: trio.Nursery) -> None:
        got, chain = list[int](), chains.current
        assert chain is not None
        tasks.start_soon(reader, chains.session(), [1, 2, 3], 3, got)
        await settle()
        tasks.start_soon(reader, chains.session(), [4, 5], 3, got)
        await settle()
        for step in [m for m in chains.line.take() if isinstance(m, Step)]:
            chain.deliver(LAST, [served(step)])
        chain.end()
        chains.hold()
        new, orders = chains.new(SECOND, [Part(0, 0, 4), Part(2, 4, 6)]), list[Refill]()
        new.refill, new.filler = orders.append, 0
        opened = chain.carry(new, lambda session: Fill(4, 3, 3 if session == 0 else 1))
        assert opened == [Open(n, SECOND, 50) for n in (0, 1)]
        new.send([*opened, *new.due_steps()])
        assert chains.line.take() == opened
        assert orders == [Refill(0, SECOND, 0, 3, 3, 4), Refill(1, SECOND, 0, 1, 3, 4)]
        for result in (Result(0, SECOND, 0, 3, None), Result(1, SECOND, 0, 1, None)):
            assert new.expects(0, result) and not new.expects(1, result)
            new.deliver(0, [result])
        assert chains.line.take() == [
            Step(0, SECOND, 3, (50,), Want.TOKEN),
            Step(1, SECOND, 1, (5,), Want.NOTHING, part=(0, 4)),
            Step(1, SECOND, 2, (50,), Want.TOKEN),
        ]
        assert not new.expects(0, Result(0, SECOND, 3, 1, 51))
        new.deliver(2, [Result(1, SECOND, 2, 1, 60), Result(0, SECOND, 3, 1, 61)])
        new.deliver(0, [Result(1, SECOND, 1, 1, None)])
        assert chains.line.take() == [
            Step(1, SECOND, 3, (60,), Want.TOKEN),
            Step(0, SECOND, 4, (61,), Want.TOKEN),
        ]

    scenario(lab, main)


def test_a_session_without_state_begins_anew_in_the_next_chain(lab: ModuleType) -> None:
    """Its prompt was on the way when a node was lost."""

    async def main(chains: Chains, tasks: trio.Nursery) -> None:
        got, chain = list[int](), chains.current
        assert chain is not None
        tasks.start_soon(reader, chains.session(), [1, 2], 3, got)
        await settle()
        chain.end()
        chains.hold()
        assert chains.quiet == [()]
        new = chains.new(SECOND)
        assert chain.carry(new, lambda session: None) == []
        chains.begin(new)
        await settle()
        opening, step = chains.line.take()
        assert opening == Open(1, SECOND, 50)
        assert step == Step(1, SECOND, 0, (1, 2), Want.TOKEN)

    scenario(lab, main)


@pytest.mark.parametrize("ended", [False, True])
def test_a_chain_that_was_loaded_anew_is_sent_all_tokens(lab: ModuleType, ended: bool) -> None:
    async def main(chains: Chains, tasks: trio.Nursery) -> None:
        chain = chains.current
        assert chain is not None
        kept = chains.session()
        tasks.start_soon(reader, kept, [8], 1, [])
        await settle()
        chain.deliver(LAST, [served(chains.line.take()[-1])])
        await settle()
        tasks.start_soon(reader, chains.session(), [1, 2], 9, [])
        await settle()
        chain.deliver(LAST, [served(chains.line.take()[-1], 60)])
        if ended:
            chain.end()
            await settle()
        new = chains.new(SECOND)
        chain.drop()
        chains.admission.open(chains.room)
        chains.begin(new)
        await settle()
        assert [m.tokens for m in chains.line.take() if isinstance(m, Step)] == [(1, 2, 60)]
        tasks.start_soon(reader, kept, [8, 9], 1, [])
        await settle()
        assert [m.tokens for m in chains.line.take() if isinstance(m, Step)] == [(8, 9)]

    scenario(lab, main)


def test_a_chain_with_less_room_sets_the_youngest_aside_in_its_own_epoch(lab: ModuleType) -> None:
    async def main(chains: Chains, tasks: trio.Nursery) -> None:
        got, chain = list[int](), chains.current
        assert chain is not None
        for prompt in ([1] * 6, [2] * 6):
            tasks.start_soon(reader, chains.session(), prompt, 2, got)
            await settle()
        for step in [m for m in chains.line.take() if isinstance(m, Step)]:
            chain.deliver(LAST, [served(step)])
        for step in [m for m in chains.line.take() if isinstance(m, Step)]:
            if step.want is Want.NOTHING:
                chain.deliver(LAST, [served(step)])
        chains.hold()
        for number in (0, 1):
            chain.deliver(LAST, [Result(number, FIRST, 6, 1, 61)] if chain.due else [])
        new = chains.new(SECOND)
        chain.carry(new, lambda session: None)
        chains.admission.change(ChainRoom("b", 3, 4))
        chains.begin(new)
        new.send(new.due_steps())
        assert chains.line.take()[0] == Close(1, SECOND)

    scenario(lab, main, pages=8)


def test_idle_state_stays_when_the_room_changes_and_goes_when_it_does_not_fit(lab: ModuleType) -> None:
    async def main(chains: Chains, tasks: trio.Nursery) -> None:
        chain = chains.current
        assert chain is not None
        sessions = [chains.session(), chains.session()]
        for session in sessions:
            tasks.start_soon(reader, session, [1, 2, 3], 1, [])
            await settle()
            chain.deliver(LAST, [served(chains.line.take()[-1])])
            await settle()
        chains.hold()
        new = chains.new(SECOND)
        chain.carry(new, lambda session: None)
        chains.admission.change(ChainRoom("b", 3, 4))
        assert chains.line.take() == []
        chains.admission.change(ChainRoom("b", 1, 4))
        assert chains.line.take() == [Close(0, SECOND)]

    scenario(lab, main, pages=8)


A, B, C, D = range(4)


@pytest.mark.parametrize(
    ("why", "lost", "before", "after", "expected"),
    [
        ("nothing", (0, 0), [(A, 0, 3), (B, 3, 9)], [(A, 0, 4), (B, 4, 9)], Loss()),
        ("kept rows before the loss", (3, 6), [(A, 0, 3), (B, 3, 6), (C, 6, 9)], [(A, 0, 3), (C, 3, 9)],
         Loss(6, C, A, 3)),
        ("the keeper itself has lost units", (3, 6), [(A, 0, 3), (B, 3, 6), (C, 6, 9)],
         [(A, 0, 5), (C, 5, 9)], Loss(6, C, A, 3)),
        ("the keeper has them all", (3, 6), [(A, 0, 3), (B, 3, 6), (C, 6, 9)], [(A, 0, 7), (C, 7, 9)],
         Loss(6, A, A, 3)),
        ("the first stage", (0, 3), [(A, 0, 3), (B, 3, 6), (C, 6, 9)], [(B, 0, 5), (C, 5, 9)], Loss(3, B)),
        ("the last stage", (6, 8), [(A, 0, 3), (B, 3, 6), (C, 6, 9)], [(A, 0, 4), (B, 4, 9)],
         Loss(8, B, B, 6)),
        ("its LM head, too", (6, 9), [(A, 0, 3), (B, 3, 6), (C, 6, 9)], [(A, 0, 4), (B, 4, 9)],
         Loss(8, B, B, 6)),
        ("both ends", (0, 8), [(A, 0, 3), (B, 3, 6), (C, 6, 9)], [(B, 0, 9)], Loss(8, B)),
        ("only the embedding", (0, 1), [(A, 0, 1), (B, 1, 9)], [(B, 0, 9)], Loss()),
        ("only the LM head", (8, 9), [(A, 0, 8), (B, 8, 9)], [(A, 0, 9)], Loss()),
        ("the keeper is after the loss now", (3, 6), [(A, 0, 3), (B, 3, 6), (C, 6, 9)],
         [(C, 0, 6), (A, 6, 9)], Loss(6, C)),
        ("the keeper is gone, too", (0, 6), [(A, 0, 3), (B, 3, 6), (C, 6, 9)], [(C, 0, 9)], Loss(6, C)),
        ("a newcomer learns the tokens by Steps", (3, 6), [(A, 0, 3), (B, 3, 6), (C, 6, 9)],
         [(A, 0, 3), (D, 3, 6), (C, 6, 9)], Loss(6, D)),
        ("a node that was restarted learns them again", (3, 6), [(A, 0, 3), (B, 3, 6), (C, 6, 9)],
         [(A, 0, 3), (B, 3, 6), (C, 6, 9)], Loss(6, B)),
        ("a newcomer has keys and values from others", (3, 6), [(A, 0, 3), (B, 3, 6), (C, 6, 9)],
         [(A, 0, 5), (D, 5, 7), (C, 7, 9)], Loss(6, D, A, 3)),
        ("a newcomer that no Step would pass", (6, 9), [(A, 0, 6), (B, 6, 9)], [(A, 0, 8), (D, 8, 9)],
         Loss(9, D)),
        ("a newcomer with the lost LM head alone", (8, 9), [(A, 0, 8), (B, 8, 9)], [(A, 0, 8), (D, 8, 9)],
         Loss(9, D)),
        ("a newcomer with the lost embedding alone", (0, 1), [(A, 0, 1), (B, 1, 9)], [(D, 0, 1), (B, 1, 9)],
         Loss(1, D)),
        ("a newcomer with the lost embedding", (0, 3), [(A, 0, 3), (B, 3, 9)], [(D, 0, 3), (B, 3, 9)],
         Loss(3, D)),
    ],
)  # fmt: skip
def test_how_lost_units_are_filled(
    why: str,
    lost: tuple[int, int],
    before: list[tuple[int, int, int]],
    after: list[tuple[int, int, int]],
    expected: Loss,
) -> None:
    found = loss_of(lost, [Part(*part) for part in before], [Part(*part) for part in after])
    assert found == expected, why
