"""Tokens/s of one process with all of SmolLM2-135M in int8: decode of one row, prefill of 128, by threads.

make bench          (pytest-benchmark's table; "OPS" is steps/s: one token for decode, 128 for prefill)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from shoal.commands.pull import pull
from shoal.engine.batch import Run, Want
from shoal.engine.model_directory import Model
from shoal.engine.stage import Stage, StageOptions

PREFILL = 128
DEPTH = 64


@pytest.fixture(scope="module")
def model() -> Model:
    return Model.open(pull("smollm2-135m", "int8"))


@pytest.fixture(params=[1, 2], ids=lambda threads: f"{threads} threads")
def stage(request: pytest.FixtureRequest, model: Model) -> Iterator[Stage]:
    options = StageOptions(backend="native", threads=request.param, max_rows=PREFILL)
    with Stage(model, 0, len(model.program.units), options) as stage:
        stage.open_sequence(0, context=256)
        yield stage


@pytest.mark.benchmark(group="prefill of 128 rows", warmup=True, warmup_iterations=1, max_time=2)
def test_prefill(stage: Stage, benchmark: Any) -> None:
    (result,) = benchmark(stage.run, [Run(0, 0, list(range(1, PREFILL + 1)), Want.TOKEN)])
    assert result.token is not None


@pytest.mark.benchmark(group="decode of 1 row", warmup=True, warmup_iterations=2, max_time=2)
def test_decode(stage: Stage, benchmark: Any) -> None:
    stage.run([Run(0, 0, list(range(1, DEPTH + 1)), Want.NOTHING)])
    (result,) = benchmark(stage.run, [Run(0, DEPTH, [7], Want.TOKEN)])
    assert result.token is not None
