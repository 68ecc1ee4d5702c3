"""bench/ops.py: the time of a step taken apart."""

from __future__ import annotations

import pytest
from bench import ops

from shoal.engine.batch import Run, Sampling, Want
from shoal.engine.errors import MissingDependencyError
from shoal.engine.model_directory import Model
from shoal.engine.stage import Stage, StageOptions


def test_every_operation_of_a_run_has_its_time_and_its_bytes(tiny_llama: Model) -> None:
    with Stage(tiny_llama, 0, tiny_llama.n_units, StageOptions(threads=1)) as stage:
        clocked = ops.Clocked(stage, tiny_llama)
        stage.open_sequence(0, Sampling(), 8)
        taken = clocked.run([Run(0, 0, [1, 2], Want.NOTHING), Run(0, 2, [3], Want.TOKEN)])
        assert list(taken) == list(dict.fromkeys(clocked.names))
        assert all(seconds > 0 for seconds in taken.values())
        found = {line[2]: line for line in ops.lines(clocked, "tg", [taken, taken], 1, 2, None)}
        table = stage.bound.weights[tiny_llama.n_units - 1, stage.bound.ops[-2][1].weights[0]]
        assert clocked.weights(clocked.names[-2]) == (
            table.data.nbytes + (0 if table.scales is None else table.scales.nbytes),
            table.rows * table.cols,
        )
    assert found["attend"][5]
    assert not found["norm"][5]


def test_another_backend_has_no_clock(tiny_llama: Model) -> None:
    with (
        Stage(tiny_llama, 0, tiny_llama.n_units, StageOptions(backend="numpy")) as stage,
        pytest.raises(MissingDependencyError, match="--backend native"),
    ):
        stage.clock_ops()
