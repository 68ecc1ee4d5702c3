"""Rows that a stage has returned are kept as far as there is room, and are those of the run that was last."""

from __future__ import annotations

import os
import random
from typing import Any

import numpy as np
import pytest

from shoal.engine.arrays import F32
from shoal.engine.batch import Run, Want
from shoal.engine.errors import ContextError
from shoal.engine.kept_rows import KeptRows
from shoal.engine.kv import PagePool
from shoal.engine.kv_page import page_bytes
from shoal.engine.layout import CHUNK, PAGE
from shoal.engine.model_directory import Model
from shoal.engine.stage import Stage, StageOptions

OPTIONS = StageOptions("native", threads=1, keep_rows=True)
COLS = 72
BLOCK = 5 * 4096  # of CHUNK rows


def tokens(n: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 267, n).tolist()  # type: ignore[no-any-return]


def run(stage: Stage, sequence: int, first: int, ids: list[int], part: tuple[int, int] | None = None) -> F32:
    found = []
    for at in range(0, len(ids), 200):
        (result,) = stage.run([Run(sequence, first + at, ids[at : at + 200], Want.NOTHING, None, part)])
        assert result.hidden is not None
        found.append(result.hidden)
    return np.concatenate(found)


def test_rows_are_kept_as_they_were_returned_and_follow_the_sequence(tiny_int8: Model) -> None:
    with Stage(tiny_int8, 0, 3, OPTIONS) as stage:
        stage.open_sequence(1)
        rows = run(stage, 1, 0, tokens(300))
        for first in (300, 301, 302):
            rows = np.concatenate([rows, run(stage, 1, first, [first % 267])])
        assert stage.rows_kept(1, 3) == 303
        for first, last in ((0, 303), (5, 6), (63, 65), (64, 128), (302, 303), (0, 64)):
            assert stage.kept_rows(1, 3, first, last).tobytes() == rows[first:last].tobytes()
        for first, last in ((0, 304), (-1, 3), (4, 4), (303, 304)):
            with pytest.raises(ValueError, match=r"are not kept: 303 are"):
                stage.kept_rows(1, 3, first, last)
        with pytest.raises(ValueError, match="are not kept: 0 are"):
            stage.kept_rows(1, 2, 0, 1)
        rows[100:110] = run(stage, 1, 100, tokens(10, 1))  # goes back, and on with other tokens
        assert stage.rows_kept(1, 3) == 110
        assert stage.kept_rows(1, 3, 0, 110).tobytes() == rows[:110].tobytes()
        run(stage, 1, 90, tokens(1))
        executor = stage._executor

        def failing(*_: Any) -> Any:
            raise FloatingPointError

        original, executor.run = executor.run, failing  # type: ignore[method-assign]
        with pytest.raises(FloatingPointError):
            run(stage, 1, 80, tokens(4))
        executor.run = original  # type: ignore[method-assign]
        assert stage.rows_kept(1, 3) == 80
        stage.adopt(None, {1: 70})
        assert stage.rows_kept(1, 3) == 70
        stage.close_sequence(1)
        assert stage.rows_kept(1, 3) == stage._kept.bytes == 0


def test_without_the_option_and_at_the_end_of_the_model_nothing_is_kept(tiny_int8: Model) -> None:
    for last, options in ((3, StageOptions("native", threads=1)), (5, OPTIONS)):
        with Stage(tiny_int8, 0, last, options) as stage:
            stage.open_sequence(1)
            stage.run([Run(1, 0, tokens(80), Want.NOTHING)])
            assert stage.rows_kept(1, last) == 0
            assert stage._kept.bytes == 0


def test_rows_into_another_unit_last_until_the_sequence_goes_on(tiny_int8: Model) -> None:
    """The stage grows over units that are lost: it fills them with the rows that it has kept."""
    with Stage(tiny_int8, 0, 2, OPTIONS) as stage, Stage(tiny_int8, 0, 4, OPTIONS) as whole:
        for n in (1, 2):
            stage.open_sequence(n)
            rows = run(stage, n, 0, tokens(150))
        whole.open_sequence(1)
        expected = run(whole, 1, 0, tokens(150))
        stage.adopt(stage.prepare(0, 4), {1: 150, 2: 150}, lost=range(2, 4))
        for first in (0, 100):
            last = min(first + 100, 150)
            kept = stage.kept_rows(1, 2, first, last)
            assert kept.tobytes() == rows[first:last].tobytes()
            stage.run([Run(1, first, tokens(150)[first:last], Want.NOTHING, kept, (2, 4))])
        assert [stage.rows_kept(1, u) for u in (2, 4)] == [150, 150]
        assert stage.kept_rows(1, 4, 0, 150).tobytes() == expected.tobytes()
        run(stage, 1, 150, [7])
        assert [stage.rows_kept(1, u) for u in (2, 4)] == [0, 151]
        assert stage.rows_kept(2, 2) == 150
        run(stage, 2, 0, tokens(150), (0, 3))  # ends before the end of the range: nothing to keep
        assert [stage.rows_kept(2, u) for u in (2, 3, 4)] == [150, 0, 0]
        stage.adopt(stage.prepare(0, 3), {2: 150}, lost=range(3))
        run(stage, 2, 100, tokens(150)[100:], (0, 3))  # without those before, these are of no use
        assert [stage.rows_kept(2, u) for u in (2, 3)] == [150, 0]


def test_rows_are_the_first_to_go_and_answers_have_all_the_room(tiny_int8: Model) -> None:
    page = page_bytes(tiny_int8.program.units[1].states[0], "f16")
    n = 6
    options = StageOptions("native", threads=1, keep_rows=True, kv_bytes=2 * n * page)
    with Stage(tiny_int8, 0, 3, options) as stage:
        for sequence in range(n):
            stage.open_sequence(sequence)
            run(stage, sequence, 0, tokens(PAGE))
        run(stage, 1, PAGE - 1, [1])
        assert stage.kv_bytes == 2 * n * page <= stage._pool.held <= 2 * n * page
        stage.open_sequence(9)
        with pytest.raises(ContextError, match="promise more RAM"):
            run(stage, 9, 0, [1])
        assert sum(stage.rows_kept(sequence, 3) for sequence in range(n)) == stage._kept.bytes == 0


def test_the_sequence_that_was_run_least_recently_goes_first() -> None:
    pool = PagePool("f16", 32 * BLOCK)
    kept = KeptRows(pool, COLS)
    pool.spare = kept.drop_one
    rows = np.ones((CHUNK, COLS), np.float32)
    for sequence in range(4):
        kept.note(sequence, 3, 0, rows * sequence, part=False)
        kept.note(sequence, 3, CHUNK, rows, part=False)
    kept.note(0, 3, 2 * CHUNK, rows, part=False)
    assert [kept.positions(n, 3) for n in range(4)] == [192, 0, 128, 128]
    kept.note(3, 3, 2 * CHUNK, rows, part=False)
    assert [kept.positions(n, 3) for n in range(4)] == [192, 0, 128, 192]  # a quarter of the room
    kept.note(3, 3, 128, rows[:1], part=False)
    kept.note(0, 3, 191, rows[:1], part=False)
    page = pool.take(BLOCK, first=False)
    assert [kept.positions(n, 3) for n in range(4)] == [192, 0, 128, 129]
    pool.limit = 4 * BLOCK
    assert [kept.positions(n, 3) for n in range(4)] == [192, 0, 0, 0]
    kept.note(0, 3, 3 * CHUNK, rows, part=False)  # no room, and nothing but itself could go
    assert kept.positions(0, 3) == 192
    assert (kept.rows(0, 3, 0, CHUNK) == 0).all()
    pool.limit = 2 * BLOCK
    assert (kept.positions(0, 3), kept.bytes, pool.used) == (0, 0, BLOCK)
    with pytest.raises(ContextError):
        pool.take(2 * BLOCK, first=True)
    pool.give(page)


@pytest.mark.parametrize("seed", range(3))
def test_whatever_runs_the_rows_are_those_of_the_last_run_of_each_position(seed: int) -> None:
    rng = random.Random(seed)
    pool = PagePool("f16", 40 * BLOCK)
    kept, known = KeptRows(pool, COLS), dict[int, F32]()
    for _ in range(400):
        sequence = rng.randrange(4)
        before = known.get(sequence, np.zeros((0, COLS), np.float32))
        match rng.choice(("run", "run", "run", "part", "truncate", "forget")):
            case "run":
                first = rng.choice((len(before), rng.randint(0, len(before))))
                rows = np.random.default_rng(rng.randrange(99)).random(
                    (rng.choice((1, 50)), COLS), np.float32
                )
                kept.note(sequence, 3, first, rows, part=False)
                known[sequence] = np.concatenate([before[:first], rows])
            case "part" if len(before):
                first = rng.randrange(len(before))
                kept.note(sequence, 3, first, before[first : first + 30], part=True)
            case "truncate":
                kept.truncate(sequence, len(before) // 2)
                known[sequence] = before[: len(before) // 2]
            case "forget":
                kept.forget(sequence)
                known.pop(sequence, None)
        held = kept.positions(sequence, 3)
        assert held in (0, len(known.get(sequence, ())))
        if held:
            assert kept.rows(sequence, 3, 0, held).tobytes() == known[sequence].tobytes()
        elif sequence in known:
            kept.forget(sequence)
            del known[sequence]
        assert pool.held == kept.bytes <= 40 * BLOCK
    kept.keep({})
    assert pool.held == kept.bytes == 0


def test_a_forked_process_has_rows_of_its_own() -> None:
    kept = KeptRows(PagePool("f16"), COLS)
    kept.note(1, 3, 0, np.ones((4, COLS), np.float32), part=False)
    child = os.fork()
    if child == 0:
        kept.unlock()
        kept.note(1, 3, 0, np.zeros((4, COLS), np.float32), part=False)
        os._exit(int(kept.rows(1, 3, 0, 4).any()))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert (kept.rows(1, 3, 0, 4) == 1).all()


def test_rows_that_are_noted_for_later_are_there_for_whoever_looks() -> None:
    rows = np.arange(4 * COLS, dtype=np.float32).reshape(4, COLS)
    for look in ("settle", "positions", "rows", "truncate", "keep", "note"):
        kept = KeptRows(PagePool("f16"), COLS)
        kept.note_later(1, 3, 0, rows[:3], part=False)
        kept.note_later(1, 3, 2, rows[3:], part=False)
        assert kept.bytes == 0
        match look:
            case "settle":
                kept.settle()
            case "positions":
                assert kept.positions(1, 3) == 3
            case "rows":
                assert kept.rows(1, 3, 0, 3).tobytes() == rows[[0, 1, 3]].tobytes()
            case "truncate":
                kept.truncate(1, 3)
            case "keep":
                kept.keep({1: 3})
            case "note":
                kept.note(2, 3, 0, rows, part=False)
        assert kept.bytes == BLOCK * (2 if look == "note" else 1)
        assert kept.rows(1, 3, 0, 3).tobytes() == rows[[0, 1, 3]].tobytes()
        kept.note_later(1, 3, 3, rows[:1], part=False)
        kept.forget(1)
        assert kept.positions(1, 3) == 0
