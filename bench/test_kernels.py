"""One operation at a time, on every instruction set of this CPU but the definition: one thread, weights in
the caches, through the C interface that the engine uses.

make bench          (pytest-benchmark's table; a matmul is preceded by the quantising of its rows)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
from tests.kernels.harness import Executor, Program, Rows, isas
from tests.kernels.weights import f32, f64, floats, random_weight

SETS = [isa for isa in isas() if isa != "scalar"]
SHORT = {"min_time": 0.002, "max_time": 0.15, "min_rounds": 5, "warmup": False}


class Shape(NamedTuple):
    """Of a layer."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int = 64


SHAPES = {"smollm2": Shape(576, 1536, 9, 3), "1.1B": Shape(2048, 5632, 32, 4)}

pytestmark = [
    pytest.mark.parametrize("isa", SETS),
    pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES),
]


def timed(benchmark: Any, executor: Executor, rows: Rows, inputs: list[Any]) -> None:
    """Runs the batch again and again; what it gives is finite."""
    executor.run([rows], inputs)
    out = benchmark(executor.run, [rows], inputs).outputs
    assert np.isfinite(out[0]).all()


@pytest.mark.parametrize("rows", [1, 4, 8, 128])
@pytest.mark.parametrize("kind", ["Q8", "Q4"], ids=["int8", "int4"])
@pytest.mark.benchmark(group="matmul gate | up", **SHORT)
def test_matmul(benchmark: Any, isa: str, shape: Shape, kind: str, rows: int) -> None:
    rng = np.random.default_rng(0)
    p = Program(max_rows=rows)
    x = p.op("QUANTISE", p.buffer(shape.hidden, "Q8"), p.input(shape.hidden))
    weights = [p.weight(random_weight(kind, rng, shape.intermediate, shape.hidden)) for _ in "gu"]
    p.output(p.op("MATMUL", p.buffer(2 * shape.intermediate), x, *weights))
    timed(benchmark, p.open(isa), Rows(rows), [floats(rng, rows, shape.hidden)])


@pytest.mark.parametrize("depth", [0, 512, 2048])
@pytest.mark.benchmark(group="attention of one row", **SHORT)
def test_attention(benchmark: Any, isa: str, shape: Shape, depth: int) -> None:
    rng = np.random.default_rng(0)
    cols, width = (shape.heads + 2 * shape.kv_heads) * shape.head_dim, shape.heads * shape.head_dim
    p = Program(max_rows=depth or 1)
    x = p.input(cols)
    state = p.state(shape.kv_heads, shape.head_dim, "F16")
    p.op("STORE", -1, x, state=state, key=width, value=width + shape.kv_heads * shape.head_dim)
    out = p.op("ATTEND", p.buffer(width), x, state=state, heads=shape.heads, scale=shape.head_dim**-0.5)
    p.output(out)
    executor, filled = p.open(isa), Rows(depth)
    if depth:
        executor.run([filled], [floats(rng, depth, cols)])
    timed(benchmark, executor, Rows(1, depth, pages=filled.pages), [floats(rng, 1, cols)])


@pytest.mark.parametrize("rows", [1, 128])
@pytest.mark.parametrize("op", ["norm", "rope", "quantise"])
@pytest.mark.benchmark(group="norm, rope, quantise", **SHORT)
def test_rows(benchmark: Any, isa: str, shape: Shape, op: str, rows: int) -> None:
    """`quantise` is followed by a product with 16 rows of weights, as int8 can be no output."""
    rng = np.random.default_rng(0)
    p = Program(max_rows=rows)
    x = p.input(shape.hidden)
    if op == "rope":
        frequencies = 10000.0 ** -(np.arange(shape.head_dim // 2) / (shape.head_dim // 2))
        angles = p.op("ANGLES", p.buffer(shape.head_dim), -1, p.weight(f64(frequencies)))
        p.op("ROPE", x, -1, angles=angles, heads=shape.heads, head_dim=shape.head_dim)
        p.output(x)
    elif op == "norm":
        norm = p.weight(f32(np.ones(shape.hidden)))
        p.output(p.op("NORM", p.buffer(shape.hidden), x, norm, epsilon=1e-5))
    else:
        quantised = p.op("QUANTISE", p.buffer(shape.hidden, "Q8"), x)
        column = p.weight(random_weight("Q8", rng, 16, shape.hidden))
        p.output(p.op("MATMUL", p.buffer(16), quantised, column))
    timed(benchmark, p.open(isa), Rows(rows), [floats(rng, rows, shape.hidden)])
