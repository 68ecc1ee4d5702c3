"""Storing keys and values, and attention over them: pages, blocks and masks, against a float64 softmax."""

from __future__ import annotations

import numpy as np
import pytest

from .harness import Program, Rows, everywhere
from .weights import LANES, PAGE, floats


def program(heads, kv_heads, dim, kind, max_rows=400, extra=0):
    """q | k | v in one input, with `extra` columns before, as a family may lay them out."""
    p = Program(max_rows=max_rows)
    x = p.input(extra + (heads + 2 * kv_heads) * dim)
    state = p.state(kv_heads, dim, kind)
    p.op("STORE", -1, x, state=state, i=[extra + heads * dim, extra + (heads + kv_heads) * dim])
    p.output(p.op("ATTEND", p.buffer(heads * dim), x, state=state, i=[extra, heads], f=[dim**-0.5]))
    return p


def stored(x, kind):
    """What `[..., head_dim]` is once it was stored, in float64."""
    if kind == "Q8":
        q, scale = quantised_heads(x)
        return q * scale.astype(np.float64)
    return x.astype(np.float16 if kind == "F16" else np.float32).astype(np.float64)


def quantised_heads(x):
    amax = np.abs(x).max(axis=-1, keepdims=True)
    q = np.rint(np.clip(x * (np.float32(127) / amax), -127, 127))
    return q, amax / np.float32(127)


def oracle(x, heads, kv_heads, dim, kind, extra=0):
    rows = len(x)
    q = x[:, extra : extra + heads * dim].reshape(rows, heads, dim).astype(np.float64)
    k, v = stored(x[:, extra + heads * dim :].reshape(rows, 2, kv_heads, dim), kind).transpose(1, 0, 2, 3)
    out = np.empty((rows, heads, dim))
    for h in range(heads):
        scores = q[:, h] @ k[:, h // (heads // kv_heads)].T * dim**-0.5
        scores[np.triu_indices(rows, 1)] = -np.inf
        p = np.exp(scores - scores.max(axis=1, keepdims=True))
        out[:, h] = p @ v[:, h // (heads // kv_heads)] / p.sum(axis=1, keepdims=True)
    return out.reshape(rows, -1)


@pytest.mark.parametrize("kind", ["F16", "F32", "Q8"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"), [(1, 1, 16), (3, 1, 64), (9, 3, 64), (8, 1, 32), (4, 4, 48), (10, 2, 80)]
)
def test_one_run_of_rows(heads, kv_heads, dim, kind):
    rng = np.random.default_rng(heads)
    p = program(heads, kv_heads, dim, kind)
    x = floats(rng, 70, p.buffers[0][1])
    x[:, : heads * dim] *= 3
    for rows in (1, 2, 3, 17, 70):
        got = everywhere(p, lambda e, rows=rows: e.run([Rows(rows)], [x[:rows]]).outputs)[0]
        atol = 4e-6 if kind == "Q8" else 2e-6  # weights are rounded once more
        np.testing.assert_allclose(got, oracle(x[:rows], heads, kv_heads, dim, kind), rtol=2e-5, atol=atol)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["F16", "F32", "Q8"])
def test_over_pages_and_blocks(kind):
    """Runs that end and begin around multiples of 16, 64 and 256, then single rows."""
    rng = np.random.default_rng(2)
    heads, kv_heads, dim = 3, 1, 32
    p = program(heads, kv_heads, dim, kind, extra=7)
    x = floats(rng, 530, p.buffers[0][1])
    ends = [1, 15, 16, 17, 63, 64, 66, 130, 255, 256, 257, 320, 500, 511, 512, 513, 530]

    def work(executor):
        sequence, got = Rows(0), []
        for first, end in zip([0, *ends], ends, strict=False):
            sequence.first, sequence.rows = first, end - first
            got.append(executor.run([sequence], [x[first:end]]).outputs[0])
        return [np.concatenate(got)]

    got = everywhere(p, work)[0]
    np.testing.assert_allclose(got, oracle(x, heads, kv_heads, dim, kind, extra=7), rtol=2e-5, atol=2e-6)
    whole = p.open()
    at_once = [whole.run([Rows(400)], [x[:400]]).outputs[0]]
    np.testing.assert_array_equal(np.concatenate(at_once), got[:400])


def test_pages_hold_what_the_header_says():
    rng = np.random.default_rng(3)
    heads, kv_heads, dim = 2, 2, 32
    for kind in ("F16", "F32"):
        p = program(heads, kv_heads, dim, kind)
        x = floats(rng, 5, p.buffers[0][1]) * 1000
        x[0, heads * dim :] = 1e-6  # subnormal in f16

        def pages(executor, x=x):
            sequence = Rows(5, 62)
            executor.run([sequence], [x], want=False)  # positions before 62 hold NaN here
            return [np.stack(sequence.pages[0]).astype(np.float32)]

        got = everywhere(p, pages)[0].reshape(2, kv_heads, 2, PAGE * dim)
        keys = (
            got[:, :, 0]
            .reshape(2, kv_heads, PAGE // LANES, dim, LANES)
            .transpose(0, 2, 4, 1, 3)
            .reshape(2 * PAGE, kv_heads, dim)
        )
        values = (
            got[:, :, 1]
            .reshape(2, kv_heads, PAGE, dim)
            .transpose(0, 2, 1, 3)
            .reshape(2 * PAGE, kv_heads, dim)
        )
        stored = x[:, heads * dim :].astype(np.float16 if kind == "F16" else np.float32).astype(np.float32)
        np.testing.assert_array_equal(keys[62:67].reshape(5, -1), stored[:, : kv_heads * dim])
        np.testing.assert_array_equal(values[62:67].reshape(5, -1), stored[:, kv_heads * dim :])
        untouched = np.ones(2 * PAGE, bool)
        untouched[62:67] = False
        assert np.isnan(keys[untouched]).all() and np.isnan(values[untouched]).all()


def test_int8_pages_hold_numbers_and_scales():
    rng = np.random.default_rng(7)
    heads, kv_heads, dim = 2, 2, 48
    p = program(heads, kv_heads, dim, "Q8")
    x = floats(rng, 5, p.buffers[0][1])
    x[2, heads * dim : heads * dim + dim] = 0

    def pages(executor):
        sequence = Rows(5, 62)
        executor.run([sequence], [x], want=False)
        return [np.stack(sequence.pages[0]).astype(np.float32)]

    raw = everywhere(p, pages)[0].astype(np.int8).reshape(2, kv_heads, 2 * PAGE * dim + 8 * PAGE)
    numbers = raw[:, :, : 2 * PAGE * dim].reshape(2, kv_heads, 2, PAGE * dim)
    scales = raw[:, :, 2 * PAGE * dim :].copy().view(np.float32).reshape(2, kv_heads, 2, PAGE)
    keys = numbers[:, :, 0].reshape(2, kv_heads, PAGE // LANES, dim, LANES).transpose(0, 2, 4, 1, 3)
    values = numbers[:, :, 1].reshape(2, kv_heads, PAGE, dim).transpose(0, 2, 1, 3)
    wanted = x[:, heads * dim :].reshape(5, 2, kv_heads, dim)
    wanted_scales = np.abs(wanted).max(axis=-1) / np.float32(127)
    with np.errstate(divide="ignore", invalid="ignore"):
        q = np.nan_to_num(quantised_heads(wanted)[0])
    np.testing.assert_array_equal(keys.reshape(2 * PAGE, kv_heads, dim)[62:67], q[:, 0])
    np.testing.assert_array_equal(values.reshape(2 * PAGE, kv_heads, dim)[62:67], q[:, 1])
    by_position = scales.transpose(0, 3, 2, 1).reshape(2 * PAGE, 2, kv_heads)
    np.testing.assert_array_equal(by_position[62:67], wanted_scales)
    assert np.isnan(by_position[:62]).all() and np.isnan(by_position[67:]).all()


def test_f16_rounds_to_nearest_even_on_every_set():
    """All exponents, ties, subnormals and the edge of infinity, through a page."""
    p = program(1, 1, 16, "F16")
    rng = np.random.default_rng(4)
    edges = [
        0.0,
        2.0**-24,
        2.0**-25,
        1.5 * 2.0**-25,
        2.0**-14,
        65504.0,
        65519.9,
        1 + 2.0**-11,
        1 + 3 * 2.0**-11,
        2.0**-14 - 2.0**-25,
        6e-8,
    ]
    values = np.concatenate(
        [edges, np.negative(edges), rng.uniform(1, 2, 362) * 2.0 ** rng.integers(-27, 15, 362)]
    ).astype(np.float32)
    x = np.zeros((24, 48), np.float32)
    x[:, 16:32] = values[:384].reshape(24, 16)
    x[:, 32:] = x[:, 16:32]

    def pages(executor):
        sequence = Rows(24)
        executor.run([sequence], [x])
        return [np.stack(sequence.pages[0]).view(np.uint16).astype(np.int32)]

    got = everywhere(p, pages)[0].reshape(2, PAGE * 16)[1].reshape(PAGE, 16)[:24]
    np.testing.assert_array_equal(got, x[:, 16:32].astype(np.float16).view(np.uint16))


def test_large_scores_stay_finite():
    p = program(2, 1, 16, "F32")
    x = floats(np.random.default_rng(5), 300, 64) * 1000
    got = everywhere(p, lambda e: e.run([Rows(300)], [x]).outputs, threads=(2,))[0]
    np.testing.assert_allclose(got, oracle(x, 2, 1, 16, "F32"), rtol=2e-4, atol=0.1)


def test_sequences_of_one_batch_do_not_mix():
    rng = np.random.default_rng(6)
    p = program(4, 2, 32, "F16")
    lengths = (33, 1, 64, 7)
    data = [floats(rng, n, p.buffers[0][1]) for n in lengths]
    together = everywhere(p, lambda e: e.run([Rows(n) for n in lengths], [np.concatenate(data)]).outputs)[0]
    alone = [p.open().run([Rows(n)], [d]).outputs[0] for n, d in zip(lengths, data, strict=True)]
    np.testing.assert_array_equal(together, np.concatenate(alone))
