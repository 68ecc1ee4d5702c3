"""A sequence that stays open from answer to answer: fewer rows, the same tokens."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from shoal.engine.batch import Result, Run, Sampling, common_prefix
from shoal.engine.convert import convert
from shoal.engine.errors import ContextError
from shoal.engine.generate import Session, generate
from shoal.engine.model_directory import Model
from shoal.engine.stage import Stage, StageOptions

TINY = Path(__file__).parents[1] / "fixtures" / "tiny-llama"
# The penalty looks at the whole context, and the draws at seed and position.
LIVELY = Sampling(temperature=1.5, top_p=0.95, repetition_penalty=1.3, seed=11)
FRESH = 1000


class Counting:
    """A stage, and the rows that it was given."""

    def __init__(self, stage: Stage) -> None:
        self.stage, self.rows = stage, 0
        self._run = stage.run
        stage.run = self.run  # type: ignore[method-assign]

    def run(self, batch: list[Run]) -> list[Result]:
        self.rows += sum(len(run.tokens) for run in batch)
        return self._run(batch)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    path = tmp_path_factory.mktemp("session") / "tiny"
    convert(TINY, path, dtype="int8")
    return Model.open(path)


@pytest.fixture(scope="module")
def stage(model: Model) -> Iterator[Stage]:
    with Stage(model, 0, model.n_units, StageOptions(max_rows=8)) as opened:
        yield opened


@pytest.mark.parametrize("sampling", [Sampling(), LIVELY], ids=["greedy", "lively"])
def test_ten_turns_compute_what_is_new_and_draw_what_a_fresh_prompt_draws(
    model: Model, sampling: Sampling
) -> None:
    with Stage(model, 0, model.n_units, StageOptions(max_rows=8)) as stage:
        counting = Counting(stage)
        with Session(stage, sampling, context=200) as session:
            known: list[int] = []
            for turn in range(10):
                prompt = [*known, *range(20 + turn, 32 + turn)]
                before = counting.rows
                answer = list(session.answer(prompt, max_tokens=5))
                # 12 new tokens of the prompt, and of the answers all but the last of each.
                assert counting.rows - before == 12 + 4 + (1 if turn else 0)
                fresh = generate(stage, prompt, sampling, max_tokens=5, context=200, sequence=FRESH)
                assert answer == list(fresh)
                known = prompt + answer
        assert stage.kv_bytes == 0


def test_prompts_that_part_anywhere_and_answers_that_are_left_draw_the_same(stage: Stage) -> None:
    rng = random.Random(4)
    with Session(stage, LIVELY, context=100) as session:
        known = [3]
        for _ in range(60):
            kept = known[: rng.randint(0, len(known))]
            prompt = [*kept, *(rng.randrange(5) for _ in range(rng.randint(0 if kept else 1, 20)))][:90]
            count, taken = rng.randint(0, 12), rng.randint(1, 12)
            tokens = session.answer(prompt, max_tokens=count, end=(7, 8, 9))
            answer = [token for token, _ in zip(tokens, range(taken), strict=False)]
            tokens.close()
            fresh = generate(
                stage, prompt, LIVELY, max_tokens=count, end=(7, 8, 9), context=100, sequence=FRESH
            )
            assert answer == list(fresh)[:taken]
            known = prompt + answer


@pytest.mark.parametrize("at", range(4))
def test_an_answer_goes_on_rightly_after_ctrl_c_anywhere(
    stage: Stage, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before or after the stage has computed: in a chunk of the prompt, or in a step."""
    run, calls = stage.run, 0

    def interrupted(batch: list[Run]) -> list[Result]:
        nonlocal calls
        calls += 1
        if calls == at + 1 and at % 2 == 0:
            raise KeyboardInterrupt
        results = run(batch)
        if calls == at + 1:
            raise KeyboardInterrupt
        return results

    with Session(stage, LIVELY, context=100) as session:
        monkeypatch.setattr(stage, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(session.answer(range(20, 40), max_tokens=5))
        monkeypatch.undo()
        prompt = [*range(20, 40), 5]
        fresh = generate(stage, prompt, LIVELY, max_tokens=5, context=100, sequence=FRESH)
        assert list(session.answer(prompt, max_tokens=5)) == list(fresh)


def test_a_session_survives_a_prompt_that_does_not_fit(stage: Stage) -> None:
    with Session(stage, context=30) as session:
        known = list(range(10, 20))
        known += session.answer(known, max_tokens=3)
        with pytest.raises(ContextError, match="the context holds 30"):
            list(session.answer([*known, *range(20)], max_tokens=1))
        fresh = generate(stage, known, max_tokens=99, context=30, sequence=FRESH)
        answer = list(session.answer(known, max_tokens=99))
        assert answer == list(fresh)
        assert len(known) + len(answer) == 31


def test_a_session_survives_pages_that_are_used_up(model: Model) -> None:
    with Stage(model, 0, model.n_units, StageOptions(kv_bytes=0)) as stage, Session(stage) as session:
        for _ in range(2):
            with pytest.raises(ContextError, match="have filled"):
                list(session.answer([1, 2], max_tokens=1))


@pytest.mark.parametrize(
    ("a", "b", "n"),
    [
        *[((), (), 0), ((1,), (), 0), ((1, 2), (1, 2), 2), ((1, 2, 3), (1, 9, 3), 1), ((1, 2), (1, 2, 3), 2)],
        *[((1,) * 600, (*[1] * at, 2, *[1] * 600), at) for at in (0, 255, 256, 257, 511, 512, 599)],
        ((1,) * 512, (1,) * 600, 512),
    ],
)
def test_common_prefix(a: tuple[int, ...], b: tuple[int, ...], n: int) -> None:
    assert common_prefix(a, b) == common_prefix(b, list(a)) == n


def test_an_answer_that_goes_on_after_another_has_begun_is_refused(stage: Stage) -> None:
    with Session(stage) as session:
        first = session.answer([1, 2, 3], max_tokens=9, end=())
        next(first)
        second = list(session.answer([1, 2, 3, 4, 5, 6, 7], max_tokens=9, end=()))
        with pytest.raises(ValueError, match="a later answer of this session has begun"):
            next(first)
        assert list(session.answer([1, 2, 3, 4, 5, 6, 7], max_tokens=9, end=())) == second
