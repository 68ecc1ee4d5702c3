"""bench/turns.py: the cases differ in depth and sequences, and ratios are to a round's first case."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from bench import turns

from shoal.engine.batch import Result, Run
from shoal.engine.convert import convert
from shoal.engine.model_directory import Model
from shoal.engine.stage import Stage, StageOptions

CHECKPOINT = Path(__file__).resolve().parents[1] / "fixtures/tiny-llama"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("turns") / "tiny-llama"
    convert(CHECKPOINT, directory)
    return directory


def test_every_case_steps_at_its_depth(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = Model.open(tiny), list[tuple[int, int]]()
    with Stage(model, 0, model.n_units, StageOptions(backend="numpy")) as stage:
        run = stage.run

        def watched(batch: Sequence[Run]) -> list[Result]:
            seen.append((batch[0].first, len(batch)))
            return run(batch)

        monkeypatch.setattr(stage, "run", watched)
        rounds = turns.compare(stage, [(0, 1), (40, 2)], 0.0)
    assert np.shape(rounds) == (3, 2) and np.min(rounds) > 0
    steps = seen[-2 * turns.STEPS :]
    assert steps[: turns.STEPS] == [(i, 1) for i in range(turns.STEPS)]
    assert steps[turns.STEPS :] == [(40 + i, 2) for i in range(turns.STEPS)]


def test_ratios_are_within_a_round() -> None:
    rounds = [[1e-3, 2e-3], [2e-3, 4e-3], [5e-3, 10e-3]]
    first, second = turns.rows([(0, 1), (8, 4)], 2, rounds)
    assert first[:3] == ["2", "0", "1"] and second[:3] == ["2", "8", "4"]
    assert second[3:] == ["4.00", "1000.0", "2.00 (2.00 to 2.00)", "0.50", "3"]


def test_the_table(tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(tiny), "--depths", "0,16", "--batch", "1,2", "--threads", "1", "--seconds", "0"]
    monkeypatch.setattr("sys.argv", ["turns", *arguments])
    assert turns.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines[2:]] == [["1", d, n] for d in ("0", "16") for n in ("1", "2")]
