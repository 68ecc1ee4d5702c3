"""Storing keys and values, and attention over them: pages, blocks and masks, against a float64 softmax."""

from __future__ import annotations

import copy

import numpy as np
import pytest

from .harness import Program, Rows, everywhere, isas, same
from .weights import CHUNK, GROUP, LANES, PAGE, floats


def program(heads, kv_heads, dim, kind, max_rows=400, extra=0):
    """q | k | v in one input, with `extra` columns before, as a family may lay them out."""
    p = Program(max_rows=max_rows)
    x = p.input(extra + (heads + 2 * kv_heads) * dim)
    state = p.state(kv_heads, dim, kind)
    p.op("STORE", -1, x, state=state, key=extra + heads * dim, value=extra + (heads + kv_heads) * dim)
    p.output(
        p.op("ATTEND", p.buffer(heads * dim), x, state=state, column=extra, heads=heads, scale=dim**-0.5)
    )
    return p


def rounded(x, group):
    """Whole numbers of x `[..., n]` in such groups, and the f32 scale of each, `[..., n / group, 1]`."""
    groups = x.reshape(*x.shape[:-1], -1, group)
    amax = np.abs(groups).max(axis=-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        q = np.where(amax > 0, np.rint(np.clip(groups * (x.dtype.type(127) / amax), -127, 127)), 0)
    return q, amax / x.dtype.type(127)


def by_groups(x):
    """What `[..., n]` is as int8 in groups of 32, the last one filled up with zeros."""
    padded = np.concatenate([x, np.zeros((*x.shape[:-1], -x.shape[-1] % GROUP), x.dtype)], axis=-1)
    q, scale = rounded(padded, GROUP)
    return q, scale


def joined(q, scale, like):
    return (q * scale.astype(np.float64)).reshape(*like.shape[:-1], -1)[..., : like.shape[-1]]


def oracle(x, heads, kv_heads, dim, kind, extra=0):
    """What comes out, and how much each number may differ: of int8 by one weight rounded the other way."""
    rows = len(x)
    q = x[:, extra : extra + heads * dim].reshape(rows, heads, dim)
    k, v = x[:, extra + heads * dim :].reshape(rows, 2, kv_heads, dim).transpose(1, 0, 2, 3)
    value_scales = np.ones((rows, kv_heads))
    if kind == "F16":
        k, v = k.astype(np.float16), v.astype(np.float16)
    if kind == "Q8":
        q = joined(*by_groups(q), q)
        numbers, scales = by_groups(k)
        k = joined(numbers, scales.astype(np.float16), k)
        v, scale = rounded(v, dim)
        v, value_scales = v[:, :, 0], scale[:, :, 0, 0].astype(np.float64)
    q, k, v = (a.astype(np.float64) for a in (q, k, v))
    out, tolerance = np.empty((2, rows, heads, dim))
    for h in range(heads):
        kv = h // (heads // kv_heads)
        scores = q[:, h] @ k[:, kv].T * dim**-0.5
        scores[np.triu_indices(rows, 1)] = -np.inf
        p = np.exp(scores - scores.max(axis=1, keepdims=True))
        weights, step = p * value_scales[:, kv], 0.0
        if kind == "Q8":
            numbers, scales = by_groups(weights)
            step = scales.max(axis=1) * np.abs(v[:, kv]).max()
            weights = joined(numbers, scales, weights)
        total = p.sum(axis=1, keepdims=True)
        out[:, h], tolerance[:, h] = weights @ v[:, kv] / total, step / total
    return out.reshape(rows, -1), tolerance.reshape(rows, -1)


def assert_near(got, expected, rtol, atol):
    """Nearly all to the tolerance of floats, all to that of one weight rounded the other way."""
    out, rounding = expected
    off = np.abs(got - out) - rtol * np.abs(out) - atol
    assert (off <= rounding).all()
    assert (off > 0).mean() < 0.01


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
        assert_near(got, oracle(x[:rows], heads, kv_heads, dim, kind), rtol=2e-5, atol=2e-6)


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
    assert_near(got, oracle(x, heads, kv_heads, dim, kind, extra=7), rtol=2e-5, atol=2e-6)
    whole = p.open()
    at_once = [whole.run([Rows(400)], [x[:400]]).outputs[0]]
    np.testing.assert_array_equal(np.concatenate(at_once), got[:400])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kv_heads", "group", "kind"),
    [
        (1, 2, "F16"),
        (2, 2, "F32"),
        (3, 3, "F16"),
        (3, 2, "Q8"),
        (5, 1, "F16"),
        (2, 5, "Q8"),  # tiles of four queries and of one
        (1, 11, "F16"),
        (8, 4, "F16"),  # two sets of four heads
        (6, 3, "Q8"),
        (17, 1, "F32"),  # each head for itself
    ],
)
def test_a_row_whose_blocks_several_threads_share(kv_heads, group, kind):
    """Single rows before, at and after the ends of blocks, of heads that are taken together or not. The pages
    before each are computed once: that all sets and threads write the same is shown above."""
    rng = np.random.default_rng(kv_heads)
    heads, dim = group * kv_heads, 64 if kv_heads < 6 else 16
    p = program(heads, kv_heads, dim, kind)
    x = floats(rng, 1290, p.buffers[0][1])
    rows = [255, 256, 257, 511, 512, 513, 700, 1023, 1024, 1279, 1280, 1289]
    filled, before, at, filler = Rows(0), {}, 0, p.open(isas()[-1])
    for row in rows:
        while at < row:
            filled.first, filled.rows = at, min(row - at, p.max_rows)
            filler.run([filled], [x[at : at + filled.rows]])
            at += filled.rows
        before[row] = copy.deepcopy(filled.pages)

    def work(executor):
        return [
            executor.run([Rows(1, row, pages=copy.deepcopy(before[row]))], [x[row : row + 1]]).outputs[0]
            for row in rows
        ]

    got = everywhere(p, work, threads=(1, 2, 3, 8))
    expected = [part[rows] for part in oracle(x, heads, kv_heads, dim, kind)]
    assert_near(np.concatenate(got), expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("heads", [248, 280])
def test_parts_of_a_row_that_just_fit_and_that_do_not(heads):
    """Two blocks of so many heads take 1 KiB less than SHOAL_PART_BYTES, or an eighth more."""
    dim = 512
    p = program(heads, 1, dim, "F32", max_rows=16)
    x = floats(np.random.default_rng(8), 257, p.buffers[0][1])

    def work(executor):
        sequence, got = Rows(0), []
        for first in range(0, 257, 16):
            sequence.first, sequence.rows = first, min(16, 257 - first)
            got = executor.run([sequence], [x[first : first + sequence.rows]]).outputs
        return got

    isa = isas()[-1]
    expected = work(p.open(isa))
    for threads in (2, 3):
        same(work(p.open(isa, threads))[0], expected[0])


def test_pages_hold_what_the_header_says():
    rng = np.random.default_rng(3)
    heads, kv_heads, dim = 2, 2, 32
    for kind in ("F16", "F32"):
        p = program(heads, kv_heads, dim, kind)
        x = floats(rng, 5, p.buffers[0][1]) * 1000
        x[0, heads * dim :] = 1e-6  # subnormal in f16

        def pages(executor, x=x):
            sequence = Rows(5, PAGE - 2)
            executor.run([sequence], [x], want=False)  # positions before hold NaN here
            return [np.stack(sequence.pages[0]).astype(np.float32)]

        got = everywhere(p, pages)[0].reshape(2, kv_heads, 2, PAGE * dim)
        keys = (
            got[:, :, 0]
            .reshape(2, kv_heads, PAGE // CHUNK, dim, CHUNK)
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
        written = slice(PAGE - 2, PAGE + 3)
        np.testing.assert_array_equal(keys[written].reshape(5, -1), stored[:, : kv_heads * dim])
        np.testing.assert_array_equal(values[written].reshape(5, -1), stored[:, kv_heads * dim :])
        untouched = np.ones(2 * PAGE, bool)
        untouched[written] = False
        assert np.isnan(keys[untouched]).all() and np.isnan(values[untouched]).all()


def test_int8_pages_hold_numbers_and_scales():
    rng = np.random.default_rng(7)
    heads, kv_heads, dim = 2, 2, 48
    p = program(heads, kv_heads, dim, "Q8")
    x = floats(rng, 5, p.buffers[0][1])
    x[2, heads * dim : heads * dim + dim] = 0

    def pages(executor):
        sequence = Rows(5, PAGE - 2)
        executor.run([sequence], [x], want=False)
        return [np.stack(sequence.pages[0]).astype(np.float32)]

    padded, groups, chunks = 64, 2, PAGE // CHUNK
    shape = 2, kv_heads, chunks
    raw = everywhere(p, pages)[0].astype(np.int8).reshape(2, kv_heads, -1)
    of_keys, of_values = np.split(raw, [chunks * CHUNK * (padded + groups * 2)], axis=2)
    keys, key_scales = np.split(of_keys.reshape(*shape, -1), [CHUNK * padded], axis=3)
    values, value_scales = np.split(of_values.reshape(*shape, -1), [CHUNK * dim], axis=3)
    keys = keys.reshape(*shape, CHUNK // LANES, padded // 4, LANES, 4).transpose(0, 2, 3, 5, 1, 4, 6)
    values = values.reshape(*shape, dim // LANES, CHUNK // 4, LANES, 4).transpose(0, 2, 4, 6, 1, 3, 5)
    key_scales = key_scales.copy().view(np.float16).reshape(*shape, CHUNK // LANES, groups, LANES)
    key_scales = key_scales.transpose(0, 2, 3, 5, 1, 4).reshape(2 * PAGE, kv_heads, groups)
    value_scales = value_scales.copy().view(np.float32).transpose(0, 2, 3, 1).reshape(2 * PAGE, kv_heads)
    wanted_keys, wanted_values = x[:, heads * dim :].reshape(5, 2, kv_heads, dim).transpose(1, 0, 2, 3)
    written = slice(PAGE - 2, PAGE + 3)
    for found, (q, _) in ((keys, by_groups(wanted_keys)), (values, rounded(wanted_values, dim))):
        np.testing.assert_array_equal(
            found.reshape(2 * PAGE, kv_heads, -1)[written], q.reshape(5, kv_heads, -1)
        )
    np.testing.assert_array_equal(key_scales[written], by_groups(wanted_keys)[1][..., 0].astype(np.float16))
    np.testing.assert_array_equal(value_scales[written], rounded(wanted_values, dim)[1][..., 0, 0])
    for scales in (key_scales, value_scales):
        assert np.isnan(scales[: written.start]).all() and np.isnan(scales[written.stop :]).all()


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
    assert_near(got, oracle(x, 2, 1, 16, "F32"), rtol=2e-4, atol=0.1)


def test_sequences_of_one_batch_do_not_mix():
    rng = np.random.default_rng(6)
    p = program(4, 2, 32, "F16")
    lengths = (33, 1, 64, 7)
    data = [floats(rng, n, p.buffers[0][1]) for n in lengths]
    together = everywhere(p, lambda e: e.run([Rows(n) for n in lengths], [np.concatenate(data)]).outputs)[0]
    alone = [p.open().run([Rows(n)], [d]).outputs[0] for n, d in zip(lengths, data, strict=True)]
    np.testing.assert_array_equal(together, np.concatenate(alone))
