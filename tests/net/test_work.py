"""A stage's batches without a network: what goes on, what goes back, and whose failure it is."""

from collections.abc import Sequence
from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest

from shoal.engine.batch import Result as StageResult
from shoal.engine.batch import Run, Sampling, Want
from shoal.engine.errors import ContextError, ModelFileError
from shoal.net.inbox import Batch
from shoal.net.messages import Close, Epoch, Failed, Open, Result, Step, Work
from shoal.net.work import MAX_SESSIONS, StageWork

EPOCH = Epoch(1, 1)


def opened(session: int) -> Open:
    return Open(session, EPOCH, Sampling(), 20)


def rows(session: int, first: int, tokens: tuple[int, ...], want: Want = Want.TOKEN) -> Step:
    return Step(session, EPOCH, first, tokens, want)


def test_hidden_rows_go_on_with_their_tokens(lab: ModuleType) -> None:
    work = StageWork(lab.FakeStage(0, 2), EPOCH, last=False)
    step = rows(1, 0, (4, 5, 6), Want.NOTHING)
    opening, onward = work.do(Batch((opened(1),), (step,)))
    assert opening == opened(1)
    assert onward == step  # hidden rows are not compared
    assert isinstance(onward, Step) and onward.hidden is not None and onward.hidden.shape == (3, lab.COLS)
    assert work.do(Batch((Close(1, EPOCH),), ())) == [Close(1, EPOCH)]


def test_the_last_stage_answers_each_step_with_a_result(lab: ModuleType) -> None:
    work = StageWork(lab.FakeStage(0, lab.UNITS), EPOCH, last=True)
    batch = Batch((opened(1), opened(2)), (rows(1, 0, (4, 5), Want.NOTHING), rows(2, 0, (7,))))
    expected = lab.oracle([7], 1)[0]
    assert work.do(batch) == [Result(1, EPOCH, 0, 2, None), Result(2, EPOCH, 0, 1, expected)]
    assert work.do(Batch((Close(1, EPOCH),), ())) == []


def test_rows_of_a_session_that_is_not_open_are_dropped(lab: ModuleType) -> None:
    stage = lab.FakeStage(0, lab.UNITS)
    work = StageWork(stage, EPOCH, last=True)
    assert work.do(Batch((), (rows(1, 0, (4,)),))) == []
    assert stage.batches == []


def test_one_sessions_failure_leaves_the_others_of_its_batch_alone(lab: ModuleType) -> None:
    stage = lab.FakeStage(0, lab.UNITS)
    work = StageWork(stage, EPOCH, last=True)
    batch = Batch((opened(1), opened(2), opened(3)), (rows(1, 0, (4,)), rows(2, 9, (1,)), rows(3, 0, (5,))))
    first, failed, third = work.do(batch)
    assert (first, third) == (
        Result(1, EPOCH, 0, 1, lab.oracle([4], 1)[0]),
        Result(3, EPOCH, 0, 1, lab.oracle([5], 1)[0]),
    )
    assert failed == Failed(2, EPOCH, 13, "rows from 9: the sequence holds 0 positions")
    assert set(stage.sequences) == {1, 3}
    assert work.do(Batch((), (rows(2, 0, (1,)),))) == []


def test_an_engine_error_keeps_its_code(lab: ModuleType) -> None:
    work = StageWork(lab.FakeStage(0, 2, room=3), EPOCH, last=False)
    work.do(Batch((opened(1), opened(2)), (rows(1, 0, (1, 2), Want.NOTHING),)))
    (failed,) = work.do(Batch((), (rows(2, 0, (1, 2)),)))
    assert isinstance(failed, Failed) and failed.code == ContextError.exit_code
    assert "have filled" in failed.text


class NotFinite:
    """A stage that meets NaN."""

    kv_pages, page_positions = None, 256

    def open_sequence(self, sequence: int, sampling: Sampling, context: int) -> None:
        pass

    def run(self, batch: Sequence[Run]) -> list[StageResult]:
        raise FloatingPointError("NaN in layer 3")

    def close_sequence(self, sequence: int) -> None:
        pass

    def close(self) -> None:
        pass


def test_numbers_that_are_none_end_the_session() -> None:
    work = StageWork(NotFinite(), EPOCH, last=True)
    step = Step(1, EPOCH, 0, (1,), Want.TOKEN, np.full((1, 2), np.nan, np.float32))
    assert work.do(Batch((opened(1),), (step,))) == [Failed(1, EPOCH, 13, "NaN in layer 3")]


def test_without_memory_one_session_ends_and_the_others_of_its_batch_go_on(
    lab: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = lab.FakeStage(0, lab.UNITS)
    work, run, begin = StageWork(stage, EPOCH, last=True), stage.run, stage.open_sequence

    def short_of_memory(batch: Sequence[Run]) -> list[StageResult]:
        if any(run.sequence == 2 for run in batch):
            raise MemoryError
        return run(batch)  # type: ignore[no-any-return]

    def short_of_memory_for(sequence: int, sampling: Sampling, context: int) -> None:
        if sequence == 4:
            raise MemoryError("Unable to allocate 1.00 GiB")
        begin(sequence, sampling, context)

    monkeypatch.setattr(stage, "run", short_of_memory)
    monkeypatch.setattr(stage, "open_sequence", short_of_memory_for)
    steps = tuple(rows(session, 0, (session,)) for session in (1, 2, 3, 4))
    refused, first, second, third = work.do(Batch(tuple(map(opened, (1, 2, 3, 4))), steps))
    assert (first, third) == (
        Result(1, EPOCH, 0, 1, lab.oracle([1], 1)[0]),
        Result(3, EPOCH, 0, 1, lab.oracle([3], 1)[0]),
    )
    for failed, session in ((second, 2), (refused, 4)):
        assert isinstance(failed, Failed) and failed.session == session
        assert failed.code == ContextError.exit_code and "no memory for these rows: end other" in failed.text
    assert set(stage.sequences) == {1, 3}


def test_a_mistake_of_ours_is_not_a_sessions_failure(lab: ModuleType) -> None:
    stage = lab.FakeStage(0, 2)
    work = StageWork(stage, EPOCH, last=False)
    stage.close()
    with pytest.raises(AssertionError):
        work.do(Batch((opened(1),), ()))


def test_opening_twice_or_too_often_fails_that_session_alone(lab: ModuleType) -> None:
    work = StageWork(lab.FakeStage(0, lab.UNITS), EPOCH, last=True)
    assert work.do(Batch(tuple(opened(s) for s in range(MAX_SESSIONS)), ())) == []
    (failed,) = work.do(Batch((opened(MAX_SESSIONS),), ()))
    assert isinstance(failed, Failed) and f"{MAX_SESSIONS} sessions" in failed.text
    (failed,) = work.do(Batch((opened(5),), ()))
    assert isinstance(failed, Failed) and "open already" in failed.text


def test_statistics_tell_decoding_from_prompts(lab: ModuleType) -> None:
    work = StageWork(lab.FakeStage(0, lab.UNITS), EPOCH, last=True)
    work.count(Batch((), (rows(1, 0, (1, 2, 3)), rows(2, 5, (1,)))), 0.5)
    work.count(Batch((), (rows(2, 6, (1,)), rows(3, 1, (1,)))), 0.25)
    work.count(Batch((), (rows(2, 7, (1,)),)), 0.25)
    work.count(Batch((opened(4),), ()), 9.0)
    stats = work.stats()
    assert (stats.epoch, stats.decode, stats.prefill) == (EPOCH, Work(2, 3, 0.5), Work(1, 4, 0.5))


def test_rows_that_decode_say_that_more_follow_and_go_before_those_of_prompts(lab: ModuleType) -> None:
    work = StageWork(lab.FakeStage(0, 2), EPOCH, last=False)
    work.do(Batch(tuple(opened(session) for session in (1, 2, 3, 4)), ()))
    steps = (rows(1, 0, (4,)), rows(4, 0, (4, 5), Want.NOTHING), rows(2, 0, (4,)), rows(3, 0, (4,)))

    def said(*steps: Step) -> list[tuple[int, bool]]:
        return [(one.session, one.more) for one in work.do(Batch((), steps)) if isinstance(one, Step)]

    assert said(*steps) == [(1, True), (2, True), (3, False), (4, False)]
    # The last one fails, and the rows before it are a call without it. What came in says nothing.
    failing = (replace(rows(1, 1, (4,)), more=True), rows(2, 1, (4,)), rows(3, 9, (4,)))
    assert said(*failing) == [(1, True), (2, False)]
    assert said(replace(rows(1, 2, (4,)), more=True)) == [(1, False)]


def test_a_damaged_file_is_nobodys_session(lab: ModuleType) -> None:
    class Damaged(lab.FakeStage):  # type: ignore[name-defined, misc]
        def run(self, batch: Sequence[Run]) -> list[StageResult]:
            raise ModelFileError("unit-002.safetensors was truncated while it was in use")

    work = StageWork(Damaged(0, lab.UNITS), EPOCH, last=True)
    with pytest.raises(ModelFileError, match="was truncated"):
        work.do(Batch((opened(1), opened(2)), (rows(1, 0, (4,)), rows(2, 0, (7,)))))
