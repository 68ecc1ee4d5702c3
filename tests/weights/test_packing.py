"""int8 and int4 packing: the layout element by element, the error bound, and the edges of fp16 scales."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.engine.packing import (
    Int4Arrays,
    Quantised,
    pack_exactly,
    pack_q4,
    pack_q8,
    packed_shapes,
    packed_shapes_q4,
    quantise_q8,
    unpack_q4,
    unpack_q8,
)
from shoal.engine.quantise_int4 import quantise_q4


def by_hand(w: np.ndarray, r: int, c: int) -> tuple[int, float]:
    """Number and scale of one element, from the definition."""
    group = w[r, c // 32 * 32 : c // 32 * 32 + 32].astype(np.float64)
    scale = float(np.float16(np.float32(np.abs(group).max()) / np.float32(127)))
    return int(np.clip(np.rint(w[r, c] / scale), -127, 127)), scale


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (16, 32), (17, 33), (5, 72), (40, 100), (267, 104)])
def test_every_element_stands_where_the_kernels_look(rows: int, cols: int) -> None:
    w = np.random.default_rng(rows).normal(size=(rows, cols)).astype(np.float32)
    q, scales = pack_q8(w)
    assert (q.shape, scales.shape) == packed_shapes(rows, cols)
    flat_q, flat_scales = q.reshape(-1), scales.reshape(-1)
    panels, groups, _ = scales.shape
    padded = groups * 32
    seen = np.zeros(q.size, bool)
    for r in range(rows):
        for c in range(cols):
            panel, row = divmod(r, 16)
            at = panel * padded * 16 + (c // 4) * 64 + row * 4 + c % 4  # csrc/kernels.h
            number, scale = by_hand(w, r, c)
            assert abs(int(flat_q[at]) - number) <= 1  # a tie may round either way in f32
            assert flat_scales[(panel * groups + c // 32) * 16 + row] == np.float16(scale)
            seen[at] = True
    assert not flat_q[~seen].any()
    assert seen.sum() == rows * cols
    assert panels == -(-rows // 16)


@given(st.integers(1, 40), st.integers(1, 100), st.integers(-8, 4), st.integers(0, 1 << 30))
def test_unpacking_is_within_half_a_step(rows: int, cols: int, exponent: int, seed: int) -> None:
    w = (np.random.default_rng(seed).normal(size=(rows, cols)) * 10.0**exponent).astype(np.float32)
    q, scales = pack_q8(w)
    back = unpack_q8(q, scales, rows, cols)
    assert back.shape == w.shape
    step = np.repeat(scales.transpose(0, 2, 1).reshape(-1, scales.shape[1]), 32, axis=1)[:rows, :cols]
    # fp16 rounds a scale by 2^-11 of itself, so the largest value may be cut by 127 times that.
    assert (np.abs(back - w) <= step.astype(np.float32) * 0.57 + 3e-8).all()
    assert np.abs(q.astype(int)).max() <= 127


def test_zeros_and_values_below_fp16() -> None:
    w = np.zeros((2, 64), np.float32)
    w[0, 40] = 1e-9
    w[1, 3] = 3e-6  # the scale is subnormal: a step is 6e-8
    q, scales = pack_q8(w)
    back = unpack_q8(q, scales, 2, 64)
    assert np.isfinite(back).all()
    assert np.abs(back - w).max() <= 3e-8


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e7])
def test_what_no_scale_can_hold_is_refused(value: float) -> None:
    w = np.ones((16, 32), np.float32)
    w[3, 5] = value
    with pytest.raises(ValueError, match="NaN, infinity or values too large"):
        quantise_q8(w)


@pytest.mark.parametrize("has_min", [False, True])
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (16, 32), (17, 33), (5, 72), (40, 100), (267, 104)])
def test_every_nibble_stands_where_the_kernels_look(rows: int, cols: int, has_min: bool) -> None:
    """Bytes, and what they stand for, read by the words of csrc/kernels.h."""
    rng = np.random.default_rng(rows)
    groups, panels = -(-cols // 32), -(-rows // 16)
    q = rng.integers(0, 16, (rows, groups * 32), dtype=np.uint8)
    scale, minimum = rng.normal(size=(2, rows, groups)).astype(np.float16)
    at = 0

    def given(part: np.ndarray) -> Int4Arrays:
        nonlocal at
        here, at = slice(at, at + len(part)), at + len(part)
        return q[here].copy(), scale[here], minimum[here] if has_min else None

    data, scales, mins = pack_q4(np.zeros((rows, cols), np.float32), given)
    assert (data.shape, scales.shape) == packed_shapes_q4(rows, cols)
    assert (mins is not None) == has_min
    flat = data.reshape(-1)
    seen = np.zeros((2, flat.size), bool)
    for r in range(rows):
        for c in range(cols):
            (panel, lane), (group, k) = divmod(r, 16), divmod(c, 32)
            half, byte = divmod(k, 16)
            place = (panel * groups + group) * 256 + byte // 4 * 64 + lane * 4 + byte % 4
            assert flat[place] >> 4 * half & 15 == q[r, c]
            assert scales[panel, group, lane] == scale[r, group]
            seen[half, place] = True
    padding = np.stack([flat & 15, flat >> 4])[~seen]
    assert (padding == (0 if has_min else 8)).all()
    wide = np.repeat(scale, 32, axis=1).astype(np.float64)
    expected = (q - 8.0) * wide
    if mins is not None:
        expected = (q * wide + np.repeat(minimum, 32, axis=1)).astype(np.float32)
        assert not mins.transpose(0, 2, 1).reshape(panels * 16, -1)[rows:].any()
    assert not scales.transpose(0, 2, 1).reshape(panels * 16, -1)[rows:].any()
    np.testing.assert_array_equal(unpack_q4(data, scales, mins, rows, cols), expected[:, :cols])


@given(st.integers(1, 40), st.integers(1, 3), st.integers(-3, 4), st.integers(0, 1 << 30), st.booleans())
def test_int4_is_no_worse_than_rounding_to_the_largest(
    rows: int, groups: int, exponent: int, seed: int, has_min: bool
) -> None:
    """Against the plain rules: 8 steps to the largest magnitude; 15 from the least to the largest."""
    rng = np.random.default_rng(seed)
    w = (rng.normal(size=(rows * groups, 32)) * 10.0**exponent).astype(np.float32)
    importance = rng.random(groups * 32) + 0.01
    h = np.tile(importance.reshape(groups, 32), (rows, 1))

    def quantise(part: np.ndarray) -> Int4Arrays:
        return quantise_q4(part, importance, has_min=has_min)

    back = unpack_q4(*pack_q4(w.reshape(rows, -1), quantise), rows, groups * 32)
    if has_min:
        low, high = w.min(axis=1, keepdims=True), w.max(axis=1, keepdims=True)
        plain = np.rint((w - low) / (high - low) * 15) / 15 * (high - low) + low
    else:
        largest = np.take_along_axis(w, np.abs(w).argmax(axis=1)[:, None], axis=1)
        plain = np.clip(np.rint(w / largest * -8), -8, 7) * largest / -8
    error = (h * (w - back.reshape(-1, 32)) ** 2).sum(axis=1)
    bound = (h * (w - plain) ** 2).sum(axis=1)
    assert (
        error <= 1.01 * bound + 2.0**-20 * (h * w**2).sum(axis=1)
    ).all()  # scales in fp16 are a little off


def test_what_lies_on_even_steps_is_kept_exactly() -> None:
    """The matrices of a Q4_1 file are: their own nibbles, scales and minima come back."""
    rng = np.random.default_rng(1)
    q = rng.integers(0, 16, (64, 96), dtype=np.uint8)
    q[:, ::32], q[:, 1::32] = 0, 15
    scale = np.abs(rng.normal(size=(64, 3))).astype(np.float16)
    minimum = (rng.normal(size=(64, 3)) * 4).astype(np.float16)
    w = (q * np.repeat(scale, 32, axis=1).astype(np.float32)) + np.repeat(minimum, 32, axis=1)
    found = quantise_q4(w.astype(np.float32), has_min=True)
    for a, b in zip(found, (q, scale, minimum), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("has_min", [False, True])
def test_int4_at_the_edges_of_fp16(has_min: bool) -> None:
    w = np.zeros((3, 64), np.float32)
    w[0, 40] = 1e-9
    w[1, 3] = 3e-6  # the scale is subnormal
    w[2] = 60000
    q, scale, minimum = quantise_q4(w, has_min=has_min)
    value = (q.reshape(3, 2, 32) - (0.0 if has_min else 8.0)) * scale[..., None].astype(np.float64)
    value += 0 if minimum is None else minimum[..., None]
    assert np.abs(value.reshape(3, 64) - w)[:2].max() <= 16 * 2.0**-25
    np.testing.assert_allclose(value.reshape(3, 64)[2], 60000, rtol=1e-3)
    for bad in (np.nan, np.inf, 1e6):
        w[1, 2] = bad
        with pytest.raises(ValueError, match="too large for int4"):
            quantise_q4(w, has_min=has_min)


@pytest.mark.parametrize(("rows", "cols"), [(1, 32), (16, 64), (37, 96)])
def test_quantised_values_are_packed_as_those_that_are_rounded_here(rows: int, cols: int) -> None:
    w = np.random.default_rng(rows).normal(size=(rows, cols)).astype(np.float32)
    q, scale = quantise_q8(w)
    for packed, expected in zip(pack_exactly(Quantised(q, scale), "q8") or (), pack_q8(w), strict=True):
        np.testing.assert_array_equal(packed, expected)
    for has_min in (False, True):
        nibbles, scale, minimum = quantise_q4(w, has_min=has_min)
        numbers = nibbles.astype(np.int8) - (0 if has_min else 8)
        exact = pack_exactly(
            Quantised(numbers.astype(np.int8), scale, minimum), "q4_min" if has_min else "q4"
        )
        packed_q4 = pack_q4(w, lambda part, has_min=has_min: quantise_q4(part, has_min=has_min))
        for packed, expected in zip(exact or (), (a for a in packed_q4 if a is not None), strict=True):
            np.testing.assert_array_equal(packed, expected)


def test_quantised_values_that_a_type_cannot_hold() -> None:
    one = np.ones((1, 1), np.float16)
    for low, high, held in ((-8, 7, 3), (-9, 0, 1), (0, 8, 1), (-127, 127, 1), (-128, 0, 0)):
        numbers = np.zeros((1, 32), np.int8)
        numbers[0, :2] = low, high
        kinds = [pack_exactly(Quantised(numbers, one), kind) is not None for kind in ("q8", "q4", "q4_min")]
        assert kinds == [held >= 1, held == 3, held == 3]
    large = Quantised(np.zeros((1, 32), np.int8), one * np.float16(9000))
    assert pack_exactly(large, "q4") and pack_exactly(large, "q4_min") is None
    with_minimum = Quantised(np.zeros((1, 32), np.int8), one, one)
    assert pack_exactly(with_minimum, "q4_min")
    assert pack_exactly(with_minimum, "q4") is pack_exactly(with_minimum, "q8") is None
