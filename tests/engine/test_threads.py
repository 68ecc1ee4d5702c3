"""Threads that share a stage: every answer is right, waits are fair, runs can be cancelled, forks are
refused."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from tests.patience import LIMIT

from shoal.engine.batch import Run, Sampling, Want
from shoal.engine.calls import FairLock
from shoal.engine.errors import CancelledRunError
from shoal.engine.generate import generate
from shoal.engine.layout import PAGE
from shoal.engine.model_directory import Model
from shoal.engine.stage import Stage, StageOptions

PROMPTS = {1: [5, 6, 7, 8], 2: [9, 10, 11], 3: [3] * 70}


@pytest.fixture
def stage(tiny_int8: Model) -> Iterator[Stage]:
    with Stage(tiny_int8, 0, tiny_int8.n_units, StageOptions(threads=1)) as stage:
        yield stage


class Gate:
    """Holds a stage's next runs within its backend until they are let through."""

    def __init__(self, stage: Stage) -> None:
        self.inside, self.open = threading.Event(), threading.Event()
        self._run = stage._executor.run
        stage._executor.run = self._waiting  # type: ignore[method-assign]

    def _waiting(self, *arguments: Any) -> Any:
        self.inside.set()
        assert self.open.wait(LIMIT)
        return self._run(*arguments)


def wait_until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.001)


@pytest.mark.slow
@pytest.mark.parametrize("options", [StageOptions("native", threads=1), StageOptions("native", threads=3)])
@pytest.mark.parametrize("numbered", [True, False])
def test_every_thread_gets_the_answer_that_it_gets_alone(
    tiny_int8: Model, options: StageOptions, numbered: bool
) -> None:
    sampling = Sampling(temperature=0.9, seed=4)

    def answer(n: int) -> list[int]:
        sequence = n if numbered else None
        return list(generate(stage, PROMPTS[n], sampling, max_tokens=30, end=(), sequence=sequence))

    with Stage(tiny_int8, 0, tiny_int8.n_units, options) as stage:
        alone = {n: answer(n) for n in PROMPTS}
        with ThreadPoolExecutor(len(PROMPTS)) as threads:
            for _ in range(5):
                assert dict(zip(PROMPTS, threads.map(answer, PROMPTS), strict=True)) == alone
        assert stage.kv_bytes == 0


def test_a_lock_goes_to_the_thread_that_waited_longest() -> None:
    lock, order = FairLock(), list[str]()

    def wait() -> None:
        with lock:
            order.append("waited")

    other = threading.Thread(target=wait)
    with lock:
        other.start()
        wait_until(lambda: waited_for(lock))
        with lock:  # its holder may take it again
            assert order == []
    with lock:
        order.append("came later")
    other.join()
    assert order == ["waited", "came later"]


def waited_for(lock: FairLock) -> bool:
    """Whether another thread has asked for the lock and waits for its turn."""
    if lock._door.acquire(blocking=False):
        lock._door.release()
        return False
    return True


def test_a_sequence_that_another_thread_runs_is_refused_and_its_run_undisturbed(stage: Stage) -> None:
    stage.open_sequence(1)
    stage.open_sequence(2)
    (alone,) = stage.run([Run(1, 0, [5, 6, 7], Want.TOKEN)])
    gate = Gate(stage)
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(stage.run, [Run(1, 0, [5, 6, 7], Want.TOKEN)])
        assert gate.inside.wait(10)
        with pytest.raises(ValueError, match="sequence 1 is being run by another thread"):
            stage.run([Run(2, 0, [9], Want.TOKEN), Run(1, 2, [9], Want.TOKEN)])
        gate.open.set()
        assert running.result() == [alone]
    stage.run([Run(1, 3, [9], Want.TOKEN), Run(2, 0, [9], Want.TOKEN)])


def test_two_answers_with_one_number_are_refused_and_without_are_apart(stage: Stage) -> None:
    alone = list(generate(stage, PROMPTS[1], max_tokens=8))
    first = generate(stage, PROMPTS[1], max_tokens=8, sequence=7)
    tokens = [next(first)]
    with pytest.raises(ValueError, match="sequence 7 is already open"):
        next(generate(stage, PROMPTS[2], sequence=7))
    other = generate(stage, PROMPTS[2], max_tokens=8)
    pairs = [(token, next(other)) for token in first]
    assert tokens + [token for token, _ in pairs] == alone


def test_closing_waits_for_the_run_and_refuses_what_comes_later(tiny_int8: Model) -> None:
    stage = Stage(tiny_int8, 0, tiny_int8.n_units)
    stage.open_sequence(1)
    stage.open_sequence(2)
    gate = Gate(stage)
    with ThreadPoolExecutor(3) as threads:
        running = threads.submit(stage.run, [Run(1, 0, [5, 6, 7], Want.TOKEN)])
        assert gate.inside.wait(10)
        closing = threads.submit(stage.close)
        wait_until(lambda: waited_for(stage._calls._lock))
        late = threads.submit(stage.run, [Run(2, 0, [5, 6, 7], Want.TOKEN)])
        assert not closing.done()
        gate.open.set()
        assert running.result()[0].token is not None
        closing.result()
        with pytest.raises(ValueError, match="has been closed"):
            late.result()
    for use in (lambda: stage.open_sequence(3), lambda: stage.set_range(0, 2), lambda: stage.clock_ops()):
        with pytest.raises(ValueError, match="has been closed"):
            use()
    stage.close_sequence(1)
    stage.cancel()
    assert stage.kv_bytes == 0


def test_a_generator_that_the_garbage_collector_ends_within_a_call(stage: Stage) -> None:
    """Its sequence is closed by a thread that is using the stage at that moment."""
    stage.open_sequence(1)
    run = stage._executor.run

    def collecting(*arguments: Any) -> Any:
        gc.collect()
        return run(*arguments)

    answer: list[Any] = [generate(stage, PROMPTS[2], sequence=2)]
    next(answer[0])
    answer.append(answer)  # a cycle: nothing but a collection ends it
    del answer
    stage._executor.run = collecting  # type: ignore[method-assign]
    (result,) = stage.run([Run(1, 0, [5, 6, 7], Want.TOKEN)])
    assert result.token is not None
    stage.open_sequence(2)


@pytest.mark.parametrize("backend", ["native", "numpy"])
def test_a_cancelled_run_leaves_what_the_sequence_held(tiny_int8: Model, backend: str) -> None:
    def cancelling(rows: Any, hidden: Any, logits: bool, cancel: Any) -> Any:
        stage.cancel(1)
        assert cancel[0] == 1
        return run(rows, hidden, logits, cancel)

    late = Run(1, PAGE, [5] * 40, Want.LOGITS)
    with Stage(tiny_int8, 0, tiny_int8.n_units, StageOptions(backend, max_wanted=64)) as stage:
        stage.open_sequence(1)
        stage.open_sequence(2)
        stage.run([Run(1, 0, [7] * PAGE, Want.NOTHING)])
        held, run = stage.kv_bytes, stage._executor.run
        (undisturbed,) = stage.run([late])
        stage._executor.run = cancelling  # type: ignore[method-assign]
        for other in ([], [Run(2, 0, [1], Want.NOTHING)]):
            with pytest.raises(CancelledRunError):
                stage.run([late, *other])
            assert stage.kv_bytes == held
        stage._executor.run = run  # type: ignore[method-assign]
        assert not stage.cancelled(1)  # it was told
        (again,) = stage.run([late])
        assert again.logits is not None and undisturbed.logits is not None
        assert again.logits.tobytes() == undisturbed.logits.tobytes()


def test_runs_are_cancelled_while_they_wait_and_others_are_not(stage: Stage) -> None:
    for sequence in (1, 2, 3):
        stage.open_sequence(sequence)
    gate = Gate(stage)
    with ThreadPoolExecutor(3) as threads:
        running = threads.submit(stage.run, [Run(1, 0, [5], Want.TOKEN)])
        assert gate.inside.wait(10)
        waiting = [threads.submit(stage.run, [Run(n, 0, [5], Want.TOKEN)]) for n in (2, 3)]
        wait_until(lambda: len(stage._calls._runs) == 3)
        stage.cancel(2)
        gate.open.set()
        with pytest.raises(CancelledRunError):
            waiting[0].result()
        assert running.result()[0].token == waiting[1].result()[0].token


@pytest.mark.parametrize("which", [None, 5])
def test_an_answer_is_cancelled_between_two_tokens(stage: Stage, which: int | None) -> None:
    alone = list(generate(stage, PROMPTS[2], max_tokens=6, end=()))
    answer = generate(stage, PROMPTS[1], sequence=5)
    other = generate(stage, PROMPTS[2], max_tokens=6, end=(), sequence=6)
    next(answer)
    first = next(other)
    stage.cancel(which)
    with pytest.raises(CancelledRunError, match="cancelled"):
        next(answer)
    if which is None:
        with pytest.raises(CancelledRunError):
            next(other)
    else:
        assert [first, *other] == alone
    assert stage.kv_bytes == 0
    stage.cancel()
    stage.cancel(5)  # nothing runs: what begins later is not meant
    assert list(generate(stage, PROMPTS[2], max_tokens=6, end=(), sequence=5)) == alone


FORK = """
import os, sys, threading
import shoal
model = shoal.Model.open(sys.argv[1])
options = shoal.StageOptions(backend=sys.argv[2], threads=int(sys.argv[3]))
stage = shoal.Stage(model, 0, model.n_units, options)
def answer(sequence=None):
    return list(shoal.generate(stage, [1, 2, 3], max_tokens=5, end=(), sequence=sequence))
before = answer()
stop = threading.Event()
def work():
    while not stop.is_set():
        assert answer(7) == before
working = threading.Thread(target=work)
working.start()
for _ in range(10):
    begun = shoal.generate(stage, [1, 2, 3], max_tokens=5, end=(), sequence=1)
    tokens = [next(begun)]
    child = os.fork()
    if child == 0:
        good = tokens + list(begun) == before
        stage.close_sequence(7)
        good = good and answer() == before and answer(7) == before and stage.kv_bytes == 0
        stage.close()
        sys.exit(0 if good else 3)
    assert tokens + list(begun) == before
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
stop.set()
working.join()
"""


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "threads"), [("native", 1), ("native", 3), ("numpy", 1), ("numba", 1)])
def test_a_forked_process_goes_on_though_another_thread_runs(
    tiny_int8: Model, backend: str, threads: int
) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORK, str(tiny_int8.path), backend, str(threads)],
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert (done.stdout.split(), done.stderr) == (["0"] * 10, "")


def test_what_another_thread_ran_is_closed_in_a_forked_process(stage: Stage) -> None:
    """As in a child whose parent was in the middle of a run: no thread will ever end that call."""
    stage.open_sequence(1)
    stage.open_sequence(2)
    with stage._calls.run([1]):
        stage._calls._process += 1
        (result,) = stage.run([Run(2, 0, [5, 6, 7], Want.TOKEN)])
        assert result.token is not None
        with pytest.raises(ValueError, match="sequence 1 is not open"):
            stage.run([Run(1, 0, [5, 6, 7], Want.TOKEN)])


@pytest.mark.slow
def test_two_stages_may_run_numba_at_once(tiny_int8: Model) -> None:
    options = StageOptions("numba", threads=2)
    with Stage(tiny_int8, 0, 5, options) as one, Stage(tiny_int8, 0, 5, options) as other:
        alone = list(generate(one, PROMPTS[1], max_tokens=10))
        with ThreadPoolExecutor(2) as threads:
            answers = threads.map(lambda s: list(generate(s, PROMPTS[1], max_tokens=10)), [one, other])
            assert list(answers) == [alone, alone]


def test_the_numpy_backend_is_shared_too(tiny_int8: Model) -> None:
    with Stage(tiny_int8, 0, tiny_int8.n_units, StageOptions("numpy", max_wanted=8)) as stage:
        runs = [Run(n, 0, [n, 7, 8], Want.LOGITS) for n in range(4)]
        for run in runs:
            stage.open_sequence(run.sequence)
        alone = [stage.run([run])[0].logits for run in runs]
        with ThreadPoolExecutor(4) as threads:
            together = threads.map(lambda run: [stage.run([run])[0].logits for _ in range(8)], runs)
            for found, expected in zip(together, alone, strict=True):
                np.testing.assert_array_equal(found, [expected] * 8)
