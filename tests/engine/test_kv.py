"""The pool of pages keeps its promise, and sequences share, fork, export and import what they hold."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from shoal.engine import memory
from shoal.engine.arrays import F32
from shoal.engine.batch import Run, Sampling, Want
from shoal.engine.errors import ContextError
from shoal.engine.generate import generate
from shoal.engine.kv import Page, PagePool, SequenceKv
from shoal.engine.kv_page import page_bytes
from shoal.engine.layout import CHUNK, PAGE
from shoal.engine.memory import HUGE_PAGE
from shoal.engine.model_directory import Model
from shoal.engine.program import KvState
from shoal.engine.stage import Stage, StageOptions

LARGE = KvState("kv", 8, 64)  # a page of f32 has 1 MB
MIB = 1 << 20


def resident() -> int:
    """Bytes of RAM that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * memory.mmap.PAGESIZE


@pytest.mark.parametrize("seed", range(5))
def test_whatever_happens_the_pool_keeps_its_limit_and_its_pages_apart(seed: int) -> None:
    rng, limit, sizes = random.Random(seed), 24 * MIB, (192 << 10, 104_448)
    pool, pages = PagePool("f16", limit), list[tuple[Page, int]]()
    refused = 0
    for step in range(3000):
        if rng.random() < (0.65, 0.4)[step // 500 % 2]:
            size = sizes[0] if rng.random() < 0.9 else sizes[1]
            try:
                page = pool.take(size, first=rng.random() < 0.4)
            except ContextError:
                refused += 1
                assert pool.used + 2 * size > limit - MIB
                continue
            page.bytes[[0, -1]] = len(pages) % 251
            pages.append((page, len(pages) % 251))
        elif pages:
            page, mark = pages.pop(rng.randrange(len(pages)))
            assert page.bytes[0] == page.bytes[-1] == mark
            pool.give(page)
        if step == 2000:
            pool.limit = limit = 18 * MIB
        assert pool.used == sum(page.bytes.nbytes for page, _ in pages) <= pool.held
        assert pool.held <= limit or pool.held <= pool.used + 2 * HUGE_PAGE  # pages in use are not taken away
    assert refused
    spans = sorted((page.address, page.address + page.bytes.nbytes) for page, _ in pages)
    assert all(a_end <= b for (_, a_end), (b, _) in pairwise(spans))


@pytest.mark.parametrize("size", [104_448, 196_608, 1_048_576, 3 << 20])
@pytest.mark.parametrize("seed", range(3))
def test_as_many_pages_fit_as_the_limit_has_room_for(size: int, seed: int) -> None:
    """A plan counts on them to the last, whichever are first pages."""
    rng, n = random.Random(seed), (70 << 20) // size
    pool = PagePool("f16", n * size + rng.randrange(size))
    pages = [pool.take(size, first=rng.random() < 0.5) for _ in range(n)]
    with pytest.raises(ContextError, match="promise more RAM"):
        pool.take(size, first=False)
    for page in pages[: n // 2]:
        pool.give(page)
    for _ in range(n // 2):
        pool.take(size, first=rng.random() < 0.5)
    assert pool.used == n * size == sum(page.bytes.nbytes for page in pages) <= pool.held
    assert pool.limit is not None and pool.held <= pool.limit


def test_the_pool_takes_no_more_memory_than_it_counts() -> None:
    size, before = 196_608, resident()
    pool = PagePool("f16", 40 * size)
    for i in range(40):
        pool.take(size, first=i % 3 == 0).bytes[:] = 1
        assert resident() - before <= pool.held + MIB
    assert pool.held <= 40 * size


def test_first_pages_serve_long_contexts_and_long_ones_first_pages() -> None:
    """Nineteen short contexts, then a long one, in the memory of twenty pages."""
    pool = PagePool("f32", 20 * MIB)
    short = [SequenceKv(pool, [[LARGE]], 20 * PAGE) for _ in range(19)]
    for kv in short:
        kv.arrange(0, 1)
        kv.prepare(0, 1)
    for kv in short:
        kv.truncate(0)
    long = SequenceKv(pool, [[LARGE]], 30 * PAGE)
    long.arrange(0, 1)
    long.prepare(0, 20 * PAGE)
    assert pool.used == 20 * MIB >= pool.held
    with pytest.raises(ContextError, match="promise more RAM"):
        long.prepare(20 * PAGE, 20 * PAGE + 1)
    long.truncate(0)
    for kv in short:
        kv.prepare(0, 1)
    assert pool.used == 19 * MIB


def test_a_short_context_takes_the_memory_that_it_fills(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    advise = memory._in_huge_pages

    def noting(mapping: memory.mmap.mmap, first: int, huge: int) -> None:
        asked.append(huge)
        advise(mapping, first, huge)

    monkeypatch.setattr(memory, "_in_huge_pages", noting)
    pool, before = PagePool("f32"), resident()
    sequences = [SequenceKv(pool, [[LARGE]], 2 * PAGE) for _ in range(30)]
    row = np.ones((1, LARGE.kv_heads, LARGE.head_dim), np.float32)
    for kv in sequences:
        kv.arrange(0, 1)
        kv.prepare(0, 8)
        for position in range(8):
            kv.write(0, position, row, row)
    assert pool.used == 30 * MIB
    assert resident() - before < 12 * MIB  # of each page the keys of one chunk and a few values
    assert asked == [0]
    sequences[0].ran(8)
    sequences[0].prepare(8, PAGE + 1)
    assert len(asked) == 2 and asked[1] >= HUGE_PAGE


def test_a_lower_limit_gives_free_pages_back_to_the_system() -> None:
    pool = PagePool("f32", 64 * MIB)
    pages = [pool.take(MIB, first=first) for first in (True, False) for _ in range(16)]
    for page in pages:
        page.bytes[:] = 1
    before = resident()
    for page in pages[2:]:
        pool.give(page)
    pool.limit = 8 * MIB
    assert pool.used == 2 * MIB and pool.held <= 8 * MIB
    assert before - resident() > 20 * MIB
    again = [pool.take(MIB, first=False) for _ in range(6)]
    for page in again:
        page.bytes[:] = 2
    assert all((page.bytes == 1).all() for page in pages[:2])
    with pytest.raises(ContextError):
        pool.take(MIB, first=True)


def test_pages_of_another_size_make_room() -> None:
    pool = PagePool("f32", 8 * MIB)
    for page in [pool.take(MIB, first=True) for _ in range(8)]:
        pool.give(page)
    for _ in range(3):
        pool.take(2 * MIB, first=True).bytes[:] = 1
    assert pool.held <= 8 * MIB


@pytest.fixture
def stage(tiny_quantised: Model) -> Iterator[Stage]:
    with Stage(tiny_quantised, 0, 5, StageOptions("native", threads=1, max_wanted=256)) as stage:
        yield stage


def tokens(n: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 267, n).tolist()  # type: ignore[no-any-return]


def logits(stage: Stage, sequence: int, first: int, ids: list[int]) -> F32:
    found = []
    for at in range(0, len(ids), 200):
        (result,) = stage.run([Run(sequence, first + at, ids[at : at + 200], Want.LOGITS)])
        assert result.logits is not None
        found.append(result.logits)
    return np.concatenate(found)


@pytest.mark.parametrize("at", [1, 63, PAGE - 1, PAGE, PAGE + 40, PAGE + 180])
def test_a_fork_shares_full_pages_and_neither_disturbs_the_other(stage: Stage, at: int) -> None:
    ids, other = tokens(PAGE + 200), tokens(70, 1)
    stage.open_sequence(0)
    alone = logits(stage, 0, 0, ids)
    stage.open_sequence(9)
    branch = logits(stage, 9, 0, ids[:at] + other)[at:]
    stage.close_sequence(9)
    held, page = stage.kv_bytes, stage.kv_bytes // 6  # three layers of two pages
    assert stage.fork_sequence(0, 1, at) == 1
    assert stage.kv_bytes - held == (3 * page if at % PAGE else 0)
    assert logits(stage, 1, at, other).tobytes() == branch.tobytes()
    again = max(at - 70, 0)  # the source goes back behind the fork, into pages that are shared
    assert logits(stage, 0, again, ids[again:]).tobytes() == alone[again:].tobytes()
    assert logits(stage, 1, at, other).tobytes() == branch.tobytes()
    back = max(at - 30, 0)  # and so does the fork
    assert logits(stage, 1, back, ids[back:at] + other)[at - back :].tobytes() == branch.tobytes()
    assert logits(stage, 0, PAGE, ids[PAGE:]).tobytes() == alone[PAGE:].tobytes()
    stage.close_sequence(0)
    assert logits(stage, 1, at, other).tobytes() == branch.tobytes()
    stage.close_sequence(1)
    assert stage.kv_bytes == 0


def test_forks_that_cannot_be(stage: Stage) -> None:
    stage.open_sequence(0)
    logits(stage, 0, 0, tokens(100))
    for positions in (-1, 101):
        with pytest.raises(ValueError, match="holds 100 positions"):
            stage.fork_sequence(0, 1, positions)
    with pytest.raises(ValueError, match="sequence 0 is already open"):
        stage.fork_sequence(0, 0)
    with pytest.raises(KeyError):
        stage.fork_sequence(7)
    with pytest.raises(ContextError, match="exceed the context of 99"):
        stage.fork_sequence(0, context=99)
    with pytest.raises(ContextError, match="not between 1 and the model's"):
        stage.fork_sequence(0, context=1 << 20)
    with pytest.raises(ValueError, match="token id is not in"):
        stage.fork_sequence(0, sampling=Sampling(bias=((1 << 20, 1.0),)))
    assert stage.fork_sequence(0) < 0


def test_a_fork_has_its_own_sampling_and_context(stage: Stage) -> None:
    ids, lively = tokens(PAGE + 30), Sampling(temperature=1.3, repetition_penalty=1.4, seed=5)
    stage.open_sequence(0, context=PAGE + 30)
    logits(stage, 0, 0, ids)
    at = PAGE + 29
    stage.fork_sequence(0, 1, at, lively, context=2 * PAGE)
    stage.fork_sequence(1, 2)
    expected = list(generate(stage, ids, lively, max_tokens=40, end=()))
    for sequence in (1, 2):
        found, position, row = list[int](), at, ids[at:]
        while len(found) < 40:
            (result,) = stage.run([Run(sequence, position, row, Want.TOKEN)])
            assert result.token is not None
            found, position, row = [*found, result.token], position + len(row), [result.token]
        assert found == expected
    with pytest.raises(ContextError, match="more than its context of"):
        stage.run([Run(0, at + 1, [1], Want.TOKEN)])


def test_a_fork_without_room_takes_nothing(tiny_int8: Model) -> None:
    page = page_bytes(tiny_int8.program.units[1].states[0], "f16")
    with Stage(tiny_int8, 0, 5, StageOptions(kv_bytes=8 * page)) as stage:
        stage.open_sequence(0)
        stage.run([Run(0, 0, tokens(PAGE), Want.NOTHING)])
        stage.run([Run(0, PAGE, tokens(1), Want.NOTHING)])
        with pytest.raises(ContextError, match="promise more RAM"):
            stage.fork_sequence(0, 1)
        assert stage.kv_bytes == 6 * page
        stage.fork_sequence(0, 1, PAGE)
        with pytest.raises(ContextError, match="promise more RAM"):
            stage.run([Run(1, 5, tokens(1), Want.NOTHING)])  # three copies, and room for two
        assert stage.positions(1, 1) == 5
        stage.close_sequence(1)
        (whole,) = stage.run([Run(0, PAGE, tokens(1), Want.TOKEN)])
        assert whole.token is not None


@pytest.mark.parametrize("n", [1, 64, 65, PAGE, PAGE + 100])
def test_exported_positions_are_the_same_elsewhere(stage: Stage, n: int) -> None:
    ids, more = tokens(n), tokens(20, 1)
    stage.open_sequence(0)
    logits(stage, 0, 0, ids)
    sampling = Sampling(repetition_penalty=1.3, temperature=0.9, seed=3)
    with Stage(stage.model, 0, 5, StageOptions("native", threads=2, max_wanted=256)) as other:
        other.open_sequence(5, sampling, history=ids)
        with pytest.raises(ValueError, match=f"unit 1 holds 0 of the {n} positions"):
            other.run([Run(5, n, more, Want.TOKEN)])
        for unit in (3, 1, 2):
            step = max(CHUNK, n // 2)  # in two parts, of which the second may begin within a chunk
            for first in range(0, n, step):
                last = min(first + step, n)
                data = stage.export_positions(0, unit, first, last)
                state = stage.model.program.units[unit].states[0]
                chunks = -(-last // CHUNK) - first // CHUNK
                assert len(data) == chunks * page_bytes(state, stage.model.kv_dtype) // 4
                other.import_positions(5, unit, first, last, data)
            assert other.positions(5, unit) == n
            assert other.export_positions(5, unit, 0, n) == stage.export_positions(0, unit, 0, n)
        assert logits(other, 5, n, more).tobytes() == logits(stage, 0, n, more).tobytes()


def test_what_a_page_held_before_is_not_exported(stage: Stage) -> None:
    stage.open_sequence(0)
    logits(stage, 0, 0, tokens(PAGE))
    stage.close_sequence(0)
    with Stage(stage.model, 0, 5, StageOptions("native")) as fresh:
        for one in (stage, fresh):
            one.open_sequence(1)
            one.run([Run(1, 0, tokens(70, 2), Want.NOTHING)])
        for unit in (1, 2, 3):
            assert stage.export_positions(1, unit, 0, 70) == fresh.export_positions(1, unit, 0, 70)


def test_imports_that_are_refused_change_nothing(stage: Stage) -> None:
    stage.open_sequence(0)
    logits(stage, 0, 0, tokens(70))
    data = stage.export_positions(0, 2, 0, 70)
    stage.open_sequence(1, history=tokens(70))
    for unit, first, last, sent, why in (
        (2, 0, 70, data[:-1], "bytes cannot be positions"),
        (2, 0, 64, data, "bytes cannot be positions"),
        (2, 64, 70, data[len(data) // 2 :], "do not follow the 0"),
        (2, 5, 5, b"", "do not follow"),
        (2, 0, 71, data, "has the tokens of 70 positions"),
        (0, 0, 70, data, "unit 0 has no keys"),
        (9, 0, 70, data, "unit 9 has no keys"),
        (-1, 0, 70, data, "unit -1 has no keys"),
        (2, 0, 70, b"\xff" * len(data), "not finite"),
    ):
        with pytest.raises(ValueError, match=why):
            stage.import_positions(1, unit, first, last, sent)
        assert stage.positions(1, 2) == 0
    with pytest.raises(KeyError):
        stage.import_positions(8, 2, 0, 70, data)
    for first, last in ((0, 71), (-1, 5), (5, 5), (0, 0)):
        with pytest.raises(ValueError, match="unit 2 holds 70 positions"):
            stage.export_positions(0, 2, first, last)
    stage.import_positions(1, 2, 0, 70, memoryview(data))
    with pytest.raises(ContextError, match="history of 9 tokens"):
        stage.open_sequence(2, context=8, history=[1] * 9)
    with pytest.raises(ValueError, match="token id"):
        stage.open_sequence(2, history=[267])


def test_minus_128_is_refused(tiny_quantised: Model) -> None:
    if tiny_quantised.kv_dtype != "int8":
        return
    with Stage(tiny_quantised, 1, 2) as stage:
        stage.open_sequence(0, history=[1])
        state = tiny_quantised.program.units[1].states[0]
        data = bytearray(page_bytes(state, "int8") // 4)
        stage.import_positions(0, 1, 0, 1, bytes(data))
        data[0] = 0x80
        with pytest.raises(ValueError, match="of another type"):
            stage.import_positions(0, 1, 0, 1, bytes(data))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_random_operations_equal_a_prefill_of_the_same_tokens(stage: Stage, seed: int) -> None:
    """Two stages of the same model; what each sequence should hold is a list of tokens."""
    rng = random.Random(seed)
    held: list[dict[int, list[int]]] = [{}, {}]
    with Stage(stage.model, 0, 5, StageOptions("native", threads=2, max_wanted=256)) as other:
        stages = (stage, other)

        def fresh(ids: list[int]) -> F32:
            number = other.open_sequence(None)
            try:
                return logits(other, number, 0, ids)[-1]
            finally:
                other.close_sequence(number)

        for number in range(60):
            s = rng.randrange(2)
            known, here = held[s], stages[s]
            names = sorted(known)
            kind = rng.choice(("open", "run", "run", "run", "fork", "move", "close")) if names else "open"
            which = rng.choice(names) if names else 0
            match kind:
                case "open":
                    here.open_sequence(number)
                    known[number] = []
                case "close":
                    here.close_sequence(which)
                    del known[which]
                case "fork":
                    n = rng.randint(0, len(known[which]))
                    here.fork_sequence(which, number, n)
                    known[number] = known[which][:n]
                case "move":
                    there, ids = stages[1 - s], known.pop(which)
                    there.open_sequence(number, history=ids)
                    for unit in (1, 2, 3):
                        if ids:
                            data = here.export_positions(which, unit, 0, len(ids))
                            there.import_positions(number, unit, 0, len(ids), data)
                    here.close_sequence(which)
                    held[1 - s][number] = ids
                case "run":
                    first = rng.choice((len(known[which]), rng.randint(0, len(known[which]))))
                    more = tokens(rng.choice((1, 3, 60, 200)), rng.randrange(99))
                    if first + len(more) > 512:
                        continue
                    known[which] = known[which][:first] + more
                    found = logits(here, which, first, more)[-1]
                    assert found.tobytes() == fresh(known[which]).tobytes(), (seed, number)
        for here, known in zip(stages, held, strict=True):
            for name in known:
                here.close_sequence(name)
            assert here.kv_bytes == 0


def test_two_sequences_of_one_batch_may_share_pages(stage: Stage) -> None:
    ids = tokens(PAGE + 10)
    alone = list(generate(stage, ids, max_tokens=6, end=()))
    stage.open_sequence(0)
    logits(stage, 0, 0, ids[:-1])
    for n in (1, 2, 3):
        stage.fork_sequence(0, n)
    last, at = [ids[-1]] * 4, len(ids) - 1
    for token in alone:
        results = stage.run([Run(n, at, [last[n]], Want.TOKEN) for n in range(4)])
        last, at = [result.token or 0 for result in results], at + 1
        assert last == [token] * 4
