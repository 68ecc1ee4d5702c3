"""bench/chat.py: rows are those that are new, answers are compared, and a difference is not passed over."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
from bench import chat

from shoal.answering import Settings
from shoal.engine.batch import Sampling
from shoal.engine.model_directory import Model
from shoal.engine.stage import Stage, StageOptions

SETTINGS = Settings(200, Sampling(temperature=1.0, seed=2), 4)
TURNS = [[i, i + 1, i + 2] for i in range(10)]


@pytest.fixture
def counted(tiny_llama: Model) -> Iterator[chat.Counted]:
    with Stage(tiny_llama, 0, tiny_llama.n_units, StageOptions(threads=1)) as stage:
        yield chat.Counted(stage)


def test_turns_count_what_is_new(counted: chat.Counted, tiny_llama: Model) -> None:
    with Stage(tiny_llama, 0, tiny_llama.n_units, StageOptions(threads=1)) as stage:
        fresh = chat.Counted(stage)

        def alone(prompt: Sequence[int]) -> tuple[list[int], float]:
            return chat.once(fresh.engine, SETTINGS, prompt)

        said = chat.chat(counted.engine, lambda: counted.rows, alone, SETTINGS, TURNS)
        assert [turn.rows for turn in said] == [3 + 3] + [3 + 1 + 3] * 9
        assert [turn.prompt for turn in said] == [3 + 7 * i for i in range(10)]
        assert all(turn.same for turn in said)
        assert fresh.rows == sum(turn.prompt + 3 for turn in said)
        said = chat.chat(counted.engine, lambda: counted.rows, lambda prompt: ([1], 1.0), SETTINGS, TURNS)
    assert not any(turn.same for turn in said)


def test_the_least_time_counts_and_one_difference_is_enough() -> None:
    good, bad = chat.Turn(5, 3, 0.2, 0.9, True), chat.Turn(5, 3, 0.3, 0.8, False)
    assert chat.best([[good], [bad]]) == [chat.Turn(5, 3, 0.2, 0.8, False)]
    assert chat.best([[good], [good]]) == [good]


@pytest.mark.slow
def test_the_bench_prints_a_table(tiny_llama: Model, capsys: pytest.CaptureFixture[str]) -> None:
    assert chat.main([str(tiny_llama.path), "--turns", "3", "--prompt", "8", "--answer", "3"]) == 0
    out = capsys.readouterr().out
    assert out.count("yes") == 3 and "NO" not in out
    assert "times as long as of the second" in out
