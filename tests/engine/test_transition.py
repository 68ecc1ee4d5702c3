"""Ranges that are prepared beside running work, adopted with keys and values of other stages, and filled."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import numpy as np
import pytest

from shoal.engine.arrays import F32
from shoal.engine.batch import Run, Sampling, Want
from shoal.engine.errors import ContextError
from shoal.engine.generate import generate
from shoal.engine.incoming import Incoming
from shoal.engine.kv_page import page_bytes
from shoal.engine.layout import CHUNK
from shoal.engine.model_directory import Model
from shoal.engine.stage import Stage, StageOptions

OPTIONS = StageOptions("native", threads=1, max_wanted=256)
PROMPT: list[int] = np.random.default_rng(0).integers(0, 267, 300).tolist()
LIVELY = Sampling(temperature=1.1, repetition_penalty=1.2, seed=5)
LAYERS = range(1, 4)
BACKENDS = ["native", pytest.param("numpy", marks=pytest.mark.slow)]


@pytest.fixture(scope="module", params=["int8", "int8-kv"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """The tiny Llama in int8, with f16 or int8 keys and values."""
    from .conftest import _tiny

    return _tiny(request.param, tmp_path_factory)


class Chain:
    """Answers over stages whose boundaries move; the rows that each stage has sent are kept."""

    def __init__(self, model: Model, cuts: Sequence[int], backend: str = "native") -> None:
        self.model, self.options = model, StageOptions(backend, threads=1, max_wanted=256)
        bounds = [0, *cuts, model.n_units]
        self.stages = [Stage(model, a, b, self.options) for a, b in pairwise(bounds)]
        self.sent: dict[tuple[int, int], F32] = {}
        self.known: dict[int, list[int]] = {}
        self.at: dict[int, int] = {}
        self.runs: dict[int, list[tuple[int, int]]] = {}

    def open(self, sequence: int, prompt: Sequence[int]) -> None:
        self.known[sequence], self.at[sequence] = [*prompt], 0
        self.runs[sequence] = []
        for stage in self.stages:
            stage.open_sequence(sequence, LIVELY, 400)

    def step(self, sequence: int, chunk: int = 200) -> int:
        """Runs what is not run yet; returns the token that follows."""
        known = self.known[sequence]
        for first in range(self.at[sequence], len(known), chunk):
            hidden, tokens = None, known[first : first + chunk]
            self.runs[sequence].append((first, first + len(tokens)))
            for stage in self.stages:
                (result,) = stage.run([Run(sequence, first, tokens, Want.TOKEN, hidden)])
                hidden = result.hidden
                if hidden is not None:
                    kept = self.sent.get((sequence, stage.last), np.zeros((0, hidden.shape[1]), np.float32))
                    self.sent[sequence, stage.last] = np.concatenate([kept[:first], hidden])
        assert result.token is not None
        self.at[sequence] = len(known)
        known.append(result.token)
        return result.token

    def turn(self, sequence: int, keep: int, tokens: Sequence[int]) -> None:
        """The next turn of a chat, which shares the first `keep` positions with what was run."""
        self.known[sequence], self.at[sequence] = [*self.known[sequence][:keep], *tokens], keep

    def move(self, cuts: Sequence[int]) -> None:
        """The boundaries go to `cuts`; pages of units that move go along."""
        bounds, positions = [0, *cuts, self.model.n_units], dict(self.at)
        prepared = [stage.prepare(a, b) for stage, (a, b) in zip(self.stages, pairwise(bounds), strict=True)]
        areas = [stage.incoming() for stage in self.stages]
        for taker, area, (a, b) in zip(self.stages, areas, pairwise(bounds), strict=True):
            for unit in [u for u in LAYERS if a <= u < b and not taker.first <= u < taker.last]:
                (giver,) = [stage for stage in self.stages if stage.first <= unit < stage.last]
                for sequence, end in positions.items():
                    send(giver, area, sequence, unit, 0, end)
        for stage, ready, area in zip(self.stages, prepared, areas, strict=True):
            stage.adopt(ready, positions, area)

    def close(self) -> None:
        for stage in self.stages:
            stage.close()


def length(stage: Stage, sequence: int) -> int:
    return stage._sequences[sequence].length


def send(giver: Stage, area: Incoming, sequence: int, unit: int, first: int, last: int) -> None:
    """Sends positions in two messages, of which the second may begin within a chunk."""
    middle = (first + last) // 2
    for a, b in ((first, middle), (middle, last)):
        if a < b:
            area.accept(sequence, unit, a, b, giver.export_positions(sequence, unit, a, b))


def alone(model: Model, prompt: Sequence[int], count: int, backend: str = "native") -> list[int]:
    options = StageOptions(backend, threads=1, max_rows=200)
    with Stage(model, 0, model.n_units, options) as stage:
        return list(generate(stage, prompt, LIVELY, max_tokens=count, end=(), context=400))


@pytest.fixture
def chain(model: Model) -> Iterator[Callable[..., Chain]]:
    made: list[Chain] = []

    def make(cuts: Sequence[int], backend: str = "native") -> Chain:
        made.append(Chain(model, cuts, backend))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.mark.parametrize("backend", BACKENDS)
def test_boundaries_move_in_the_middle_of_answers_and_no_token_changes(
    model: Model, chain: Callable[..., Chain], backend: str
) -> None:
    prompts = {1: PROMPT, 2: PROMPT[:70]}
    expected = {n: alone(model, prompt, 10, backend) for n, prompt in prompts.items()}
    three = chain((2, 3), backend)
    for n, prompt in prompts.items():
        three.open(n, prompt)
    cuts = iter(((1, 2), (3, 4), (1, 4), (2, 3)))
    found: dict[int, list[int]] = {1: [], 2: []}
    for n in range(10):
        for sequence in (1, 2):
            found[sequence].append(three.step(sequence))
        if n in (1, 3, 4, 7):
            three.move(next(cuts))
    assert found == expected
    assert [(stage.first, stage.last) for stage in three.stages] == [(0, 2), (2, 3), (3, 5)]
    assert [sorted(stage._weights.units) for stage in three.stages] == [[0, 1], [2], [3, 4]]
    page = page_bytes(model.program.units[1].states[0], model.kv_dtype)
    assert [stage.kv_bytes for stage in three.stages] == [3 * page] * 3  # two pages, and one


def test_finished_positions_are_sent_ahead_while_the_answer_goes_on_and_goes_back(
    model: Model, chain: Callable[..., Chain]
) -> None:
    """A turn of a chat goes back to a position that was sent already."""
    turn = [*PROMPT[:130], *PROMPT[:90]]
    expected = alone(model, turn, 6)
    two = chain((2,))
    two.open(1, PROMPT)
    taker, giver = two.stages
    area, sent, repeated = taker.incoming(), 0, 0
    ready = taker.prepare(0, 3), giver.prepare(3, 5)
    found = []
    for n in range(6):
        if n == 2:
            two.turn(1, 130, turn[130:])
            found = []
        lowest = two.at[1]
        found.append(two.step(1))
        repeated += lowest < sent
        sent, done = min(sent, lowest), two.at[1] // CHUNK * CHUNK
        if sent < done:
            area.accept(1, 2, sent, done, giver.export_positions(1, 2, sent, done))
            sent = done
    assert (sent, repeated) == (192, 1)
    positions = {1: two.at[1]}
    with pytest.raises(ValueError, match=f"unit 2 holds 192 of the {two.at[1]} positions of sequence 1"):
        taker.adopt(ready[0], positions, area)
    area.accept(1, 2, sent, two.at[1], giver.export_positions(1, 2, sent, two.at[1]))
    taker.adopt(ready[0], positions, area)
    giver.adopt(ready[1], positions)
    found += [two.step(1) for _ in range(2)]
    assert found == expected


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_stage_without_sequences_takes_over_whole_ones(
    model: Model, chain: Callable[..., Chain], backend: str
) -> None:
    """The last layers and the LM head go to a new stage, which needs the tokens to draw the next one."""
    expected = alone(model, PROMPT, 6, backend)
    one = chain((), backend)
    one.open(1, PROMPT)
    (giver,) = one.stages
    found = [one.step(1) for _ in range(3)]
    taker = Stage(model, 2, 5, one.options)
    one.stages.append(taker)
    area = taker.incoming()
    for first in range(0, one.at[1], 100):
        area.carried(1, LIVELY, 400, first, one.known[1][first : min(first + 100, one.at[1])])
    for unit in (2, 3):
        send(giver, area, 1, unit, 0, one.at[1])
    taker.adopt(None, {1: one.at[1]}, area)
    giver.adopt(giver.prepare(0, 2), {1: one.at[1]})
    found += [one.step(1) for _ in range(3)]
    assert found == expected


def test_tokens_arrive_in_any_overlap_and_are_checked(model: Model) -> None:
    with Stage(model, 4, 5, OPTIONS) as stage:
        area = stage.incoming()
        with pytest.raises(ValueError, match="tokens from position 2 on do not follow the 0"):
            area.carried(1, LIVELY, 50, 2, [1])
        area.carried(1, LIVELY, 50, 0, [1, 2, 3, 4])
        area.carried(1, LIVELY, 50, 1, [7, 8])  # from another giver, or after the sequence went back
        for sequence, first, tokens, context, error, why in (
            (1, 5, [1], 50, ValueError, "do not follow the 4"),
            (1, -1, [1], 50, ValueError, "do not follow the 4"),
            (1, 0, [267], 50, ValueError, "token id"),
            (1, 0, [-1], 50, ValueError, "token id"),
            (1, 4, [1] * 47, 50, ContextError, "51 tokens of sequence 1 exceed its context of 50"),
            (2, 0, [1], 10**6, ContextError, "a context of 1000000"),
            (2, 0, [1], 0, ContextError, "a context of 0"),
        ):
            with pytest.raises(error, match=why):
                area.carried(sequence, LIVELY, context, first, tokens)
        with pytest.raises(ValueError, match="has the tokens of 4 positions here, not of 5"):
            stage.adopt(None, {1: 5}, area)
        stage.adopt(None, {1: 4}, area)
        assert stage._sequences[1].tokens[:4].tolist() == [1, 7, 8, 4]
        assert set(stage._sequences) == {1}


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize(
    ("backend", "enter", "until"),
    [
        *(("native", enter, until) for enter, until in ((1, 2), (2, 3), (3, 4), (1, 4), (2, 4))),
        pytest.param("numpy", 2, 3, marks=pytest.mark.slow),
    ],
)
def test_lost_units_are_filled_by_runs_of_them_alone(
    model: Model, chain: Callable[..., Chain], backend: str, enter: int, until: int, kept: bool
) -> None:
    """From the rows that the stage before them has sent, or from the tokens."""
    prompts = {1: PROMPT, 2: PROMPT[:70]}
    expected = {n: alone(model, prompt, 8, backend) for n, prompt in prompts.items()}
    three = chain(sorted({enter, until}), backend)
    for n, prompt in prompts.items():
        three.open(n, prompt)
    found = {n: [three.step(n) for _ in range(5)] for n in prompts}
    rows = {n: three.sent[n, enter] for n in prompts}
    front, dead, back = three.stages
    dead.close()
    three.stages.remove(dead)
    lost = range(enter, until)
    page_before = front.kv_bytes
    front.adopt(front.prepare(0, until), three.at, lost=lost)
    back.adopt(None, three.at, lost=lost)
    assert front.kv_bytes == page_before
    for n, known in three.known.items():
        with pytest.raises(ValueError, match=f"unit {enter} holds 0 of the {three.at[n]} positions before"):
            front.run([Run(n, three.at[n], known[-1:], Want.NOTHING)])
        # NumPy's sums depend on which rows go together.
        chunks = [(a, min(a + 128, three.at[n])) for a in range(0, three.at[n], 128)]
        for first, last in chunks if backend == "native" else three.runs[n].copy():
            tokens = known[first:last]
            part = (enter, until) if kept else (0, until)
            hidden = rows[n][first : first + len(tokens)] if kept else None
            (result,) = front.run([Run(n, first, tokens, Want.NOTHING, hidden, part)])
            assert result.hidden is not None and result.token is None
            assert result.hidden.tobytes() == three.sent[n, until][first : first + len(tokens)].tobytes()
            assert length(front, n) == three.at[n]
    for n in prompts:
        found[n] += [three.step(n) for _ in range(3)]
    assert found == expected


def test_a_new_stage_is_filled_by_parts_from_its_first_position_on(
    model: Model, chain: Callable[..., Chain]
) -> None:
    """The last stage is lost, with its tokens; the head has no state, so the part ends before it."""
    expected = alone(model, PROMPT, 8)
    two = chain((2,))
    two.open(1, PROMPT)
    found = [two.step(1) for _ in range(4)]
    front, dead = two.stages
    dead.close()
    two.stages[1] = new = Stage(model, 2, 5, OPTIONS)
    for stage in two.stages:
        stage.adopt(None, two.at, lost=range(2, 4))
    assert not new._sequences
    new.open_sequence(1, LIVELY, 400)
    for first in range(0, two.at[1], 250):
        tokens = two.known[1][first : min(first + 250, two.at[1])]
        (cut,) = front.run([Run(1, first, tokens, Want.NOTHING, None, (0, 4))])
        new.run([Run(1, first, tokens, Want.NOTHING, cut.hidden, (0, 4))])
        assert (length(front, 1), length(new, 1)) == (two.at[1], first + len(tokens))
    found += [two.step(1) for _ in range(4)]
    assert found == expected


def test_sequences_are_truncated_closed_and_left_unfinished(
    model: Model, chain: Callable[..., Chain]
) -> None:
    two = chain((2,))
    for n in (1, 2, 3):
        two.open(n, PROMPT)
        two.step(n)
    taker, giver = two.stages
    area, ready = taker.incoming(), taker.prepare(0, 3)
    for n in (1, 2, 3):
        send(giver, area, n, 2, 0, 290)
    area.accept(7, 2, 0, 64, giver.export_positions(1, 2, 0, 64))  # opened, but its Open is not here yet
    area.carried(8, LIVELY, 20, 0, [1, 2])
    page = page_bytes(model.program.units[1].states[0], model.kv_dtype)
    assert taker.kv_bytes == (3 * 2 + 3 * 2 + 1) * page
    taker.close_sequence(3)
    for n in (3, 1):  # where it has not ended yet
        area.accept(n, 2, 290, 300, giver.export_positions(n, 2, 290, 300))
    taker.adopt(ready, {1: 200, 9: 0}, area)
    assert set(taker._sequences) == {1}
    assert [taker.positions(1, u) for u in (1, 2)] == [200, 200] and length(taker, 1) == 200
    assert taker.kv_bytes == 2 * page
    giver.adopt(giver.prepare(3, 5), {1: 200})
    two.turn(1, 200, PROMPT[200:])
    assert [two.step(1) for _ in range(4)] == alone(model, PROMPT, 4)
    with pytest.raises(ValueError, match="has been closed"):
        area.accept(1, 2, 0, 64, b"")


def test_an_adoption_that_is_refused_changes_nothing(model: Model, chain: Callable[..., Chain]) -> None:
    expected = alone(model, PROMPT, 6)
    two = chain((2,))
    two.open(1, PROMPT)
    found = [two.step(1) for _ in range(2)]
    taker, giver = two.stages
    area, ready = taker.incoming(), taker.prepare(0, 4)
    send(giver, area, 1, 2, 0, 301)
    send(giver, area, 1, 3, 0, 300)
    before = taker.kv_bytes
    other = giver.prepare(4, 5)
    closed = taker.incoming()
    closed.close()
    for prepared, kept, incoming, lost, why in (
        (ready, {1: 301}, area, range(0), "unit 3 holds 300 of the 301 positions of sequence 1"),
        (ready, {1: 301}, None, range(0), "unit 2 holds 0 of the 301"),
        (ready, {1: 301}, None, range(2, 3), "unit 3 holds 0 of the 301"),
        (ready, {1: 302}, area, range(0), "sequence 1 has the tokens of 301 positions here, not of 302"),
        (ready, {1: 300, 2: 5}, area, range(0), "sequence 2 has the tokens of 0 positions"),
        (ready, {1: -1}, area, range(0), "sequence 1 cannot keep -1 positions"),
        (None, {1: 302}, None, range(0), "has the tokens of 301 positions"),
        (other, {1: 300}, area, range(0), "the range is not prepared"),
        (ready, {1: 300}, giver.incoming(), range(0), "not of this stage"),
        (ready, {1: 300}, closed, range(0), "has been closed"),
    ):
        with pytest.raises(ValueError, match=why):
            taker.adopt(prepared, kept, incoming, lost)
        assert (taker.first, taker.last, taker.kv_bytes, length(taker, 1)) == (0, 2, before, 301)
    found += [two.step(1) for _ in range(2)]
    for unit in (2, 3):
        send(giver, area, 1, unit, 256, 303)
    taker.adopt(ready, {1: 303}, area)
    with pytest.raises(ValueError, match="the range is not prepared"):
        taker.adopt(ready, {1: 303})
    giver.adopt(other, {1: 303})
    found += [two.step(1) for _ in range(2)]
    assert found == expected


def test_what_was_prepared_is_forgotten_without_a_trace(model: Model, chain: Callable[..., Chain]) -> None:
    expected = alone(model, PROMPT, 6)
    two = chain((2,))
    two.open(1, PROMPT)
    found = [two.step(1) for _ in range(2)]
    for _ in range(3):
        before = [(stage.kv_bytes, stage._weights.units, stage._weights.nbytes) for stage in two.stages]
        taker, giver = two.stages
        area, ready = taker.incoming(), (taker.prepare(0, 4), taker.prepare(0, 5), giver.prepare(3, 5))
        send(giver, area, 1, 2, 0, 301)
        assert taker._weights.units == {0, 1, 2, 3, 4} and taker.kv_bytes == 2 * before[0][0]
        area.close()
        for prepared in ready:
            for stage in two.stages:
                stage.discard(prepared)
        assert [(s.kv_bytes, s._weights.units, s._weights.nbytes) for s in two.stages] == before
        with pytest.raises(ValueError, match="not prepared"):
            taker.adopt(ready[0], {1: 300})
    found += [two.step(1) for _ in range(4)]
    assert found == expected


def test_a_range_that_was_left_makes_room_for_the_next_and_sequences_go_on(
    model: Model, chain: Callable[..., Chain]
) -> None:
    expected = alone(model, PROMPT, 5)
    two = chain((2,))
    two.open(1, PROMPT)
    found = [two.step(1) for _ in range(2)]
    first, second = two.stages
    held, size = second.kv_bytes, first._weights.nbytes
    second.leave(4, 5)
    assert second._weights.units == {4} and second.kv_bytes == held
    with pytest.raises(ValueError, match="its weights are not loaded"):
        second.run([Run(1, 301, [5], Want.TOKEN, np.zeros((1, 72), np.float32))])
    second.discard(second.prepare(4, 5))  # a transition that was given up
    first.leave(0, 2)
    assert first._weights.units == {0, 1} and first._weights.nbytes == size
    two.move((3,))  # both get another range
    assert (first._weights.units, second._weights.units) == ({0, 1, 2}, {3, 4})
    found += [two.step(1) for _ in range(2)]
    second.leave(3, 5)
    two.move((3,))  # the same range again
    assert [*found, two.step(1)] == expected


def test_a_range_that_is_left_twice_keeps_only_what_the_later_plan_counts(model: Model) -> None:
    """Another node may be lost before the stage has its next range."""
    with Stage(model, 1, 5, OPTIONS) as stage:
        stage.leave(1, 4)
        assert stage._weights.units == {1, 2, 3}
        stage.leave(3, 5)
        assert stage._weights.units == {3}


def test_sequences_that_begin_alike_share_pages_where_they_arrive(model: Model) -> None:
    """What is sent of the source later does not change what the other one has."""
    giver, taker = Stage(model, 0, 3, OPTIONS), Stage(model, 3, 5, OPTIONS)
    ids = [*PROMPT, *PROMPT]
    with giver, taker:
        for stage in (giver, taker):
            stage.open_sequence(0, LIVELY, 400)
        hidden = giver.run([Run(0, 0, ids[:200], Want.NOTHING)])[0].hidden
        taker.run([Run(0, 0, ids[:200], Want.NOTHING, hidden)])
        hidden = giver.run([Run(0, 200, ids[200:400], Want.NOTHING)])[0].hidden
        taker.run([Run(0, 200, ids[200:400], Want.NOTHING, hidden)])
        for stage in (giver, taker):
            stage.fork_sequence(0, 1, 320)
        area, prepared = taker.incoming(), taker.prepare(2, 5)
        send(giver, area, 0, 2, 0, 320)
        before = taker.kv_bytes
        area.share(1, 0, [2], 320)
        each = page_bytes(model.program.units[2].states[0], model.kv_dtype)
        assert taker.kv_bytes - before == each  # the part of the second page alone
        send(giver, area, 0, 2, 64, 400)  # sent again, so copied
        assert taker.kv_bytes - before == 2 * each
        taker.adopt(prepared, {0: 400, 1: 320}, area)
        for sequence in (0, 1):
            first, last = 0, 320
            there = taker.export_positions(sequence, 2, first, last)
            assert there == giver.export_positions(sequence, 2, first, last)
        used = taker.kv_bytes
        taker.close_sequence(0)
        taker.close_sequence(1)
        assert taker.kv_bytes == 0 < used


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"source": 7}, "nothing of sequence 7 has arrived"),
        ({"sequence": 0}, "nothing of sequence 0 has arrived"),
        ({"units": []}, "nothing of sequence 0 has arrived"),
        ({"units": [2, 1]}, "unit 1 has 0 of the 128 positions"),
        ({"positions": 129}, "unit 2 has 128 of the 129 positions"),
        ({"positions": 0}, "nothing of sequence 0 has arrived"),
    ],
)
def test_what_has_not_arrived_is_not_shared(model: Model, change: dict[str, object], words: str) -> None:
    with Stage(model, 0, 3, OPTIONS) as giver, Stage(model, 3, 5, OPTIONS) as taker:
        giver.open_sequence(0, LIVELY, 400)
        giver.run([Run(0, 0, PROMPT[:128], Want.NOTHING)])
        area = taker.incoming()
        send(giver, area, 0, 2, 0, 128)
        where: dict[str, object] = {"sequence": 1, "source": 0, "units": [2], "positions": 128}
        with pytest.raises(ValueError, match=words):
            area.share(**(where | change))  # type: ignore[arg-type]
        area.close()
        assert taker.kv_bytes == 0


@pytest.mark.parametrize("again", [False, True])
def test_sequences_that_are_said_to_begin_alike_have_the_same_tokens(model: Model, again: bool) -> None:
    """Unless one of them has been sent again since."""
    with Stage(model, 0, 3, OPTIONS) as giver, Stage(model, 3, 5, OPTIONS) as taker:
        for sequence, tokens in ((0, PROMPT[:128]), (1, [*PROMPT[:100], *PROMPT[:28]])):
            for stage in (giver, taker):
                stage.open_sequence(sequence, LIVELY, 400)
            hidden = giver.run([Run(sequence, 0, tokens, Want.NOTHING)])[0].hidden
            taker.run([Run(sequence, 0, tokens, Want.NOTHING, hidden)])
        area, prepared = taker.incoming(), taker.prepare(2, 5)
        send(giver, area, 0, 2, 0, 128)
        area.share(1, 0, [2], 128)
        if again:
            send(giver, area, 1, 2, 64, 128)
            taker.adopt(prepared, {0: 128, 1: 128}, area)
            assert taker.export_positions(1, 2, 0, 128) == giver.export_positions(1, 2, 0, 128)
        else:
            with pytest.raises(ValueError, match="sequences 1 and 0 share 128 positions, and their tokens"):
                taker.adopt(prepared, {0: 128, 1: 128}, area)
            taker.adopt(prepared, {0: 128, 1: 100}, area)  # alike so far
