"""A stage's batches without a network: what goes on, what goes back, and whose failure it is."""

from collections.abc import Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from shoal.engine.batch import Result as StageResult
from shoal.engine.batch import Run, Sampling, Want
from shoal.engine.errors import ContextError, ModelFileError, OperatingSystemError
from shoal.net import tags
from shoal.net.inbox import Batch
from shoal.net.messages import MOST_SESSIONS, Close, Draw, Epoch, Failed, Open, Result, Step, Work
from shoal.net.work import Session, StageWork

EPOCH = Epoch(1, 1)


def opened(session: int) -> Open:
    return Open(session, EPOCH, 20)


def rows(session: int, first: int, tokens: tuple[int, ...], want: Want = Want.TOKEN) -> Step:
    """The tag of a chunk, which has two positions here, is its second token."""
    ends = tuple(token for position, token in enumerate(tokens, first) if position % 2)
    return Step(session, EPOCH, first, tokens, want, tags=ends)


@pytest.fixture(autouse=True)
def _short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tags, "CHUNK", 2)


def test_hidden_rows_go_on_without_their_tokens(lab: ModuleType) -> None:
    work = StageWork(lab.FakeStage(0, 2), EPOCH, 2)
    step = rows(1, 0, (4, 5, 6), Want.NOTHING)
    opening, onward = work.do(Batch((opened(1),), (step,)))
    assert opening == opened(1)
    assert onward == replace(step, tokens=())  # hidden rows are not compared
    assert isinstance(onward, Step) and onward.hidden is not None and onward.hidden.shape == (3, lab.COLS)
    assert work.do(Batch((Close(1, EPOCH),), ())) == [Close(1, EPOCH)]


def test_the_last_stage_answers_each_step_with_a_result(lab: ModuleType) -> None:
    work = StageWork(lab.FakeStage(0, lab.UNITS), EPOCH, None)
    batch = Batch((opened(1), opened(2)), (rows(1, 0, (4, 5), Want.NOTHING), rows(2, 0, (7,))))
    expected = lab.oracle([7], 1)[0]
    assert work.do(batch) == [Result(1, EPOCH, 0, 2, None), Result(2, EPOCH, 0, 1, expected)]
    assert work.do(Batch((Close(1, EPOCH),), ())) == []


def test_rows_that_were_kept_are_sent_on_and_run_only_from_the_part_on(lab: ModuleType) -> None:
    stage = lab.FakeStage(0, 2)
    work = StageWork(stage, EPOCH, 2)
    _, sent = work.do(Batch((opened(1),), (rows(1, 0, (4, 5, 6), Want.NOTHING),)))
    again = replace(rows(1, 1, (5, 6), Want.NOTHING), part=(2, 4))
    (onward,) = work.do(Batch((), (again,)))
    assert onward == replace(again, tokens=()) and isinstance(onward, Step) and onward.hidden is not None
    assert isinstance(sent, Step) and sent.hidden is not None
    assert onward.hidden.tobytes() == sent.hidden[1:].tobytes()
    assert len(stage.batches) == 1  # nothing has run again
    (failed,) = work.do(Batch((), (replace(again, tokens=(5, 6, 7)),)))
    assert isinstance(failed, Failed) and "are not kept" in failed.text


def test_rows_of_a_session_that_is_not_open_are_dropped(lab: ModuleType) -> None:
    stage = lab.FakeStage(0, lab.UNITS)
    work = StageWork(stage, EPOCH, None)
    assert work.do(Batch((), (rows(1, 0, (4,)),))) == []
    assert stage.batches == []


def test_one_sessions_failure_leaves_the_others_of_its_batch_alone(lab: ModuleType) -> None:
    stage = lab.FakeStage(0, lab.UNITS)
    work = StageWork(stage, EPOCH, None)
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
    work = StageWork(lab.FakeStage(0, 2, room=3), EPOCH, 2)
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
    work = StageWork(NotFinite(), EPOCH, None)
    step = Step(1, EPOCH, 0, (1,), Want.TOKEN, np.full((1, 2), np.nan, np.float32))
    assert work.do(Batch((opened(1),), (step,))) == [Failed(1, EPOCH, 13, "NaN in layer 3")]


def test_without_memory_one_session_ends_and_the_others_of_its_batch_go_on(
    lab: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = lab.FakeStage(0, lab.UNITS)
    work, run, begin = StageWork(stage, EPOCH, None), stage.run, stage.open_sequence

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
        assert failed.code == OperatingSystemError.exit_code
        assert "no memory for these rows: end other" in failed.text
    assert set(stage.sequences) == {1, 3}


def test_a_mistake_of_ours_is_not_a_sessions_failure(lab: ModuleType) -> None:
    stage = lab.FakeStage(0, 2)
    work = StageWork(stage, EPOCH, 2)
    stage.close()
    with pytest.raises(AssertionError):
        work.do(Batch((opened(1),), ()))


def test_opening_twice_or_too_often_fails_that_session_alone(lab: ModuleType) -> None:
    work = StageWork(lab.FakeStage(0, lab.UNITS), EPOCH, None)
    assert work.do(Batch(tuple(opened(s) for s in range(MOST_SESSIONS)), ())) == []
    (failed,) = work.do(Batch((opened(MOST_SESSIONS),), ()))
    assert isinstance(failed, Failed) and f"{MOST_SESSIONS} sessions" in failed.text
    (failed,) = work.do(Batch((opened(5),), ()))
    assert isinstance(failed, Failed) and "open already" in failed.text


def test_statistics_tell_decoding_from_prompts(lab: ModuleType) -> None:
    work = StageWork(lab.FakeStage(0, lab.UNITS), EPOCH, None)
    work.count(Batch((), (rows(1, 0, (1, 2, 3)), rows(2, 5, (1,)))), 0.5)
    work.count(Batch((), (rows(2, 6, (1,)), rows(3, 1, (1,)))), 0.25)
    work.count(Batch((), (rows(2, 7, (1,)),)), 0.25)
    work.count(Batch((opened(4),), ()), 9.0)
    stats = work.stats()
    assert (stats.epoch, stats.decode, stats.prefill) == (EPOCH, Work(2, 3, 0.5), Work(1, 4, 0.5))


def test_rows_that_decode_say_that_more_follow_and_go_before_those_of_prompts(lab: ModuleType) -> None:
    work = StageWork(lab.FakeStage(0, 2), EPOCH, 2)
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

    work = StageWork(Damaged(0, lab.UNITS), EPOCH, None)
    with pytest.raises(ModelFileError, match="was truncated"):
        work.do(Batch((opened(1), opened(2)), (rows(1, 0, (4,)), rows(2, 0, (7,)))))


def known(work: StageWork, session: int) -> tuple[int, list[int]]:
    return work.sessions[session].positions, work.sessions[session].tags.tolist()


def carried(stage: Any, *prompt: int) -> dict[int, Session]:
    """Session 1 as an earlier epoch left it, with the positions of a prompt."""
    work = StageWork(stage, EPOCH, 2)
    work.do(Batch((opened(1),), (rows(1, 0, prompt, Want.NOTHING),)))
    return {1: work.sessions[1].truncated(len(prompt))}


def test_a_session_that_was_carried_over_may_be_opened_once_again(lab: ModuleType) -> None:
    stage = lab.FakeStage(0, 2)
    work = StageWork(stage, EPOCH, 2, carried(stage, 4, 5))
    assert work.do(Batch((opened(1),), ())) == [opened(1)]
    assert len(stage.sequences) == 1
    (failed,) = work.do(Batch((opened(1),), ()))
    assert isinstance(failed, Failed) and failed.text == "session 1 is open already"


def test_a_session_that_was_carried_over_is_not_opened_with_other_parameters(lab: ModuleType) -> None:
    stage = lab.FakeStage(0, 2)
    work = StageWork(stage, EPOCH, 2, carried(stage, 4, 5))
    (failed,) = work.do(Batch((replace(opened(1), context=19),), ()))
    assert isinstance(failed, Failed)


def test_tags_follow_the_rows_that_have_run(lab: ModuleType) -> None:
    stage = lab.FakeStage(0, 2)
    work = StageWork(stage, EPOCH, 2, carried(stage, 4, 5, 6, 7))
    with work.rewinds() as rewinds, work.rewinds() as others:
        work.do(Batch((), (rows(1, 4, (8,)),)))
        assert (known(work, 1), rewinds) == ((5, [5, 7]), {1: 4})
        rewinds.clear()
        work.do(Batch((), (rows(1, 2, (9,)),)))
        assert known(work, 1) == (3, [5])
        work.do(Batch((), (rows(1, 3, (3,)),)))
        assert (known(work, 1), rewinds, others) == ((4, [5, 3]), {1: 2}, {1: 2})
    work.do(Batch((), (rows(1, 1, (9,)),)))
    assert rewinds == others == {1: 2}  # nobody needs them any more
    (failed,) = work.do(Batch((), (rows(1, 9, (1,)),)))
    assert isinstance(failed, Failed) and not work.sessions


def test_rows_of_a_part_leave_later_positions_and_end_at_its_last_stage(lab: ModuleType) -> None:
    stage = lab.FakeStage(0, 2)
    work = StageWork(stage, EPOCH, 2, carried(stage, 4, 5, 6, 7))
    (onward,) = work.do(Batch((), (replace(rows(1, 0, (4, 5), Want.NOTHING), part=(0, 3)),)))
    assert isinstance(onward, Step) and (onward.part, onward.first, onward.rows) == ((0, 3), 0, 2)
    assert known(work, 1) == (4, [5, 7])
    ends = replace(rows(1, 2, (6, 7, 8, 9), Want.NOTHING), part=(0, 2))
    assert work.do(Batch((), (ends,))) == [Result(1, EPOCH, 2, 4, None)]
    assert known(work, 1) == (6, [5, 7, 9])
    others = replace(rows(1, 2, (6, 8), Want.NOTHING), part=(0, 2))
    (failed,) = work.do(Batch((), (others,)))
    assert isinstance(failed, Failed) and "other tokens than those that are to fill it" in failed.text


def test_runs_of_one_call_have_the_same_part(lab: ModuleType) -> None:
    stage = lab.FakeStage(0, 2)
    work = StageWork(stage, EPOCH, 2)
    parts = {1: None, 2: (0, 1), 3: (0, 1), 4: (0, 3)}
    steps = tuple(replace(rows(s, 0, (4,), Want.NOTHING), part=part) for s, part in parts.items())
    answers = work.do(Batch(tuple(opened(s) for s in parts), steps))[4:]
    assert [type(answer) for answer in answers] == [Step, Result, Result, Step]
    assert [[run[0] for run in batch] for batch in stage.batches] == [[1], [2, 3], [4]]


def test_a_session_begins_with_positions_of_another_one(lab: ModuleType) -> None:
    """Also if that one ends, or goes back, right after it; its context is its own."""
    stage = lab.FakeStage(0, lab.UNITS)
    work = StageWork(stage, EPOCH, None)
    work.do(Batch((opened(1),), (rows(1, 0, (4, 5, 6, 7, 8)),)))
    fork = replace(opened(2), source=1, positions=4, context=6)
    (first,) = work.do(Batch((fork,), (rows(1, 2, (9,)),)))
    assert first == Result(1, EPOCH, 2, 1, lab.oracle([4, 5, 9], 1)[0])
    drawn = replace(rows(2, 4, (1,)), draw=Draw(Sampling(seed=3)))
    (second,) = work.do(Batch((Close(1, EPOCH),), (drawn,)))
    assert second == Result(2, EPOCH, 4, 1, lab.oracle([4, 5, 6, 7, 1], 1, Sampling(seed=3))[0])
    assert known(work, 2) == (5, [5, 7]) and work.sessions[2].context == 6
    (failed,) = work.do(Batch((), (rows(2, 5, (1, 2)),)))
    assert isinstance(failed, Failed) and failed.session == 2
    assert not stage.sequences


@pytest.mark.parametrize(
    ("source", "positions", "text"),
    [
        (1, 6, "cannot begin with 6 positions of session 1, which holds 5 here"),
        (1, 0, "cannot begin with 0 positions of session 1, which holds 5 here"),
        (3, 2, "cannot begin with 2 positions of session 3, which is not open here"),
        (2, 2, "cannot begin with 2 positions of session 2, which is not open here"),
        (None, 2, "begins with positions of no other session"),
    ],
)
def test_a_session_cannot_begin_with_what_is_not_there(
    lab: ModuleType, source: int | None, positions: int, text: str
) -> None:
    stage = lab.FakeStage(0, 2)
    work = StageWork(stage, EPOCH, 2)
    work.do(Batch((opened(1),), (rows(1, 0, (4, 5, 6, 7, 8), Want.NOTHING),)))
    fork = replace(opened(2), source=source, positions=positions)
    (failed,) = work.do(Batch((fork,), (rows(2, positions, (1,)),)))  # its rows are dropped
    assert isinstance(failed, Failed) and failed.session == 2 and text in failed.text
    assert list(stage.sequences) == list(work.sessions) == [1]


def test_sessions_share_pages_until_one_writes(lab: ModuleType) -> None:
    stage = lab.FakeStage(0, 2, pages=4)
    work = StageWork(stage, EPOCH, 2)
    work.do(Batch((opened(1),), (rows(1, 0, (1,) * 12, Want.NOTHING),)))  # three pages of four
    fork = replace(opened(2), source=1, positions=12)
    assert not any(isinstance(a, Failed) for a in work.do(Batch((fork,), (rows(2, 12, (5,)),))))
    assert stage.most_pages == 4
    (failed,) = work.do(Batch((), (rows(1, 3, (9,), Want.NOTHING),)))  # it would have to copy its first page
    assert isinstance(failed, Failed) and "5 pages are more than the 4 promised" in failed.text
    assert list(stage.sequences) == [2]
