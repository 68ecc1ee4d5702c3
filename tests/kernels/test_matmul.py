"""Matrix products: tiles, tails and parts on every set, against float64."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from .harness import Program, Rows, everywhere, same
from .test_ops import dequantised
from .weights import GROUP, f32, floats, q4, random_q8, random_weight

KINDS = ("Q8", "Q4", "Q4M", "F32")
ROWS = (*range(1, 33), 64, *range(96, 102))
SOME_ROWS = (1, 5, 9, 17, 97)  # of products that are slow by their definition


def program(kind, parts, cols, rng, accumulate=False, biases=()):
    p = Program(max_rows=200)
    x = p.input(cols)
    weights = [random_weight(kind, rng, n, cols) for n in parts]
    inputs = x if kind == "F32" else p.op("QUANTISE", p.buffer(cols, "Q8"), x)
    out = p.input(sum(parts)) if accumulate else p.buffer(sum(parts))
    rows = [-1 if bias is None else p.weight(f32(bias)) for bias in biases]
    places = {"accumulate": int(accumulate), "biases": rows, "n_biases": len(rows)}
    p.op("MATMUL", out, inputs, *map(p.weight, weights), **places)
    p.output(out)
    return p, np.concatenate([w.dense for w in weights])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("parts", "cols"),
    [
        ((16,), 32),
        ((1,), 1),
        ((33,), 33),
        ((48, 16, 16), 100),
        ((5, 7, 31, 2), 64),
        ((100,), 576),
        ((17, 50), 16),
        ((64,), 48),
    ],
)
def test_every_tile_and_tail(kind, parts, cols):
    rng = np.random.default_rng(cols)
    p, dense = program(kind, parts, cols, rng)
    x = floats(rng, max(ROWS), cols)
    seen = (x if kind == "F32" else dequantised(x)).astype(np.float64)
    expected = seen @ dense.T
    size = np.abs(seen) @ np.abs(dense).T
    if kind == "Q4M":  # the parts with the scale and with the min may cancel
        size = size * 20 + np.abs(seen).sum(axis=1, keepdims=True) * 0.3
    for rows in ROWS if cols <= 100 else SOME_ROWS:
        got = everywhere(p, lambda e, rows=rows: e.run([Rows(rows)], [x[:rows]]).outputs)[0]
        assert np.all(np.abs(got - expected[:rows]) <= 1e-6 * size[:rows] + 1e-30)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 5, 17])
def test_added_to_what_is_there(kind, rows):
    rng = np.random.default_rng(rows)
    before, x = floats(rng, rows, 39), floats(rng, rows, 96)
    plain, _ = program(kind, (20, 19), 96, np.random.default_rng(5))
    added, _ = program(kind, (20, 19), 96, np.random.default_rng(5), accumulate=True)
    product = everywhere(plain, lambda e: e.run([Rows(rows)], [x]).outputs)[0]
    same(everywhere(added, lambda e: e.run([Rows(rows)], [x, before]).outputs)[0], before + product)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 4, 5, 17, 97])
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("parts", [(20, 1, 19), (7,), (16, 16, 5, 3)])
def test_a_bias_is_added_to_the_product_before_what_is_there(kind, rows, accumulate, parts):
    """Of the parts, the second has none. Only this order of the two additions gives these bits."""
    rng = np.random.default_rng(rows)
    biases = [None if i == 1 else floats(rng, n) for i, n in enumerate(parts)]
    bias = np.concatenate(
        [np.zeros(n, np.float32) if b is None else b for n, b in zip(parts, biases, strict=True)]
    )
    x, before = floats(rng, rows, 96), floats(rng, rows, sum(parts))
    plain, _ = program(kind, parts, 96, np.random.default_rng(5))
    biased, _ = program(kind, parts, 96, np.random.default_rng(5), accumulate, biases)
    expected = plain.open().run([Rows(rows)], [x]).outputs[0] + bias
    if accumulate:
        expected = before + expected
    inputs = [x, before] if accumulate else [x]
    same(everywhere(biased, lambda e: e.run([Rows(rows)], inputs).outputs)[0], expected)


@pytest.mark.parametrize("rows", [1, 4, 12])
def test_extreme_int8(rows):
    """All products at their largest: no set may saturate or overflow on the way."""
    cols = 4 * GROUP
    p = Program(max_rows=16)
    x = p.input(cols)
    weight = random_q8(np.random.default_rng(0), 32, cols)
    signs = np.where(np.arange(32) % 2, 127, -127).astype(np.int8)
    weight.data[:] = np.tile(np.repeat(signs[:16], 4), weight.data.size // 64).reshape(weight.data.shape)
    weight.scales[:] = np.float16(1).view(np.uint16)
    p.output(p.op("MATMUL", p.buffer(32), p.op("QUANTISE", p.buffer(cols, "Q8"), x), p.weight(weight)))
    data = np.full((rows, cols), 127, np.float32)
    data[::2] = -127
    got = everywhere(p, lambda e: e.run([Rows(rows)], [data]).outputs)[0]
    same(
        got,
        np.float32(127 * 127 * cols)
        * np.sign(data[:, :1])
        * np.sign(np.tile(signs[:16], 2)).astype(np.float32),
    )


@pytest.mark.parametrize("mins", [False, True])
@pytest.mark.parametrize("nibble", [0, 15])
@pytest.mark.parametrize("rows", [1, 4, 12])
def test_extreme_int4(rows, nibble, mins):
    cols = 4 * GROUP
    p = Program(max_rows=16)
    x = p.input(cols)
    ones = np.ones((32, 4), np.float16)
    weight = q4(np.full((32, cols), nibble, np.uint8), ones, -ones if mins else None)
    p.output(p.op("MATMUL", p.buffer(32), p.op("QUANTISE", p.buffer(cols, "Q8"), x), p.weight(weight)))
    data = np.full((rows, cols), 127, np.float32)
    data[::2] = -127
    got = everywhere(p, lambda e: e.run([Rows(rows)], [data]).outputs)[0]
    value = nibble - (1 if mins else 8)
    same(got, np.broadcast_to(np.float32(value * cols) * data[:, :1], got.shape).copy())


@pytest.mark.parametrize("kind", ["Q4", "Q4M"])
def test_definition_of_one_int4_output(kind):
    rng = np.random.default_rng(4)
    p, _ = program(kind, (16,), 3 * GROUP, rng)
    weight = p.weights[0]
    x = floats(rng, 1, 3 * GROUP)
    got = p.open().run([Rows(1)], [x]).outputs[0][0]
    q, of_inputs = quantised(x)
    scales = weight.scales.view(np.float16).reshape(3, 16).astype(np.float32)
    halves = weight.data.reshape(3, 4, 16, 4).transpose(2, 0, 1, 3).reshape(16, 3, 16).astype(int)
    numbers = np.concatenate([halves & 15, halves >> 4], axis=2)
    for output in range(16):
        acc = np.float32(0)
        for g in range(3):
            exact = int((numbers[output, g] - (0 if kind == "Q4M" else 8)) @ q[g])
            acc = fma(exact, scales[g, output] * of_inputs[g], acc)
            if kind == "Q4M":
                low = weight.mins.view(np.float16).reshape(3, 16).astype(np.float32)[g, output]
                acc = fma(int(q[g].sum()), low * of_inputs[g], acc)
        same(np.array([acc]), got[output : output + 1])


def quantised(x):
    """int `[groups, 32]` and the scale of each group, of one row."""
    groups = x.reshape(-1, GROUP)
    amax = np.abs(groups).max(axis=1)
    q = np.rint(np.clip(groups * (np.float32(127) / amax)[:, None], -127, 127)).astype(int)
    return q, amax / np.float32(127)


def fma(a, b, c):
    return rounded(Fraction(a) * Fraction(float(b)) + Fraction(float(c)))


def test_definition_of_one_output():
    """Groups ascending, one fma each, from exact dots: recomputed with exact rationals."""
    rng = np.random.default_rng(3)
    p, _ = program("Q8", (16,), 5 * GROUP, rng)
    weight = p.weights[0]
    x = floats(rng, 1, 5 * GROUP)
    got = p.open().run([Rows(1)], [x]).outputs[0][0]
    q, of_inputs = quantised(x)
    scales = weight.scales.view(np.float16).reshape(5, 16).astype(np.float32)
    lines = weight.data.reshape(5, 8, 16, 4).transpose(2, 0, 1, 3).reshape(16, 5, GROUP).astype(int)
    for output in range(16):
        acc = np.float32(0)
        for g in range(5):
            acc = fma(int(lines[output, g] @ q[g]), scales[g, output] * of_inputs[g], acc)
        same(np.array([acc]), got[output : output + 1])


def rounded(exact):
    """The f32 nearest to a rational, ties to even: f64 is the first guess, its neighbours the rest."""
    guess = np.float32(float(exact))
    near = [np.nextafter(guess, np.float32(-np.inf)), guess, np.nextafter(guess, np.float32(np.inf))]
    return min(near, key=lambda v: (abs(Fraction(float(v)) - exact), int(np.array(v).view(np.int32)) & 1))
