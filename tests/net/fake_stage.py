"""A stage of a model whose tokens are arithmetic. Each of its units but the last keeps a running number per
sequence that depends on all rows before, so a lost, repeated or misplaced row, and keys and values of another
position, change the tokens."""

from __future__ import annotations

import struct
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from shoal.engine.arrays import F32
from shoal.engine.batch import Logprobs, Result, Run, Sampling, Want
from shoal.engine.errors import ContextError

UNITS, VOCAB, CONTEXT, COLS, PRIME = 6, 97, 64, 2, 65521
PAGE = 4
STATELESS = frozenset({UNITS - 1})
"""Units without keys and values, as the LM head."""


@dataclass
class FakeSequence:
    """Numbers by unit, one for each position that the unit holds, and how many positions have tokens."""

    sampling: Sampling
    context: int
    length: int = 0
    tokens: list[int] = field(default_factory=list)
    states: dict[int, list[int]] = field(default_factory=dict)
    pages: dict[int, list[object]] = field(default_factory=dict)
    """The pages of each unit: objects, which forks share until one of them writes."""

    def held(self, unit: int) -> int:
        return len(self.states.get(unit, ()))


def shared(pages: Sequence[object], positions: int) -> list[object]:
    """The pages of a fork: whole ones are shared."""
    return [*pages[: positions // PAGE], *(object() for _ in range(1 if positions % PAGE else 0))]


class FakeIncoming:
    """Sequences as far as they have arrived."""

    def __init__(self) -> None:
        self.arrived: dict[int, FakeSequence] = {}
        self.known: set[int] = set()
        """Sequences whose parameters have arrived."""
        self.closed = False

    def carried(
        self, sequence: int, sampling: Sampling, context: int, first: int, tokens: Sequence[int]
    ) -> None:
        self._open()
        self.known.add(sequence)
        arrived = self.arrived.setdefault(sequence, FakeSequence(sampling, context))
        if first > arrived.length:
            raise ValueError(f"tokens from {first} on do not follow the {arrived.length} of {sequence}")
        arrived.sampling, arrived.context = sampling, context
        arrived.length = max(arrived.length, first + len(tokens))

    def accept(self, sequence: int, unit: int, first: int, last: int, data: bytes | memoryview) -> None:
        self._open()
        arrived = self.arrived.setdefault(sequence, FakeSequence(Sampling(), CONTEXT))
        state = arrived.states.setdefault(unit, [])
        if first > len(state) or len(data) != 4 * (last - first):
            raise ValueError(f"positions [{first}, {last}) do not follow the {len(state)} of unit {unit}")
        del state[first:]
        state += struct.unpack(f"<{last - first}I", data)
        pages = arrived.pages.setdefault(unit, [])
        del pages[first // PAGE :]
        pages += [object() for _ in range(len(pages), -(-last // PAGE))]

    def alike(self, sequence: int) -> Mapping[int, int]:
        return {}

    def share(self, sequence: int, source: int, units: Collection[int], positions: int) -> None:
        self._open()
        if source not in self.arrived or any(self.arrived[source].held(u) < positions for u in units):
            raise ValueError(f"not so many positions of {source} have arrived")
        arrived = self.arrived.setdefault(sequence, FakeSequence(Sampling(), CONTEXT))
        for unit in units:
            arrived.states[unit] = self.arrived[source].states[unit][:positions]
            arrived.pages[unit] = shared(self.arrived[source].pages[unit], positions)

    def close(self) -> None:
        self.closed = True
        self.arrived.clear()

    def _open(self) -> None:
        if self.closed:
            raise ValueError("the staging area has been closed")


def score(value: int, token: int) -> float:
    """The log-probability of a token after a row."""
    return -((value * 31 + token * 7) % 89) / 8


def logprobs(value: int, token: int, count: int) -> Logprobs:
    return Logprobs(score(value, token), tuple((t, score(value, t)) for t in range(count)))


class FakeStage:
    """Units [first, last) of the arithmetic model. `room` caps the positions held by all sequences, and
    `kv_pages` pages of PAGE positions, of which sequences take whole ones."""

    page_positions = PAGE
    kv_bytes = 0

    def __init__(self, first: int, last: int, room: int = 10**9, pages: int | None = None) -> None:
        self.first, self.last, self.room, self.kv_pages = first, last, room, pages
        self.sequences: dict[int, FakeSequence] = {}
        self.batches: list[list[tuple[int, int, int]]] = []
        self.parts: list[tuple[int, int]] = []
        """The units of the runs of parts."""
        self.closed = self.left = False
        """`left`: nothing can be run before another range has been adopted."""
        self.most_open = self.most_pages = self.refused = 0
        self.prepared: list[range] = []
        self.loaded: list[range] = [range(first, last)]
        """The ranges that were opened, or prepared."""
        self.staged: list[FakeIncoming] = []
        self.limits: list[int] = []
        self.exported: list[tuple[int, int, int, int]] = []
        self.cancels: list[int] = []
        self.held: frozenset[int] = frozenset()
        self.copies = 10**9
        """The most copies that there is room for."""
        self.kept: dict[int, dict[int, list[tuple[int, int]]]] = {}
        """The rows that went into a unit, by sequence and unit."""

    def hold(self, units: Sequence[int]) -> None:
        assert not self.closed
        self.held = frozenset([u for u in units if not self.first <= u < self.last][: self.copies])

    def open_sequence(self, sequence: int, sampling: Sampling, context: int) -> None:
        assert not self.closed
        if sequence in self.sequences:
            raise ValueError(f"sequence {sequence} is open already")
        self.sequences[sequence] = FakeSequence(sampling, context)
        self.most_open = max(self.most_open, len(self.sequences))

    def fork_sequence(
        self, source: int, sequence: int, positions: int, sampling: Sampling, context: int
    ) -> None:
        assert not self.closed and sequence not in self.sequences
        known = self.sequences[source]
        assert 0 < positions <= known.length
        fork = self.sequences[sequence] = FakeSequence(sampling, context, positions)
        fork.states = {unit: state[:positions] for unit, state in known.states.items()}
        fork.pages = {unit: shared(pages, positions) for unit, pages in known.pages.items()}
        self.most_open = max(self.most_open, len(self.sequences))

    def cancel(self, sequence: int) -> None:
        self.cancels.append(sequence)

    def run(self, batch: Sequence[Run]) -> list[Result]:
        assert not self.closed and not self.left
        assert len({run.sequence for run in batch}) == len(batch)
        assert len({run.part for run in batch}) == 1
        self.batches.append([(run.sequence, run.first, len(run.tokens)) for run in batch])
        return [self._run(run) for run in batch]

    def _run(self, run: Run) -> Result:
        known, n = self.sequences[run.sequence], len(run.tokens)
        enter, until = run.part or (self.first, self.last)
        enter, until = max(enter, self.first), min(until, self.last)
        assert enter < until
        if run.part is not None:
            self.parts.append((enter, until))
        end = run.first + n
        if run.first > known.length or end > known.context:
            raise ValueError(f"rows from {run.first}: the sequence holds {known.length} positions")
        length = end if run.part is None else max(end, known.length)
        others = [other.length for s, other in self.sequences.items() if s != run.sequence]
        if sum(others) + length > self.room:
            raise ContextError("keys and values have filled the MB promised to them")
        units = [unit for unit in range(enter, until) if unit not in STATELESS]
        written = {unit: self._written(run, unit, end) for unit in units}
        pages = self._pages(run.sequence, written)
        if self.kv_pages is not None and pages > self.kv_pages:
            self.refused += 1
            raise ContextError(f"{pages} pages are more than the {self.kv_pages} promised")
        if enter == 0:
            values = list(run.tokens)
        else:
            if run.hidden is None or run.hidden.shape != (n, COLS):
                raise ValueError(f"stage [{self.first}, {self.last}) needs hidden rows of {COLS} columns")
            values = [int(v) for v in run.hidden[:, 0]]
        known.length = length
        known.tokens[run.first :] = run.tokens
        known.pages |= written
        self.most_pages = max(self.most_pages, pages)
        for unit in range(enter, until):
            state = known.states.setdefault(unit, [])
            if len(state) < run.first and unit not in STATELESS:
                raise ValueError(f"unit {unit} holds {len(state)} of the {run.first} positions")
            later = [] if run.part is None else state[end:]
            del state[run.first :]
            for i, value in enumerate(values):
                before = state[-1] if state else 1
                values[i] = (before * 31 + value * (unit + 1) + 7) % PRIME
                if unit not in STATELESS:
                    state.append(values[i])
            state += later
        if until < UNITS:
            self._keep(run, until, values)
            hidden = np.array([[value, run.first + i] for i, value in enumerate(values)], np.float32)
            return Result(run.sequence, run.first, n, hidden=hidden)
        history = known.tokens if run.history is None else run.history.tolist()
        sampling = run.sampling or known.sampling
        added = [sampling.seed] * n
        if sampling.penalises:
            assert len(history) == end
            added = [seed + sum(history[: run.first + i + 1]) for i, seed in enumerate(added)]
        return self._wanted(run, values, added)

    def _wanted(self, run: Run, values: Sequence[int], added: Sequence[int]) -> Result:
        """What is wanted of the last unit's rows. The first allowed token from the drawn one on is taken."""
        where = run.sequence, run.first, len(values)
        tokens = [(value + more) % VOCAB for value, more in zip(values, added, strict=True)]
        if run.allowed is not None:
            allowed = np.unpackbits(run.allowed, count=VOCAB, bitorder="little")
            tokens = [
                next(t % VOCAB for t in range(token, 2 * VOCAB) if allowed[t % VOCAB]) for token in tokens
            ]
        following = [] if run.following is None else [*run.tokens[1:], run.following]
        of = {Want.TOKEN: tokens[-1:], Want.TOKENS: tokens, Want.SCORES: following}.get(run.want, [])
        rows = list(zip(values[-len(of) :], of, strict=True)) if of else []
        told = () if run.report is None else tuple(logprobs(*row, run.report) for row in rows)
        if run.want is Want.TOKEN:
            return Result(*where, token=of[0], logprobs=told)
        if run.want is Want.TOKENS:
            return Result(*where, tokens=tuple(of), logprobs=told)
        if run.want is Want.SCORES:
            return Result(*where, scores=tuple(score(*row) for row in rows), logprobs=told)
        if run.want is Want.ROWS:
            output = [[value, run.first + i] for i, value in enumerate(values)]
            return Result(*where, output=np.array(output, np.float32))
        return Result(*where)

    def _written(self, run: Run, unit: int, end: int) -> list[object]:
        """The pages of a unit after a run, which writes to none that another sequence has."""
        pages = self.sequences[run.sequence].pages.get(unit, [])
        others = [
            page for s, o in self.sequences.items() if s != run.sequence for page in o.pages.get(unit, [])
        ]
        after = pages if run.part is not None else pages[: -(-run.first // PAGE)]
        after = after + [object() for _ in range(len(after), -(-end // PAGE))]
        for at in range(run.first // PAGE, -(-end // PAGE)):
            after[at] = object() if after[at] in others else after[at]
        return after

    def _pages(self, sequence: int, written: Mapping[int, list[object]]) -> int:
        """The pages of the unit that has most, if those of a sequence are these."""
        counts = [0]
        for unit in range(self.first, self.last):
            used = {
                page for s, o in self.sequences.items() if s != sequence for page in o.pages.get(unit, [])
            }
            own = written.get(unit, self.sequences[sequence].pages.get(unit, []))
            counts.append(len(used.union(own)))
        return max(counts)

    def _keep(self, run: Run, until: int, values: Sequence[int]) -> None:
        units = self.kept.setdefault(run.sequence, {})
        if run.part is None:
            self.kept[run.sequence] = units = {until: units.get(until, [])[: run.first]}
        rows = units.setdefault(until, [])
        if until == self.last and run.first <= len(rows):
            new = [(value, run.first + i) for i, value in enumerate(values)]
            rows[run.first : run.first + len(new)] = new

    def rows_kept(self, sequence: int, unit: int) -> int:
        return len(self.kept.get(sequence, {}).get(unit, ()))

    def kept_rows(self, sequence: int, unit: int, first: int, last: int) -> F32:
        if not 0 <= first < last <= self.rows_kept(sequence, unit):
            raise ValueError(f"rows of positions [{first}, {last}) are not kept")
        return np.array(self.kept[sequence][unit][first:last], np.float32)

    def rehearse(self, sequence: int) -> None:
        """A run begins soon enough."""

    def settle(self) -> None:
        """Nothing is left for later."""

    def close_sequence(self, sequence: int) -> None:
        self.sequences.pop(sequence, None)
        self.kept.pop(sequence, None)

    def close(self) -> None:
        assert not self.closed
        self.closed = True
        self.sequences.clear()

    def export_cuts(
        self, sequence: int, units: Sequence[int], cuts: Sequence[tuple[int, int]]
    ) -> list[list[bytes]]:
        return [[self._exported(sequence, unit, *cut) for unit in units] for cut in cuts]

    def _exported(self, sequence: int, unit: int, first: int, last: int) -> bytes:
        self.exported.append((sequence, unit, first, last))
        state = self.sequences[sequence].states.get(unit, [])
        if not 0 <= first < last <= len(state):
            raise ValueError(f"unit {unit} holds {len(state)} positions, not [{first}, {last})")
        return struct.pack(f"<{last - first}I", *state[first:last])

    def prepare(self, first: int, last: int, kv_bytes: int | None = None) -> range:
        assert not self.closed and not self.prepared
        if kv_bytes is not None:
            self.limit_kv(kv_bytes)
        self.prepared.append(range(first, last))
        self.loaded.append(range(first, last))
        return self.prepared[0]

    def leave(self, first: int, last: int) -> None:
        assert not self.closed and not self.prepared
        self.left = True

    def discard(self, prepared: range) -> None:
        self.prepared.remove(prepared)

    def incoming(self) -> FakeIncoming:
        self.staged.append(FakeIncoming())
        return self.staged[-1]

    def limit_kv(self, kv_bytes: int) -> None:
        """In positions, here."""
        self.limits.append(kv_bytes)
        self.room = kv_bytes

    def adopt(
        self,
        prepared: range | None,
        sequences: Mapping[int, int],
        incoming: FakeIncoming | None = None,
        lost: range = range(0),
        kv_bytes: int | None = None,
    ) -> None:
        assert not self.closed
        old, new = range(self.first, self.last), prepared or range(self.first, self.last)
        after: dict[int, FakeSequence] = {}
        for number, positions in sequences.items():
            own = self.sequences.get(number)
            more = None if incoming is None else incoming.arrived.get(number)
            if own is None and incoming is not None and number in incoming.known:
                own = more
            if own is None or own.length < positions:
                raise ValueError(f"sequence {number} has no tokens of {positions} positions")
            kept = after[number] = FakeSequence(own.sampling, own.context, positions)
            for unit in new:
                source = own if unit in old and number in self.sequences else more
                held = 0 if source is None else source.held(unit)
                if held < positions and unit not in lost and unit not in STATELESS:
                    raise ValueError(f"unit {unit} holds {held} of the {positions} positions of {number}")
                kept.states[unit] = [] if source is None else source.states.get(unit, [])[:positions]
                kept.pages[unit] = (
                    [] if source is None else source.pages.get(unit, [])[: -(-positions // PAGE)]
                )
        assert prepared is not None or not self.left
        if prepared is not None:
            self.prepared.remove(prepared)
            self.left = False
        self.sequences, self.first, self.last = after, new.start, new.stop
        for sequence in after:
            self.most_pages = max(self.most_pages, self._pages(sequence, {}))
        self.kept = {
            s: {unit: rows[: sequences[s]] for unit, rows in units.items()}
            for s, units in self.kept.items()
            if s in after
        }
        if kv_bytes is not None:
            self.limit_kv(kv_bytes)
