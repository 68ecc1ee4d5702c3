"""int8 packing: the layout element by element, the error bound, and the edges of fp16 scales."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.engine.quant import pack_q8, packed_shapes, quantise_q8, unpack_q8


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
