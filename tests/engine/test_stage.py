"""What a stage refuses, and that a refusal loses nothing."""

from __future__ import annotations

import threading
import weakref
from copy import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from shoal.engine.batch import Run, Sampling, Want
from shoal.engine.errors import (
    CancelledRunError,
    ContextError,
    MissingDependencyError,
    ShoalError,
    UnsupportedModelError,
)
from shoal.engine.generate import Session, check_prompt, generate
from shoal.engine.layout import PAGE
from shoal.engine.model_directory import Model
from shoal.engine.stage import Stage, StageOptions


@pytest.fixture
def stage(tiny_int8: Model) -> Stage:
    return Stage(tiny_int8, 0, len(tiny_int8.program.units))


def test_runs_that_do_not_fit_are_refused_and_nothing_is_lost(stage: Stage) -> None:
    stage.open_sequence(1, Sampling(), 40)
    (before,) = stage.run([Run(1, 0, [5, 6, 7], Want.TOKEN)])
    for run, error in (
        (Run(2, 0, [1], Want.TOKEN), "not open"),
        (Run(1, 4, [1], Want.TOKEN), "holds 3 positions"),
        (Run(1, 3, [], Want.TOKEN), "0 rows"),
        (Run(1, 3, [-1], Want.TOKEN), "token id"),
        (Run(1, 3, [267], Want.TOKEN), "token id"),
    ):
        with pytest.raises(ValueError, match=error):
            stage.run([run])
    with pytest.raises(ContextError, match="more than its context"):
        stage.run([Run(1, 3, [1] * 38, Want.TOKEN)])
    with pytest.raises(ValueError, match="twice"):
        stage.run([Run(1, 3, [1], Want.TOKEN), Run(1, 3, [1], Want.TOKEN)])
    (after,) = stage.run([Run(1, 2, [7], Want.TOKEN)])
    assert after.token == before.token


def test_after_an_error_positions_of_the_batch_hold_nothing(tiny_int8: Model) -> None:
    with Stage(tiny_int8, 0, len(tiny_int8.program.units), StageOptions(max_wanted=4)) as stage:
        stage.open_sequence(0, Sampling(), 110)
        stage.run([Run(0, 0, [1] * 101, Want.NOTHING)])
        with pytest.raises(ValueError, match="logits of more than 4 rows"):
            stage.run([Run(0, 5, [2] * 40, Want.LOGITS)])
        with pytest.raises(ValueError, match="holds 5 positions"):
            stage.run([Run(0, 100, [1], Want.TOKEN)])


def test_a_middle_stage_needs_hidden_rows_of_its_width(tiny_int8: Model) -> None:
    with Stage(tiny_int8, 1, 3) as middle:
        middle.open_sequence(0, Sampling(), 10)
        for hidden in (None, np.zeros((2, 72), np.float32), np.zeros((1, 71), np.float32)):
            with pytest.raises(ValueError, match="hidden rows of shape"):
                middle.run([Run(0, 0, [1], Want.NOTHING, hidden)])
        for bad in (np.nan, np.inf):
            with pytest.raises(FloatingPointError):
                middle.run([Run(0, 0, [1], Want.NOTHING, np.full((1, 72), bad, np.float32))])
        (good,) = middle.run([Run(0, 0, [1], Want.NOTHING, np.ones((1, 72), np.float32))])
        assert good.hidden is not None and good.hidden.shape == (1, 72)


def test_a_cap_on_keys_and_values_holds(tiny_int8: Model) -> None:
    page = 2 * PAGE * 2 * 16 * 2  # keys and values, positions, kv heads, head_dim, bytes
    with Stage(tiny_int8, 0, 5, StageOptions(kv_bytes=4 * page)) as stage:
        stage.open_sequence(0, Sampling(), 2 * PAGE)
        stage.run([Run(0, 0, [1] * PAGE, Want.NOTHING)])
        assert stage.kv_bytes == 3 * page
        with pytest.raises(ContextError, match="promise more RAM"):
            stage.run([Run(0, PAGE, [1], Want.TOKEN)])
        stage.close_sequence(0)
        assert stage.kv_bytes == 0
        stage.open_sequence(1, Sampling(), 64)
        (result,) = stage.run([Run(1, 0, [1] * 64, Want.TOKEN)])
        assert result.token is not None


@pytest.mark.parametrize("backend", ["native", "numba"])
def test_a_rehearsal_of_a_run_changes_nothing(tiny_int8: Model, backend: str) -> None:
    """Neither in the first stage of two, nor in the second, nor on the edges of pages."""

    def rows(rehearse: bool) -> list[bytes]:
        found = []
        options = StageOptions(backend, threads=2)
        with (
            Stage(tiny_int8, 0, 2, options) as front,
            Stage(tiny_int8, 2, tiny_int8.n_units, options) as back,
        ):
            for stage in (front, back):
                stage.open_sequence(1, Sampling(temperature=1.0, presence_penalty=1.0))
            for first, ids in ((0, [5] * (PAGE - 3)), *((PAGE - 3 + i, [i]) for i in range(6)), (2, [7])):
                for stage in (front, back) if rehearse else ():
                    held = stage.kv_bytes, stage._sequences[1].length
                    stage.rehearse(1)
                    stage.rehearse(2)
                    assert (stage.kv_bytes, stage._sequences[1].length) == held
                    assert not stage.cancelled(1)
                hidden = front.run([Run(1, first, ids, Want.TOKEN)])[0].hidden
                result = back.run([Run(1, first, ids, Want.TOKEN, hidden)])[0]
                found.append(str(result.token).encode() + front.export_positions(1, 1, 0, first + len(ids)))
        return found

    assert rows(rehearse=True) == rows(rehearse=False)


def test_generation_stops_where_it_should(stage: Stage) -> None:
    tokens = list(generate(stage, [1, 2, 3], max_tokens=20))
    assert len(tokens) == 20
    assert (
        list(generate(stage, [1, 2, 3], max_tokens=20, end={tokens[4]})) == tokens[: tokens.index(tokens[4])]
    )
    assert list(generate(stage, [1, 2, 3], max_tokens=99, context=8)) == tokens[:6]
    with pytest.raises(ContextError, match="8 tokens and the context holds 8"):
        list(generate(stage, [1] * 8, context=8))
    with pytest.raises(ContextError, match="empty"):
        check_prompt([], 8)
    check_prompt([1, 7], 8, 8)
    with pytest.raises(UnsupportedModelError, match="the token 8 and the model's embedding has 8"):
        check_prompt([1, 8], 8, 8)
    seeded = Sampling(temperature=0.8, top_k=40, top_p=0.95, seed=11)
    drawn = list(generate(stage, [1, 2, 3], seeded, max_tokens=20))
    assert drawn == list(generate(stage, [1, 2, 3], seeded, max_tokens=20))
    assert drawn != tokens


def many_runs(stage: Stage) -> None:
    for _ in range(1000):
        stage.run([Run(0, 100, [2] * 200, Want.TOKEN)])


@pytest.mark.parametrize("backend", ["native", "numpy", "numba"])
def test_a_run_can_be_cancelled_from_another_thread_and_repeated(tiny_int8: Model, backend: str) -> None:
    with Stage(tiny_int8, 0, len(tiny_int8.program.units), StageOptions(backend=backend)) as stage:
        stage.cancel()  # no run is under way: nothing happens
        stage.open_sequence(0, Sampling(), 512)
        (before,) = stage.run([Run(0, 0, [1] * 100, Want.TOKEN)])
        stop = threading.Event()

        def cancel() -> None:
            while not stop.is_set():
                stage.cancel()

        thread = threading.Thread(target=cancel)
        thread.start()
        try:
            with pytest.raises(CancelledRunError, match="cancelled"):
                many_runs(stage)  # a cancellation that comes between two runs ends none
        finally:
            stop.set()
            thread.join()
        with pytest.raises(ValueError, match="holds 100 positions"):
            stage.run([Run(0, 101, [1], Want.TOKEN)])
        (after,) = stage.run([Run(0, 99, [1], Want.TOKEN)])
        assert after.token == before.token


@pytest.mark.parametrize("end", [None, [], [4], {2, 4}])
def test_an_answer_ends_at_the_models_end_tokens_unless_told_otherwise(
    stage: Stage, end: list[int] | None
) -> None:
    tokens = list(generate(stage, [1, 2, 3], max_tokens=20, end=()))
    assert len(tokens) == 20
    stage.model = copy(stage.model)
    stage.model.config = replace(stage.model.config, eos=(tokens[2], tokens[6]))
    wanted = stage.model.config.eos if end is None else [tokens[i] for i in end]
    answer = list(generate(stage, [1, 2, 3], max_tokens=20, end=None if end is None else wanted))
    stops = [i for i, token in enumerate(tokens) if token in wanted]
    assert answer == tokens[: stops[0] if stops else None]
    with Session(stage) as session:
        assert list(session.answer([1, 2, 3], max_tokens=20, end=None if end is None else wanted)) == answer


@pytest.mark.parametrize("units", [(0, 4), (1, 5), (2, 3)])
def test_an_answer_needs_all_units(tiny_int8: Model, units: tuple[int, int]) -> None:
    with Stage(tiny_int8, *units) as part, pytest.raises(ValueError, match="an answer needs all 5"):
        next(generate(part, [1, 2, 3]))


def test_unknown_kernels_are_named(tiny_int8: Model) -> None:
    with pytest.raises(MissingDependencyError, match="choose one of scalar"):
        Stage(tiny_int8, 0, 5, StageOptions(isa="mmx"))
    with pytest.raises(ShoalError, match="there is no backend"):
        Stage(tiny_int8, 0, 5, StageOptions(backend="cuda"))


def test_a_closed_stage_refuses_work(tiny_int8: Model) -> None:
    with Stage(tiny_int8, 0, 5) as stage:
        pass
    stage.close()
    with pytest.raises(ValueError, match="has been closed"):
        list(generate(stage, [1, 2, 3], max_tokens=2))


def test_a_closed_stage_has_no_pages_whoever_still_refers_to_it(tiny_int8: Model) -> None:
    stage = Stage(tiny_int8, 0, 5)
    stage.open_sequence(1)
    stage.run([Run(1, 0, [1, 2, 3], Want.NOTHING)])
    page = weakref.ref(next(iter(stage._sequences.values())).kv._rows[0][1][0].bytes)
    parts = stage._pool, stage._ranges.running, stage.incoming()
    stage.close()
    assert page() is None
    assert len(parts) == 3


ADJUSTED = [
    Sampling(presence_penalty=1.5),
    Sampling(temperature=1.2, frequency_penalty=0.7, seed=3),
    Sampling(temperature=1.2, repetition_penalty=1.3, presence_penalty=-0.4, top_k=20, seed=4),
    Sampling(temperature=0.9, bias=((7, 3.0), (2, -50.0)), top_p=0.9, seed=5),
]


@pytest.mark.parametrize("sampling", ADJUSTED)
def test_penalties_and_biases_draw_the_same_tokens_by_the_definition(
    tiny_f32: Model, sampling: Sampling
) -> None:
    drawn = []
    for backend in ("native", "numpy", "numba"):
        with Stage(tiny_f32, 0, tiny_f32.n_units, StageOptions(backend=backend)) as stage:
            drawn.append(list(generate(stage, [1, 2, 3, 3], sampling, max_tokens=40, end=())))
            plain = list(
                generate(stage, [1, 2, 3, 3], replace(PLAIN, seed=sampling.seed), max_tokens=40, end=())
            )
    assert drawn[0] == drawn[1] == drawn[2]
    assert drawn[0] != plain


PLAIN = Sampling(temperature=1.2)


@pytest.mark.parametrize("backend", ["native", "numpy", "numba"])
def test_log_probabilities_and_masks(tiny_f32: Model, backend: str) -> None:
    vocab = tiny_f32.program.vocab
    mask = np.zeros(vocab, bool)
    mask[[5, 9]] = True
    allowed = np.packbits(mask, bitorder="little")
    with Stage(tiny_f32, 0, tiny_f32.n_units, StageOptions(backend=backend)) as stage:
        for sequence in range(3):
            stage.open_sequence(sequence, replace(PLAIN, seed=sequence))
        (whole,) = stage.run([Run(0, 0, [1, 2, 3], Want.LOGITS)])
        assert whole.logits is not None
        expected = whole.logits[-1].astype(np.float64)
        expected -= np.log(np.exp(expected).sum())
        one, two, three = stage.run(
            [
                Run(0, 0, [1, 2, 3], Want.TOKEN, report=4),
                Run(1, 0, [1, 2, 3], Want.TOKEN, report=0, allowed=allowed),
                Run(2, 0, [1, 2, 3], Want.TOKEN),
            ]
        )
        assert three.logprobs == ()
        assert one.token is not None and two.token in (5, 9)
        ((told,), (other,)) = one.logprobs, two.logprobs
        assert told.drawn == pytest.approx(expected[one.token], abs=1e-5)
        assert other.drawn == pytest.approx(expected[two.token], abs=1e-5)
        assert [token for token, _ in told.likeliest] == np.argsort(-expected)[:4].tolist()
        assert [value for _, value in told.likeliest] == pytest.approx(sorted(expected)[:-5:-1], abs=1e-5)
        for bad, words in (
            (np.zeros(3, np.uint8), "a mask of"),
            (np.zeros_like(allowed), "allows no token"),
            (allowed.astype(np.int64), "a mask of"),
        ):
            with pytest.raises(ValueError, match=words):
                stage.run([Run(0, 3, [4], Want.TOKEN, allowed=bad)])
        with pytest.raises(ValueError, match="more than 64"):
            stage.run([Run(0, 3, [4], Want.TOKEN, report=65)])
        with pytest.raises(ValueError, match="a token id is not in"):
            stage.open_sequence(9, Sampling(bias=((vocab, 1.0),)))


@pytest.mark.parametrize(
    "values",
    [{"bias": ((1, 1.0), (1, 2.0))}, {"bias": ((-1, 1.0),)}, {"bias": ((1, float("nan")),)}],
)
def test_biases_that_cannot_be_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="bias"):
        Sampling(**values)


@pytest.mark.parametrize(
    "values",
    [
        {"presence_penalty": float("nan")},
        {"frequency_penalty": 1e30},
        {"top_p": 1e-50},
        {"temperature": 1e300},
        {"temperature": float("nan")},
        {"repetition_penalty": 1e39},
    ],
)
def test_sampling_that_floats_cannot_hold_is_refused(values: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="out of range"):
        Sampling(**values)
