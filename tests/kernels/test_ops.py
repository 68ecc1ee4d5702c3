"""Every op but matmul and attention, over odd shapes: the same bits on every set, near a float64 oracle."""

from __future__ import annotations

import numpy as np
import pytest

from .harness import Program, Rows, everywhere, same
from .weights import ENUM, GROUP, f32, f64, floats, q8, random_weight

ROWS = (1, 2, 3, 5, 8, 9, 17, 64)
COLS = (1, 15, 16, 17, 31, 32, 33, 48, 64, 100, 576)


def groups_of(x):
    padded = np.zeros((len(x), -(-x.shape[1] // GROUP) * GROUP), np.float32)
    padded[:, : x.shape[1]] = x
    return padded.reshape(len(x), -1, GROUP)


def quantised(x):
    """The definition's int8 and scales, in NumPy's own f32 arithmetic."""
    groups = groups_of(x)
    amax = np.abs(groups).max(axis=2, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        inverse = np.where(amax < np.float32(1e-30), np.float32(0), np.float32(127) / amax)
    scale = np.where(amax < np.float32(1e-30), np.float32(0), amax / np.float32(127))
    q = np.rint(np.clip(groups * inverse, np.float32(-127), np.float32(127)))
    return q, scale


def dequantised(x):
    q, scale = quantised(x)
    return (q * scale).reshape(len(x), -1)[:, : x.shape[1]]


def identity(cols):
    """A weight that shows what a q8 row holds: int8 times scale, exactly."""
    return q8(np.eye(cols, dtype=np.int8), np.ones((cols, -(-cols // GROUP)), np.float16))


def one_op(cols, kind, *weights, out_cols=None, out_kind="F32", max_rows=64, **fields):
    """input -> op -> output, with an identity matmul where the op writes q8."""
    p = Program(max_rows=max_rows)
    x, out = p.input(cols), p.buffer(out_cols or cols, out_kind)
    p.op(kind, out, x, *(p.weight(w) for w in weights), **fields)
    if out_kind == "Q8":
        out = p.op("MATMUL", p.buffer(out_cols or cols), out, p.weight(identity(out_cols or cols)))
    p.output(out)
    return p


def run_rows(p, x, **batch):
    return everywhere(p, lambda e: e.run([Rows(len(x))], [x], **batch).outputs)[0]


@pytest.mark.parametrize("cols", [c for c in COLS if c <= 100])
def test_quantise(cols):
    rng = np.random.default_rng(cols)
    x = floats(rng, 64, cols) * np.exp(rng.uniform(-30, 30, (64, 1))).astype(np.float32)
    x[3] = 0
    x[4] = 1e-31
    x[5] = -1e-30
    x[6] = np.float32(3.0e38) * np.sign(x[6])
    x[7] = (np.arange(cols) % 127) + np.float32(0.5)
    x[8] = -0.0
    x[9] = 1e-40
    x[10, :1] = 254  # halves: ties go to even
    x[10, 1:] = np.arange(cols - 1) % 255 - 127
    for rows in ROWS:
        same(
            run_rows(one_op(cols, "QUANTISE", out_kind="Q8"), x[:rows]), dequantised(x[:rows]) + np.float32(0)
        )


@pytest.mark.parametrize("cols", COLS)
def test_norm(cols):
    rng = np.random.default_rng(cols)
    x, w = floats(rng, 64, cols), rng.uniform(0.5, 1.5, cols).astype(np.float32)
    x[1] *= 1e-12
    x[2] = 0
    wide = x.astype(np.float64)
    expected = wide / np.sqrt((wide**2).mean(axis=1, keepdims=True) + 1e-5) * w
    for rows in (1, 3, 64):
        got = run_rows(one_op(cols, "NORM", f32(w), epsilon=1e-5), x[:rows])
        np.testing.assert_allclose(got, expected[:rows], rtol=2e-6)
    if cols <= 100:
        plain = run_rows(one_op(cols, "NORM", f32(w), epsilon=1e-5), x)
        same(
            run_rows(one_op(cols, "NORM", f32(w), out_kind="Q8", epsilon=1e-5), x),
            dequantised(plain) + np.float32(0),
        )


def test_norm_gathers_the_wanted_rows():
    rng = np.random.default_rng(1)
    p = Program(max_rows=64)
    x = p.input(40)
    out = p.output(
        p.op("NORM", p.buffer(40, "F32", "WANTED_ROWS"), x, p.weight(f32(np.ones(40))), epsilon=0.0)
    )
    assert out == 1
    data = floats(rng, 20, 40)
    batch = [Rows(5), Rows(1, wanted=1), Rows(7, wanted=1), Rows(7, wanted=7)]
    got = everywhere(p, lambda e: e.run(batch, [data]).outputs)[0]
    chosen = data[[5, 12, *range(13, 20)]].astype(np.float64)
    np.testing.assert_allclose(got, chosen / np.sqrt((chosen**2).mean(axis=1, keepdims=True)), rtol=2e-6)


def test_nothing_wanted_is_nothing_done():
    p = Program(max_rows=8)
    x = p.input(40)
    normed = p.op("NORM", p.buffer(40, "F32", "WANTED_ROWS"), x, p.weight(f32(np.ones(40))), epsilon=0.0)
    logits = p.output(
        p.op("MATMUL", p.buffer(7, "F32", "WANTED_ROWS"), normed, p.weight(f32(np.ones((7, 40)))))
    )
    p.op("SAMPLE", -1, logits)
    outcome = p.open().run([Rows(8)], [np.ones((8, 40))])
    assert outcome.outputs[0].shape == (0, 7)
    assert outcome.drawn.tolist() == []


@pytest.mark.parametrize("cols", COLS)
@pytest.mark.parametrize("activation", ["SILU", "GELU_TANH"])
def test_gate(cols, activation):
    rng = np.random.default_rng(cols)
    x = floats(rng, 17, 2 * cols) * 4
    edges = np.array(
        [0, -0.0, 1e-30, -1e-30, 86.9, -86.9, 87.1, -87.1, 88.1, -88.1, 100, -100, 1e20, -1e20], np.float32
    )
    x[:14, 0] = edges
    a, up = x[:, :cols].astype(np.float64), x[:, cols:]
    z = a if activation == "SILU" else 2 * np.sqrt(2 / np.pi) * (a + 0.044715 * a**3)
    with np.errstate(over="ignore"):
        expected = a / (1 + np.exp(-z)) * up
    got = run_rows(one_op(2 * cols, "GATE", out_cols=cols, activation=ENUM[activation]), x)
    # Relative to the factors: where exp(-z) is large, an error of z shows in the result by as much.
    np.testing.assert_allclose(got, expected, rtol=1e-5 if activation == "GELU_TANH" else 1e-6, atol=1e-35)
    if cols <= 100:
        rounded = run_rows(
            one_op(2 * cols, "GATE", out_cols=cols, out_kind="Q8", activation=ENUM[activation]), x
        )
        same(rounded, dequantised(got) + np.float32(0))


def angles_program(half, max_rows=64):
    p = Program(max_rows=max_rows)
    frequencies = 10000.0 ** (-np.arange(half) / half)
    p.output(p.op("ANGLES", p.buffer(2 * half), -1, p.weight(f64(frequencies))))
    return p, frequencies


@pytest.mark.parametrize("first", [0, 1, 63, 255, 4096, 131072, 1_000_000, 2**31 - 1000])
def test_angles_are_the_rounded_cosines_and_sines(first):
    half = 33
    p, frequencies = angles_program(half)
    got = everywhere(p, lambda e: e.run([Rows(64, first)]).outputs)[0]
    angle = np.arange(first, first + 64)[:, None].astype(np.float64) * frequencies
    expected = np.concatenate([np.cos(angle), np.sin(angle)], axis=1)
    # An error of 1e-12 in f64 moves the rounding to f32 about once in 100,000 values.
    assert np.count_nonzero(got != expected.astype(np.float32)) <= 1
    np.testing.assert_allclose(got, expected, atol=6e-8)


@pytest.mark.parametrize(
    ("heads", "head_dim", "half"),
    [(1, 16, 8), (3, 48, 24), (9, 64, 32), (2, 64, 1), (5, 33, 16), (2, 100, 41)],
)
def test_rope(heads, head_dim, half):
    rng = np.random.default_rng(head_dim)
    cols = heads * head_dim + 5
    p = Program(max_rows=64)
    x, angles = p.input(cols), p.input(2 * half)
    p.op("ROPE", x, -1, angles=angles, heads=heads, head_dim=head_dim)
    p.output(x)
    data, turn = floats(rng, 17, cols), floats(rng, 17, 2 * half)
    got = everywhere(p, lambda e: e.run([Rows(17)], [data, turn]).outputs)[0]
    expected = data.astype(np.float64)
    per_head = expected[:, : heads * head_dim].reshape(17, heads, head_dim)
    a, b = per_head[..., :half].copy(), per_head[..., half : 2 * half].copy()
    cos, sin = turn[:, None, :half], turn[:, None, half:]
    per_head[..., :half], per_head[..., half : 2 * half] = a * cos - b * sin, b * cos + a * sin
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    untouched = np.ones(cols, bool)
    for h in range(heads):
        untouched[h * head_dim : h * head_dim + 2 * half] = False
    same(got[:, untouched], data[:, untouched])


@pytest.mark.parametrize(
    ("column", "heads", "head_dim"), [(0, 1, 16), (3, 3, 48), (0, 9, 64), (64, 2, 64), (1, 5, 33), (0, 1, 1)]
)
def test_head_norm_is_the_norm_of_each_head_in_place(column, heads, head_dim):
    rng = np.random.default_rng(head_dim)
    first, last = column, column + heads * head_dim
    data, w = floats(rng, 17, last + 5), f32(rng.uniform(0.5, 1.5, head_dim))
    data[1] *= 1e-12
    data[2] = 0
    p = Program(max_rows=64)
    x = p.input(last + 5)
    p.op("HEAD_NORM", x, -1, p.weight(w), column=column, heads=heads, head_dim=head_dim, epsilon=1e-6)
    p.output(x)
    got = everywhere(p, lambda e: e.run([Rows(17)], [data]).outputs)[0]
    per_head = data[:, first:last].reshape(-1, head_dim)
    norm = one_op(head_dim, "NORM", w, max_rows=200, epsilon=1e-6).open()
    normed = norm.run([Rows(len(per_head))], [per_head])
    same(got[:, first:last].reshape(-1, head_dim), normed.outputs[0])
    same(np.delete(got, range(first, last), axis=1), np.delete(data, range(first, last), axis=1))
    wide = per_head.astype(np.float64)
    expected = wide / np.sqrt((wide**2).mean(axis=1, keepdims=True) + 1e-6) * w.dense[0]
    np.testing.assert_allclose(got[:, first:last].reshape(-1, head_dim), expected, rtol=2e-6)


@pytest.mark.parametrize("cols", COLS)
@pytest.mark.parametrize("kind", ["Q8", "Q4", "Q4M", "F32"])
def test_embed(cols, kind):
    rng = np.random.default_rng(cols)
    table = random_weight(kind, rng, 37, cols)
    p = Program(max_rows=64)
    p.output(p.op("EMBED", p.buffer(cols), -1, p.weight(table)))
    tokens = rng.integers(0, 37, 17)
    got = everywhere(p, lambda e: e.run([Rows(17)], tokens=tokens).outputs)[0]
    same(got, table.dense[tokens].astype(np.float32))  # exact in f64, rounded once


def test_inputs_go_out_as_they_came():
    """Copies in and out of the workspace keep rows apart, whatever their length."""
    p = Program(max_rows=64)
    shapes = (1, 17, 64)
    for cols in shapes:
        p.output(p.input(cols))
    data = [floats(np.random.default_rng(c), 9, c) for c in shapes]
    for got, expected in zip(
        everywhere(p, lambda e: e.run([Rows(4), Rows(5)], data).outputs), data, strict=True
    ):
        same(got, expected)
