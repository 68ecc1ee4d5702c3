"""Units that come and go: weights beside running work, ranges that change in the middle of an answer, and
cuts of several buffers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shoal.engine import memory, weights
from shoal.engine.arrays import F32
from shoal.engine.backends import NAMES, open_backend
from shoal.engine.backends.base import BoundProgram, SequenceRows
from shoal.engine.batch import Run, Sampling, Want
from shoal.engine.errors import ModelFileError, OperatingSystemError
from shoal.engine.generate import generate
from shoal.engine.host import Ram
from shoal.engine.kv import PagePool, SequenceKv
from shoal.engine.model_directory import Model, unit_file
from shoal.engine.program import Buffer, Embed, Matmul, Norm, Program, Unit, Weight
from shoal.engine.safetensors_file import TensorInfo, open_file, write
from shoal.engine.stage import Stage, StageOptions
from shoal.engine.weights import WeightStore

OPTIONS = StageOptions("native", threads=2, max_wanted=256)
PROMPT = np.random.default_rng(0).integers(0, 267, 300).tolist()
LIVELY = Sampling(temperature=1.1, repetition_penalty=1.2, seed=5)


class Chain:
    """An answer over two stages, whose boundary may move between two tokens."""

    def __init__(self, model: Model, cut: int, options: StageOptions = OPTIONS) -> None:
        self.front, self.back = Stage(model, 0, cut, options), Stage(model, cut, model.n_units, options)
        self.tokens: list[int] = []
        for stage in self.stages:
            stage.open_sequence(1, LIVELY, 400)

    @property
    def stages(self) -> tuple[Stage, Stage]:
        return self.front, self.back

    def run(self, first: int, tokens: list[int]) -> int:
        (cut,) = self.front.run([Run(1, first, tokens, Want.TOKEN)])
        (last,) = self.back.run([Run(1, first, tokens, Want.TOKEN, cut.hidden)])
        assert last.token is not None
        return last.token

    def answer(self, count: int, between: Callable[[int], None] = lambda n: None) -> list[int]:
        known = [*PROMPT]
        at = 0
        for n in range(count):
            for first in range(at, len(known), 200):
                token = self.run(first, known[first : first + 200])
            at = len(known)
            known.append(token)
            between(n)
        return known[len(PROMPT) :]

    def move(self, cut: int, held: int) -> None:
        """The boundary goes to `cut`: copies of the pages first, then the ranges."""
        for taker, giver, units in (
            (self.front, self.back, range(self.front.last, cut)),
            (self.back, self.front, range(cut, self.back.first)),
        ):
            for unit in units:
                taker.load(unit, unit + 1)
                if taker.model.program.units[unit].states:
                    data = giver.export_positions(1, unit, 0, held)
                    taker.import_positions(1, unit, 0, held, data)
        self.front.set_range(0, cut)
        self.back.set_range(cut, self.back.last)

    def close(self) -> None:
        for stage in self.stages:
            stage.close()


@pytest.mark.parametrize("resident", [True, False])
def test_a_boundary_moves_in_the_middle_of_an_answer(tiny_quantised: Model, resident: bool) -> None:
    options = StageOptions("native", threads=2, max_wanted=256, resident=resident)
    with Stage(tiny_quantised, 0, 5, OPTIONS) as whole:
        alone = list(generate(whole, PROMPT, LIVELY, max_tokens=12, end=(), context=400))
    chain = Chain(tiny_quantised, 2, options)
    try:
        cuts = iter((3, 1, 4, 2))

        def between(n: int) -> None:
            if n % 3 == 1:
                chain.move(next(cuts), len(PROMPT) + n)

        assert chain.answer(12, between) == alone
        assert (chain.front.last, chain.back.first) == (2, 2)
        assert [sorted(stage._weights.units) for stage in chain.stages] == [[0, 1], [2, 3, 4]]
        pages = [stage.kv_bytes for stage in chain.stages]
        assert pages[1] == 2 * pages[0]  # of layers 2 and 3, and of layer 1
    finally:
        chain.close()


def test_positions_that_were_not_imported_are_missed_by_name_and_may_be_run_again(tiny_int8: Model) -> None:
    with Stage(tiny_int8, 0, 5, OPTIONS) as whole:
        alone = list(generate(whole, PROMPT, LIVELY, max_tokens=6, end=(), context=400))
    chain = Chain(tiny_int8, 2)
    try:
        first = chain.answer(3)
        chain.front.set_range(0, 3)
        chain.back.set_range(3, 5)
        held, known = len(PROMPT) + 2, [*PROMPT, *first]
        with pytest.raises(ValueError, match=f"unit 2 holds 0 of the {held} positions before the run"):
            chain.run(held, first[-1:])
        assert [chain.front.positions(1, u) for u in (1, 2)] == [held, 0]
        for at in range(0, len(known), 200):
            token = chain.run(at, known[at : at + 200])
        assert [*first, token] == alone[:4]
    finally:
        chain.close()


def test_units_are_loaded_and_ranges_changed_while_others_run(tiny_int8: Model) -> None:
    """The stage runs layers 1 and 2; what comes and goes beside them is 0, 3 and 4."""
    hidden = np.random.default_rng(1).standard_normal((40, tiny_int8.program.cut_cols)).astype(np.float32)
    run = Run(1, 0, [0] * 40, Want.NOTHING, hidden)
    stop = threading.Event()
    with Stage(tiny_int8, 1, 3, StageOptions("native", threads=2, resident=True)) as stage:
        stage.open_sequence(1)
        (expected,) = stage.run([run])
        assert expected.hidden is not None

        def work() -> int:
            rounds = 0
            while not stop.is_set():
                (found,) = stage.run([run])
                assert found.hidden is not None and expected.hidden is not None
                assert found.hidden.tobytes() == expected.hidden.tobytes()
                rounds += 1
            return rounds

        with ThreadPoolExecutor(1) as threads:
            working = threads.submit(work)
            for _ in range(30):
                stage.load(0, 5)
                assert stage._weights.units == {0, 1, 2, 3, 4}
                stage.set_range(1, 3)
                assert stage._weights.units == {1, 2}
            stop.set()
            assert working.result() > 0


def test_a_range_that_cannot_be_had_changes_nothing(
    tiny_int8: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Stage(tiny_int8, 0, 4) as stage:
        stage.open_sequence(1)
        (before,) = stage.run([Run(1, 0, [1, 2, 3], Want.TOKEN)])
        open_shard = Model.open_file

        def failing(model: Model, name: str, arena: Any = None) -> Any:
            if name == unit_file(4):
                raise ModelFileError(f"{name} is missing")
            return open_shard(model, name, arena)

        monkeypatch.setattr(Model, "open_file", failing)
        for first, last in ((0, 5), (2, 5)):
            for change in (stage.load, stage.set_range):
                with pytest.raises(ModelFileError, match="is missing"):
                    change(first, last)
                assert (stage.first, stage.last, stage._weights.units) == (0, 4, {0, 1, 2, 3})
        for first, last in ((-1, 3), (2, 2), (3, 2), (0, 6)):
            with pytest.raises(ValueError, match="are not a range"):
                stage.set_range(first, last)
        (after,) = stage.run([Run(1, 0, [1, 2, 3], Want.TOKEN)])
        assert before.hidden is not None and after.hidden is not None
        assert after.hidden.tobytes() == before.hidden.tobytes()


def test_threads_stay_when_the_range_changes(tiny_int8: Model) -> None:
    def threads() -> set[str]:
        return {path.name for path in Path("/proc/self/task").iterdir()}

    with Stage(tiny_int8, 0, 5, StageOptions("native", threads=3)) as stage:
        before = threads()
        stage.set_range(1, 4)
        assert threads() == before


def test_a_new_range_brings_its_cap_on_keys_and_values(tiny_int8: Model) -> None:
    with Stage(tiny_int8, 0, 5) as stage:
        stage.open_sequence(0)
        stage.run([Run(0, 0, [1] * 200, Want.NOTHING)])
        page = stage.kv_bytes // 3
        stage.set_range(0, 3, kv_bytes=3 * page)
        assert (stage.kv_bytes, stage.options.kv_bytes) == (2 * page, 3 * page)
        stage.open_sequence(1)
        with pytest.raises(Exception, match="promise more RAM"):
            stage.run([Run(1, 0, [1], Want.NOTHING)])


def test_a_shared_table_is_there_once_and_as_long_as_one_unit_has_it(tiny_tied: Model) -> None:
    last = tiny_tied.n_units - 1
    (name,) = tiny_tied.program.units[last].tied
    store = WeightStore(tiny_tied, resident=True)
    store.load(0, 1)
    store.load(last, last + 1)
    files = [tiny_tied.index.files[unit_file(u)].size for u in (0, last)]
    assert store.nbytes == sum(files)
    first, second = store.of(0, 1)[0, name], store.of(last, last + 1)[last, name]
    assert np.shares_memory(first.data, second.data)
    expected = second.data.copy()
    del first
    store.keep({last})
    assert store.nbytes == sum(files)
    np.testing.assert_array_equal(second.data, expected)
    store.keep(())
    assert store.nbytes == 0
    with pytest.raises(KeyError):
        store.of(0, 1)


@pytest.mark.parametrize(("spare", "refused"), [(-1, True), (0, False), (None, False)])
def test_copies_that_do_not_fit_are_refused_before_they_are_made(
    tiny_int8: Model, monkeypatch: pytest.MonkeyPatch, spare: int | None, refused: bool
) -> None:
    files = {name for unit in tiny_int8.index.units for name in unit.files}
    size = memory.room(tiny_int8.index.files[name].size for name in files)
    available = None if spare is None else size + spare
    monkeypatch.setattr(weights, "ram", lambda: Ram(400 << 20, available, "that this container may use"))
    store = WeightStore(tiny_int8, resident=True)
    if refused:
        with pytest.raises(OperatingSystemError, match=r"419 MB that this container may use.*--no-resident"):
            store.load(0, tiny_int8.n_units)
        assert not store.units
        store = WeightStore(tiny_int8, resident=False)
    store.load(0, tiny_int8.n_units)
    assert len(store.units) == tiny_int8.n_units


def test_the_memory_of_a_file_is_freed_with_the_last_reference_to_it(tmp_path: Path) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * memory.mmap.PAGESIZE

    size, files = 24 << 20, []
    for name in ("a", "b", "c"):
        info = TensorInfo(name, "U8", (size,))
        write(tmp_path / name, [info], [np.full(size, ord(name), np.uint8)])
    arena = memory.Arena(memory.room((tmp_path / name).stat().st_size for name in "abc"), pinned=False)
    files = {name: open_file(tmp_path / name, arena).tensor(name) for name in "abc"}
    del arena
    full = resident()
    view = files["b"][5:9]
    del files["b"]
    assert full - resident() < size // 2  # the view needs it
    del view
    assert full - resident() > size // 2
    assert (files["a"] == ord("a")).all() and (files["c"] == ord("c")).all()
    files.clear()
    assert full - resident() > 5 * size // 2


ROWS, VOCAB, WIDTHS = 6, 48, (32, 64)


def two_buffers() -> tuple[Program, dict[tuple[int, str], Any]]:
    """Unit 0 fills x, and y from it; unit 1 adds to x from y and reads both: the cut is x and y."""
    a, b = WIDTHS
    matrices = (Weight("table", VOCAB, a), Weight("up", b, a), Weight("down", a, b), Weight("head", VOCAB, a))
    norm = Weight("norm", 1, a)
    program = Program(
        units=(
            Unit("embed", (Embed("x", "table"), Matmul("y", "x", ("up",))), matrices[:2]),
            Unit(
                "rest",
                (
                    Matmul("x", "y", ("down",), True),
                    Norm("n", "x", "norm", 1e-5),
                    Matmul("logits", "n", ("head",)),
                ),
                (*matrices[2:], norm),
            ),
        ),
        prologue=(),
        buffers=(
            Buffer("x", a, "f32", "rows"),
            Buffer("y", b, "f32", "rows"),
            Buffer("n", a, "f32", "wanted"),
            Buffer("logits", VOCAB, "f32", "wanted"),
        ),
        cut=("x", "y"),
        constants=(),
        logits="logits",
        vocab=VOCAB,
    )
    rng = np.random.default_rng(2)
    weights = {
        (u, w.name): _Values(rng.standard_normal((w.rows, w.cols)).astype(np.float32), w.rows, w.cols)
        for u, unit in enumerate(program.units)
        for w in unit.weights
    }
    return program, weights


class _Values:
    scales = mins = None

    def __init__(self, data: F32, rows: int, cols: int) -> None:
        self.data, self.rows, self.cols = data, rows, cols


@pytest.mark.parametrize("backend", NAMES)
def test_a_cut_may_have_several_buffers(backend: str) -> None:
    program, weights = two_buffers()
    assert program.cut_cols == sum(WIDTHS)

    def run(first: int, last: int, hidden: F32 | None) -> Any:
        held = {key: weight for key, weight in weights.items() if first <= key[0] < last}
        ops = tuple(program.ops(first, last))
        bound = BoundProgram(program, ops, held, (), "f32", first == 0, last == 2, ROWS, ROWS)
        tokens = np.arange(ROWS, dtype=np.int32) * 7
        rows = SequenceRows(SequenceKv(PagePool("f32"), (), 0), tokens, Sampling(), ROWS, 0, ROWS, 0)
        made = open_backend(backend)
        executor = made.executor(bound)
        outcome = executor.run([rows], hidden, True, np.zeros(1, np.int32))
        executor.close()
        made.close()
        return outcome

    cut = run(0, 1, None).hidden
    assert cut.shape == (ROWS, sum(WIDTHS))
    x, y = np.split(cut, [WIDTHS[0]], axis=1)
    np.testing.assert_allclose(y, x @ weights[0, "up"].data.T, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(run(1, 2, cut).logits, run(0, 2, None).logits)
