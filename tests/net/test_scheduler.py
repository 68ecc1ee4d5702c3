"""Groups of concurrent sequences: who waits for whom, and what a chain of stages settles to."""

import heapq
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from shoal.engine.batch import Want
from shoal.net.inbox import Batch, Inbox
from shoal.net.messages import Epoch, Step
from shoal.net.scheduler import Costs, Load, Streams
from shoal.planner.groups import Grouping, plain_groupings

NOW = Epoch(1, 2)
HIDDEN = np.zeros((1, 4), np.float32)
ONE = (Grouping(1, 0.004),) * 4
"""All sequences in one group, which waits for up to 4 ms."""


def made(streams: Streams, session: int, laps: Sequence[float], now: float) -> float:
    """Lets a session make laps outside the stage; its next row arrives at the returned time."""
    streams.arrived(session, now)
    for lap in laps:
        streams.taken([session])
        streams.ran([session], now)
        now += lap
        streams.arrived(session, now)
    return now


def test_a_lone_stream_never_waits() -> None:
    streams = Streams(ONE)
    assert streams.choose(0.0) is None
    now = made(streams, 7, [0.003] * 5, 0.0)
    assert streams.choose(now) == [7]


def test_a_group_waits_for_a_sequence_that_is_due_within_the_wait() -> None:
    streams = Streams(ONE)
    made(streams, 1, [0.003] * 9, 0.0)
    streams.arrived(2, 0.027)
    assert streams.choose(0.027) == [1, 2]
    streams.taken([1, 2])
    streams.ran([1, 2], 0.030)
    streams.arrived(2, 0.032)
    until = streams.choose(0.032)
    # 1 is due at 0.033 and not waited for when it is a tenth of a lap and twice the usual spread late.
    assert isinstance(until, float) and 0.0333 <= until < 0.034
    assert streams.due(0.032) == (pytest.approx(0.033), until)
    assert streams.choose(until) == [2]
    streams.arrived(1, 0.0331)
    assert streams.choose(0.0331) == [2, 1]


def test_nothing_waits_for_a_sequence_that_is_due_later_than_the_wait_pays() -> None:
    streams = Streams(ONE)
    made(streams, 1, [0.020] * 9, 0.0)
    streams.taken([1])
    streams.ran([1], 0.180)
    streams.arrived(2, 0.181)
    assert streams.choose(0.181) == [2]
    # The time counts from when the group could have run.
    streams.taken([2])
    streams.ran([2], 0.197)
    streams.arrived(2, 0.198)
    assert isinstance(streams.choose(0.198), float)


def test_beside_prompts_all_sequences_wait_for_each_other_until_one_would_be_late() -> None:
    streams = Streams((Grouping(2),) * 4)
    made(streams, 1, [0.010] * 9, 0.0)
    made(streams, 2, [0.010] * 9, 0.004)  # its last call ended at 0.084
    streams.taken([1])
    streams.ran([1], 0.092)  # so it is due at 0.102
    assert streams.choose(0.094) == [2]
    assert streams.together(0.094, 1.8, 0.002) == [2]  # which must begin at 0.1 at the latest
    until = streams.together(0.094, 2.2, 0.002)
    assert isinstance(until, float) and 0.102 < until <= 0.104
    # Less than half of a call is always waited, or groups that have met would part.
    assert isinstance(streams.together(0.1015, 1.8, 0.002), float)
    streams.arrived(1, 0.102)
    assert streams.together(0.102, 1.8, 0.002) == [2, 1]
    streams.taken([1, 2])
    assert streams.together(0.102, 1.8, 0.002) is None


def test_nothing_waits_for_a_sequence_whose_laps_are_unknown_or_that_is_gone() -> None:
    streams = Streams(ONE)
    streams.arrived(1, 0.0)
    streams.taken([1])
    streams.ran([1], 0.001)
    streams.arrived(2, 0.001)
    assert streams.choose(0.001) == [2]
    made(streams, 1, [0.002] * 5, 0.002)
    streams.taken([1, 2])
    streams.ran([1, 2], 0.012)
    streams.arrived(2, 0.0135)
    assert isinstance(streams.choose(0.0135), float)
    streams.forget(1)
    assert streams.choose(0.0135) == [2]
    assert len(streams) == 1


def test_a_session_that_stays_away_stops_counting() -> None:
    streams = Streams(plain_groupings(2))
    for session in (1, 2, 3):
        made(streams, session, [0.002] * 3, 0.0)
    streams.taken([1, 2, 3])
    streams.ran([1, 2, 3], 0.010)
    streams.arrived(1, 0.012)
    streams.drop(0.050)
    assert len(streams) == 3
    streams.drop(0.100)
    assert len(streams) == 1
    assert streams.due(0.100) is None


def test_groups_are_as_equal_as_possible_whoever_comes_and_goes() -> None:
    streams = Streams(plain_groupings(3))

    def groups() -> list[int]:
        return sorted(Counter(stream.group for stream in streams._streams.values()).values())

    for session in range(8):
        streams.arrived(session, 0.0)
    assert groups() == [2, 3, 3]
    for session in (0, 3, 6):  # all of one group
        streams.forget(session)
    assert groups() == [1, 2, 2]
    for session in (1, 2, 4):
        streams.forget(session)
    assert groups() == [1, 1]
    streams.arrived(9, 0.0)
    assert groups() == [1, 1, 1]
    assert streams.choose(0.0) == [5]


def test_costs_follow_what_calls_take_and_clamp_a_hiccup() -> None:
    costs = Costs(lambda loads, pause: 0.001 * sum(rows for rows, _, _ in loads))
    for _ in range(60):
        costs.ran([(2, 0, True)], 0.003)
    assert costs.seconds([(4, 0, False)]) == pytest.approx(0.006, rel=0.01)
    assert costs.seconds([(1, 0, True)] * 4) == pytest.approx(0.004)  # calls of decoded rows are apart
    costs.ran([(1, 0, True)], 5.0)
    assert costs.seconds([(1, 0, True)]) == pytest.approx(0.0011)


class Chain:
    """A chain of inboxes whose calls take `seconds(rows)`, with a hop of `hop` seconds between stages and to
    and from the head, which sends the rows of a call one after another, `apart` seconds from each other."""

    def __init__(
        self, stages: int, seconds: Callable[[int], float], *, hop: float, apart: float, wait: float
    ) -> None:
        def expect(loads: Sequence[Load], pause: float) -> float:
            return seconds(sum(rows for rows, _, _ in loads))

        table = tuple(Grouping(one.groups, wait) for one in plain_groupings(stages))
        self.boxes = [Inbox(NOW, 64, 64, table if at == 0 else (), expect) for at in range(stages)]
        self.seconds, self.hop, self.apart = seconds, hop, apart
        self.calls: list[list[tuple[float, int]]] = [[] for _ in range(stages)]
        self.tokens: list[float] = []
        self._free = [0.0] * stages
        self._events: list[tuple[float, int, int, Step | None]] = []
        self._count = 0

    def at(self, when: float, stage: int, step: Step | None = None) -> None:
        self._count += 1
        heapq.heappush(self._events, (when, self._count, stage, step))

    def start(self, session: int, when: float) -> None:
        self.at(when, 0, Step(session, NOW, 0, (1,), Want.TOKEN))

    def run(self, until: float) -> None:
        while self._events and self._events[0][0] < until:
            now, _, stage, step = heapq.heappop(self._events)
            box = self.boxes[stage]
            if step is not None:
                box.put(step, now)
            if now < self._free[stage]:
                continue  # the end of the call looks again
            batch = box.take(now)
            if isinstance(batch, float):
                assert batch > now
                self.at(batch, stage)
            elif batch is not None:
                self._call(stage, batch, now)

    def _call(self, stage: int, batch: Batch, now: float) -> None:
        rows = sum(step.rows for step in batch.steps)
        end = self._free[stage] = now + self.seconds(rows)
        self.boxes[stage].ran(batch, now, end)
        self.calls[stage].append((now, rows))
        self.at(end, stage)
        for place, step in enumerate(batch.steps):
            if stage + 1 < len(self.boxes):
                more = place + 1 < len(batch.steps)
                onward = Step(step.session, NOW, step.first, step.tokens, step.want, HIDDEN, more)
                self.at(end + self.hop, stage + 1, onward)
            elif step.want is Want.TOKEN:
                self.tokens.append(end + self.hop)
                after = Step(step.session, NOW, step.first + step.rows, (1,), Want.TOKEN)
                self.at(end + 2 * self.hop + place * self.apart, 0, after)


def mostly_reading(rows: int) -> float:
    return 0.005 + 0.0004 * rows


@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("streams", [2, 3, 4, 8, 16])
@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_as_many_groups_as_stages_form_and_stay(stages: int, streams: int, spread: float) -> None:
    chain = Chain(stages, mostly_reading, hop=0.0002, apart=0.0001, wait=0.008)
    for session in range(streams):
        chain.start(session, 0.02 * spread * session / streams)
    chain.run(2.0)
    count = min(streams, stages)
    allowed = {streams // count, -(-streams // count)}
    for calls in chain.calls:
        late = [rows for start, rows in calls if start > 0.5]
        assert set(late) == allowed
    largest = max(allowed)
    lap = stages * (mostly_reading(largest) + 0.0002) + 0.0002 + largest * 0.0001
    rate = sum(at > 0.5 for at in chain.tokens) / 1.5
    assert rate >= 0.95 * streams / lap


def test_groups_without_a_wait_are_one_more_than_stages() -> None:
    """What happens without waiting, so that the test above can fail."""
    chain = Chain(1, mostly_reading, hop=0.0002, apart=0.0001, wait=0.0)
    for session in range(8):
        chain.start(session, 0.0)
    chain.run(2.0)
    late = [rows for start, rows in chain.calls[0] if start > 0.5]
    assert sum(late) / len(late) < 5


def test_streams_that_end_and_begin_leave_the_groups_equal() -> None:
    chain = Chain(2, mostly_reading, hop=0.0002, apart=0.0001, wait=0.008)
    for session in range(8):
        chain.start(session, 0.0)
    chain.run(0.5)
    chain._events = [
        event for event in chain._events if event[3] is None or event[3].session not in (1, 4, 6)
    ]
    heapq.heapify(chain._events)
    chain.start(20, 0.6)
    chain.run(2.0)
    alive = len({step.session for _, _, _, step in chain._events if step is not None})
    for calls in chain.calls:
        assert {rows for start, rows in calls if start > 1.0} == {alive // 2, -(-alive // 2)}
