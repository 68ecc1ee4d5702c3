"""What a stage's activations are promised to take, beside what the C library plans for them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from shoal.engine.costs import constant_bytes
from shoal.engine.layout import PART_BYTES
from shoal.engine.model_directory import Model
from shoal.engine.stage import Stage, StageOptions
from shoal.planning import message_bytes, planner_model, scratch_bytes, workspace_bytes

OPTIONS = StageOptions("native", max_rows=8, max_wanted=2)


def test_a_lone_embedding_or_head_is_promised_its_own_buffers_and_layers_all(tiny_int8: Model) -> None:
    program, rows = tiny_int8.program, planner_model(tiny_int8, OPTIONS)
    hidden = 8 * -(-4 * program.cut_cols // 64) * 64
    always = constant_bytes(program) + message_bytes(tiny_int8, OPTIONS)
    embedding, *layers, head = (unit.workspace_bytes - always for unit in rows.units)
    assert embedding == 2 * hidden
    assert 2 * hidden + 2 * 4 * program.vocab < head < layers[0] == max(layers)
    assert layers[0] == workspace_bytes(tiny_int8, OPTIONS, 0, tiny_int8.n_units)


@pytest.mark.parametrize("threads", [1, 8])
@pytest.mark.parametrize("edges", [(0, 1), (1, 2), (-1, 0), (0, 0)])
def test_no_stage_takes_more_than_promised(tiny_int8: Model, edges: tuple[int, int], threads: int) -> None:
    first, last = edges[0] % tiny_int8.n_units, edges[1] or tiny_int8.n_units
    options = replace(OPTIONS, threads=threads)
    shared = PART_BYTES if threads > 1 else 0
    drawing = scratch_bytes(tiny_int8, threads) - shared if last == tiny_int8.n_units else 0
    with Stage(tiny_int8, first, last, options) as stage:
        taken = stage._executor.workspace_bytes
        assert shared + drawing < taken
        assert taken <= workspace_bytes(tiny_int8, options, first, last) + shared + drawing
