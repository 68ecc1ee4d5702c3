"""Parts of a range that run alone, ranges that are prepared while others run, and copies that are held."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tests.patience import LIMIT

from shoal.engine.batch import Run, Sampling, Want
from shoal.engine.errors import ContextError, ModelFileError
from shoal.engine.generate import generate
from shoal.engine.kv_page import page_bytes
from shoal.engine.layout import PAGE
from shoal.engine.model_directory import Model, unit_file
from shoal.engine.stage import Stage, StageOptions

OPTIONS = StageOptions("native", threads=1, max_wanted=256)
PROMPT: list[int] = np.random.default_rng(0).integers(0, 267, 300).tolist()
LIVELY = Sampling(temperature=1.1, repetition_penalty=1.2, seed=5)
LAYERS = range(1, 4)


def test_parts_that_cannot_run_are_refused_and_nothing_is_lost(tiny_int8: Model) -> None:
    with Stage(tiny_int8, 1, 4, OPTIONS) as stage:
        for n in (1, 2):
            stage.open_sequence(n, context=100)
        rows = np.random.default_rng(3).standard_normal((90, 72)).astype(np.float32)
        (whole,) = stage.run([Run(1, 0, PROMPT[:80], Want.NOTHING, rows[:80])])
        held = [stage.export_positions(1, u, 0, 80) for u in LAYERS]

        def part(first: int, tokens: list[int], part: tuple[int, int], sequence: int = 1) -> Run:
            return Run(sequence, first, tokens, Want.NOTHING, rows[first : first + len(tokens)], part)

        for batch, why in (
            ([part(0, PROMPT[:8], (0, 1))], r"units \(0, 1\) are not of this stage, which has \[1, 4\)"),
            ([part(0, PROMPT[:8], (4, 9))], "are not of this stage"),
            ([part(0, PROMPT[:8], (3, 3))], "are not of this stage"),
            ([part(0, PROMPT[:8], (2, 1))], "are not of this stage"),
            ([part(81, PROMPT[:8], (1, 3))], "holds 80 positions and cannot run 8 rows from position 81"),
            ([part(0, PROMPT[:8], (1, 3)), part(0, [1], (2, 3), 2)], "of different parts"),
            ([part(0, PROMPT[:8], (1, 3)), Run(2, 0, [1], Want.NOTHING, rows[:1])], "of different parts"),
            ([Run(1, 0, PROMPT[:8], Want.NOTHING, None, (2, 3))], r"units \[2, 3\) needs hidden rows"),
        ):
            with pytest.raises(ValueError, match=why):
                stage.run(batch)
        with pytest.raises(FloatingPointError):
            stage.run([Run(1, 0, PROMPT[:8], Want.NOTHING, np.full((8, 72), np.nan, np.float32), (1, 3))])
        with pytest.raises(ContextError, match="more than its context"):
            stage.run([part(80, PROMPT[:21], (1, 3))])
        assert held == [stage.export_positions(1, u, 0, 80) for u in LAYERS]
        stage.run([part(70, PROMPT[70:90], (2, 3))])  # and some positions that are new
        assert [stage.positions(1, u) for u in LAYERS] == [80, 90, 80]
        assert stage._sequences[1].length == 90
        with pytest.raises(ValueError, match="unit 1 holds 80 of the 90 positions"):
            stage.run([Run(1, 90, [1], Want.NOTHING, rows[:1])])
        (again,) = stage.run([Run(1, 0, PROMPT[:80], Want.NOTHING, rows[:80])])
        assert again.hidden is not None and whole.hidden is not None
        assert again.hidden.tobytes() == whole.hidden.tobytes()


def test_a_part_does_not_write_to_pages_that_a_fork_shares(tiny_int8: Model) -> None:
    rows = np.random.default_rng(3).standard_normal((PAGE + 8, 72)).astype(np.float32)
    with Stage(tiny_int8, 1, 4, StageOptions("native", threads=1, max_rows=PAGE + 8)) as stage:
        stage.open_sequence(1)
        stage.run([Run(1, 0, [5] * (PAGE + 8), Want.NOTHING, rows)])
        stage.fork_sequence(1, 2)
        held = stage.export_positions(1, 2, 0, PAGE + 8)
        stage.run([Run(2, 0, [5] * (PAGE + 8), Want.NOTHING, -rows, (2, 3))])
        assert stage.export_positions(1, 2, 0, PAGE + 8) == held != stage.export_positions(2, 2, 0, PAGE + 8)


def test_executors_of_parts_are_few(tiny_int8: Model) -> None:
    """Each has a workspace, and what a part is comes from the network."""
    with Stage(tiny_int8, 0, 5, OPTIONS) as stage:
        stage.open_sequence(1)
        for _ in range(2):
            for enter in range(4):
                for until in range(enter + 1, 5):
                    rows = None if enter == 0 else np.ones((4, 72), np.float32)
                    stage.run([Run(1, 0, [1, 2, 3, 4], Want.NOTHING, rows, (enter, until))])
                    assert len(stage._running._parts) <= 2
        stage.run([Run(1, 0, [1, 2, 3, 4], Want.NOTHING, None, (-7, 99))])
        stage.set_range(0, 4)
        assert not stage._running._parts


def test_a_rehearsal_leaves_the_executors_of_parts_alone(tiny_int8: Model) -> None:
    """A refill goes on while the stage waits for rows, and each wait has many rehearsals."""
    with Stage(tiny_int8, 0, 5, OPTIONS) as stage:
        stage.open_sequence(1)
        stage.run([Run(1, 0, [1, 2, 3, 4], Want.NOTHING, None, (0, 2))])
        stage.run([Run(1, 0, [1, 2, 3, 4], Want.NOTHING)])
        held = dict(stage._running._parts)
        for _ in range(100):
            stage.rehearse(1)
        assert held and stage._running._parts == held
        stage.leave(0, 2)
        stage.rehearse(1)  # nothing can run


def test_the_executor_of_a_part_goes_where_keys_and_values_need_its_room(tiny_int8: Model) -> None:
    """It stays for more runs of its part, and counts towards the promise meanwhile."""
    four = [1, 2, 3, 4]
    with Stage(tiny_int8, 0, 5, StageOptions("native", threads=1, max_rows=8)) as stage:
        for number in (1, 2, 3):
            stage.open_sequence(number)
        stage.run([Run(1, 0, four, Want.NOTHING)])
        pages = stage._pool.held
        stage.run([Run(1, 0, four, Want.NOTHING, None, (0, 2))])
        stage.limit_kv(stage._pool.held + pages - 1)
        assert not stage._spare(), "it may run"
        stage.run([Run(2, 0, four, Want.NOTHING)])
        assert not stage._running._parts and stage._pool.held == 2 * pages
        with pytest.raises(ContextError, match="no room to compute a part"):
            stage.run([Run(1, 0, four, Want.NOTHING, None, (0, 2))])
        with pytest.raises(ContextError, match="keys and values have filled"):
            stage.run([Run(3, 0, four, Want.NOTHING)])


def test_a_range_that_cannot_be_prepared_changes_nothing(
    tiny_int8: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_file = Model.open_file

    def failing(model: Model, name: str, arena: Any = None) -> Any:
        if name == unit_file(3):
            raise ModelFileError(f"{name} is missing")
        return open_file(model, name, arena)

    monkeypatch.setattr(Model, "open_file", failing)
    with Stage(tiny_int8, 0, 2, OPTIONS) as stage:
        stage.hold([2])
        for use in (lambda: stage.prepare(0, 4), lambda: stage.hold([0, 3, 4]), lambda: stage.prepare(2, 5)):
            with pytest.raises(ModelFileError, match="is missing"):
                use()
            assert (stage._weights.units, stage.held) == ({0, 1, 2}, {2})
            assert (stage.first, stage.last) == (0, 2)
        for units in ([5], [-1], [1, 9]):
            with pytest.raises(ValueError, match="there is no unit"):
                stage.hold(units)
        for first, last in ((0, 6), (2, 2), (-1, 2)):
            with pytest.raises(ValueError, match="are not a range"):
                stage.prepare(first, last)
        executor = type(stage._ranges.backend).executor

        def without_memory(*_: Any) -> Any:
            raise MemoryError

        monkeypatch.setattr(type(stage._ranges.backend), "executor", without_memory)
        with pytest.raises(MemoryError):
            stage.prepare(0, 3)
        monkeypatch.setattr(type(stage._ranges.backend), "executor", executor)
        assert stage._weights.units == {0, 1, 2}


def test_copies_stay_whatever_the_range_is(tiny_int8: Model) -> None:
    with Stage(tiny_int8, 1, 3, OPTIONS) as stage:
        stage.hold([4, 2])
        assert (stage.held, stage._weights.units) == ({2, 4}, {1, 2, 4})
        size = stage._weights.nbytes
        held = stage._weights.of(4, 5)
        ready = stage.prepare(2, 5)
        assert stage._weights.units == {1, 2, 3, 4}
        assert all(stage._weights.of(4, 5)[key].data is held[key].data for key in held)
        stage.discard(ready)
        assert (stage._weights.units, stage._weights.nbytes) == ({1, 2, 4}, size)
        stage.adopt(stage.prepare(3, 5), {})
        assert stage._weights.units == {2, 3, 4}
        stage.set_range(0, 1)
        assert stage._weights.units == {0, 2, 4}
        stage.load(3, 4)
        stage.hold([4])
        assert stage._weights.units == {0, 3, 4}  # 3 until the range changes
        stage.set_range(0, 2)
        assert stage._weights.units == {0, 1, 4}
        stage.hold([])
        assert (stage.held, stage._weights.units) == (frozenset(), {0, 1})


def test_a_copy_of_the_head_and_the_embedding_it_is_tied_to_count_once(tiny_tied: Model) -> None:
    last = tiny_tied.n_units - 1
    with Stage(tiny_tied, 0, 1, OPTIONS) as stage:
        stage.hold([0, last])
        sizes = [tiny_tied.index.files[unit_file(u)].size for u in (0, last)]
        assert stage._weights.nbytes == sum(sizes)
        stage.adopt(stage.prepare(1, 2), {})
        assert stage._weights.nbytes == sum(sizes) + tiny_tied.index.files[unit_file(1)].size


def test_copies_have_the_room_that_is_left_and_go_when_it_is_needed(tiny_int8: Model) -> None:
    page = page_bytes(tiny_int8.program.units[1].states[0], "f16")
    sizes = {u: tiny_int8.index.files[unit_file(u)].size for u in range(5)}
    limit = 4 * page + sizes[3] + sizes[4] + 5000
    with Stage(tiny_int8, 1, 2, replace(OPTIONS, kv_bytes=limit, keep_rows=True)) as stage:
        for n in range(4):
            stage.open_sequence(n)
            stage.run([Run(n, 0, [1], Want.NOTHING, np.ones((1, 72), np.float32))])
        assert stage._kept.bytes > 0
        with pytest.raises(ValueError, match="there is no unit"):
            stage.hold([3, 5])
        stage._kept.keep({})
        stage.hold([3, 1, 4, 2])
        assert stage.held == {1, 3, 4}  # 1 is run, so it takes nothing, and 2 has no room
        assert stage._pool.held == 4 * page + sizes[3] + sizes[4]
        stage.open_sequence(5)
        stage.run([Run(5, 0, [1], Want.NOTHING, np.ones((1, 72), np.float32))])
        assert (stage.held, stage._weights.units) == ({1, 3}, {1, 3})  # the last in order went
        for n in range(6):
            stage.close_sequence(n)
        stage.hold([4, 3])
        ready = stage.prepare(1, 4, kv_bytes=page + sizes[4])  # 3 is counted by whoever says so
        assert (stage.held, stage._pool.limit) == ({3, 4}, page + sizes[4])
        stage.discard(ready)
        assert (stage.held, stage._weights.units) == ({4}, {1, 4})
        stage.limit_kv(limit)
        stage.hold([4, 3])
        stage.adopt(stage.prepare(4, 5), {}, kv_bytes=limit)
        assert (stage.held, stage._pool.held - stage._pool.used) == ({3, 4}, sizes[3])
        stage.adopt(stage.prepare(1, 3), {}, kv_bytes=page)
        assert (stage.held, stage._weights.units) == (frozenset(), {1, 2})


def test_a_part_without_room_for_its_workspace_is_refused(tiny_int8: Model) -> None:
    page = page_bytes(tiny_int8.program.units[1].states[0], "f16")
    rows = np.ones((4, 72), np.float32)
    with Stage(tiny_int8, 1, 4, replace(OPTIONS, kv_bytes=3 * page + 10000)) as stage:
        stage.open_sequence(1)
        stage.run([Run(1, 0, [1] * 4, Want.NOTHING, rows)])
        with pytest.raises(ContextError, match="no room to compute a part"):
            stage.run([Run(1, 0, [1] * 4, Want.NOTHING, rows, (2, 4))])
        stage.limit_kv(1 << 30)
        stage.run([Run(1, 0, [1] * 4, Want.NOTHING, rows, (2, 4))])
        assert stage._pool.held > 3 * page
        for _ in range(65):
            stage.run([Run(1, 3, [1], Want.NOTHING, rows[:1])])
        assert stage._pool.held == 3 * page  # the units have been filled long ago


def test_incoming_pages_count_and_make_room_for_running_answers(tiny_int8: Model) -> None:
    page = page_bytes(tiny_int8.program.units[1].states[0], "f16")
    with Stage(tiny_int8, 0, 5, OPTIONS) as giver:
        giver.open_sequence(1)
        giver.run([Run(1, 0, PROMPT[:100], Want.NOTHING)])
        data = giver.export_positions(1, 2, 0, 100)
    with Stage(tiny_int8, 0, 2, StageOptions("native", threads=1, kv_bytes=4 * page)) as stage:
        for n in (1, 2):
            stage.open_sequence(n)
            stage.run([Run(n, 0, [1], Want.NOTHING)])
        area, other = stage.incoming(), stage.incoming()
        ready = stage.prepare(0, 3)
        area.accept(1, 2, 0, 100, data)
        other.accept(2, 2, 0, 100, data)
        assert stage.kv_bytes == 4 * page
        with pytest.raises(ContextError, match="promise more RAM"):
            area.accept(3, 2, 0, 100, data)
        assert (area.positions(1, 2), area.positions(3, 2)) == (100, 0)
        stage.open_sequence(3)
        stage.run([Run(3, 0, [1], Want.NOTHING)])
        assert stage.kv_bytes == 3 * page
        for use in (lambda: area.accept(1, 2, 0, 100, data), lambda: stage.adopt(ready, {1: 1}, area)):
            with pytest.raises(ContextError, match="made room for running answers"):
                use()
        assert (stage.first, stage.last, stage.kv_bytes) == (0, 2, 3 * page)
        area.close()
        again = stage.incoming()
        again.accept(1, 2, 0, 100, data)
        with pytest.raises(ContextError, match="made room"):
            other.positions(2, 2)
        stage.adopt(ready, {1: 1}, again, kv_bytes=2 * page)
        assert (stage.kv_bytes, stage.options.kv_bytes) == (2 * page, 2 * page)


def test_a_closed_stage_ends_what_was_prepared(tiny_int8: Model) -> None:
    stage = Stage(tiny_int8, 0, 2, OPTIONS)
    ready, area = stage.prepare(0, 3), stage.incoming()
    area.carried(1, LIVELY, 20, 0, [1])
    stage.close()
    for use in (
        lambda: stage.adopt(ready, {}),
        lambda: stage.prepare(0, 3),
        lambda: stage.hold([3]),
        lambda: stage.incoming(),
        lambda: area.positions(1, 2),
    ):
        with pytest.raises(ValueError, match="has been closed"):
            use()
    stage.discard(ready)
    area.close()
    assert stage._weights.nbytes == stage.kv_bytes == 0


@pytest.mark.slow
def test_answers_go_on_while_other_threads_prepare_hold_and_receive(tiny_int8: Model) -> None:
    with Stage(tiny_int8, 0, 5, OPTIONS) as giver, Stage(tiny_int8, 0, 5, OPTIONS) as stage:
        expected = list(generate(giver, PROMPT[:100], LIVELY, max_tokens=12, end=(), context=400))
        giver.open_sequence(1)
        giver.run([Run(1, 0, PROMPT[:200], Want.NOTHING)])
        data = [giver.export_positions(1, 2, a, a + 64) for a in (0, 64, 128)]
        stop = threading.Event()
        rounds = [0, 0, 0]

        def prepare() -> None:
            while not stop.is_set():
                first = rounds[0] % 3
                stage.discard(stage.prepare(first, 5))
                rounds[0] += 1

        def hold() -> None:
            while not stop.is_set():
                stage.hold([[1], [2, 4], []][rounds[1] % 3])
                rounds[1] += 1

        def receive() -> None:
            while not stop.is_set():
                area = stage.incoming()
                for n in range(6):
                    for i, part in enumerate(data):
                        area.accept(n, 1 + n % 3, 64 * i, 64 * i + 64, part)
                area.close()
                rounds[2] += 1

        with ThreadPoolExecutor(3) as threads:
            working = [threads.submit(work) for work in (prepare, hold, receive)]
            try:
                for _ in range(12):
                    found = list(generate(stage, PROMPT[:100], LIVELY, max_tokens=12, end=(), context=400))
                    assert found == expected
                    stage.set_range(0, 4)
                    stage.adopt(stage.prepare(0, 5), {})
            finally:
                stop.set()
            for one in working:
                one.result()
        assert min(rounds) > 0
        stage.hold([])
        assert (stage.kv_bytes, stage._weights.units) == (0, {0, 1, 2, 3, 4})


def test_weights_that_load_do_not_delay_an_adoption(
    tiny_int8: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_file, inside, go = Model.open_file, threading.Event(), threading.Event()

    def slow(model: Model, name: str, arena: Any = None) -> Any:
        if name == unit_file(4):
            inside.set()
            assert go.wait(10)
        return open_file(model, name, arena)

    with Stage(tiny_int8, 0, 2, OPTIONS) as stage, ThreadPoolExecutor(1) as threads:
        ready = stage.prepare(1, 3)
        monkeypatch.setattr(Model, "open_file", slow)
        holding = threads.submit(stage.hold, [4])
        assert inside.wait(10)
        stage.adopt(ready, {})
        assert (stage.first, stage.last, stage.held) == (1, 3, frozenset())
        go.set()
        holding.result()
        assert (stage.held, stage._weights.units) == ({4}, {1, 2, 4})


FORK = """
import os, sys, threading
import shoal
from shoal.engine.batch import Run, Want
model = shoal.Model.open(sys.argv[1])
options = shoal.StageOptions(backend=sys.argv[2], threads=1)
whole = shoal.Stage(model, 0, 5, options)
whole.open_sequence(1)
whole.run([Run(1, 0, list(range(100)), Want.NOTHING)])
data = [whole.export_positions(1, u, 0, 100) for u in (1, 2, 3)]
(expected,) = whole.run([Run(1, 100, [7], Want.TOKEN)])
stage = shoal.Stage(model, 0, 2, options)
stage.open_sequence(1)
stage.run([Run(1, 0, list(range(100)), Want.NOTHING)])
area, other, stop = stage.incoming(), stage.incoming(), threading.Event()
ready = stage.prepare(0, 5)
for unit in (2, 3):
    area.accept(1, unit, 0, 100, data[unit - 1])
def work():
    while not stop.is_set():
        other.accept(2, 2, 0, 100, data[1])
        stage.discard(stage.prepare(1, 3))
        stage.hold([3])
        stage.hold([])
working = threading.Thread(target=work)
working.start()
for i in range(10):
    child = os.fork()
    if child == 0:
        if i % 2:
            other.close()
        stage.adopt(ready, {1: 100}, area)
        (result,) = stage.run([Run(1, 100, [7], Want.TOKEN)])
        good = result.token == expected.token
        stage.close()
        sys.exit(0 if good else 3)
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
stop.set()
working.join()
"""


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["native", "numpy"])
def test_a_forked_process_adopts_what_was_prepared_before(tiny_int8: Model, backend: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORK, str(tiny_int8.path), backend],
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert (done.stdout.split(), done.stderr) == (["0"] * 10, "")
