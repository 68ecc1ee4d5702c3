"""Packs int8 and int4 weights, with one fp16 scale per group of 32 inputs, into the panels of the kernels;
quantises to int8.

Layout (csrc/kernels.h): int8 values `[panels, padded cols / 4, 64]`, where 64 is 16 rows x 4 inputs; int4
values, two per byte, `[panels, padded cols / 8, 64]`; scales, and minima of asymmetric int4, fp16
`[panels, groups, 16]`. Rows and columns beyond the matrix are padded with weights of 0."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .arrays import F16, F32
from .layout import GROUP, PANEL, QUAD, round_up
from .program import WeightType

Int4Arrays = tuple[NDArray[np.uint8], F16, F16 | None]
"""An int4 matrix: quantised values 0 to 15 `[rows, cols]`, scales and minima (or None) `[rows, groups]`."""
_LIMIT = 127  # -128 is excluded: it has no int8 negative, and some kernels multiply magnitudes
_MIDDLE = 8  # the zero point of int4 without minima
_HALF = GROUP // 2  # the high nibbles have the second half of a group


@dataclass(frozen=True, slots=True)
class Quantised:
    """A quantised matrix: its weights are `values * scale`, or with minima `values * scale + minimum`. Values
    are `[rows, cols]`, cols a multiple of 32, and 0 to 15 with minima. Scales and minima are
    `[rows, groups]`."""

    values: NDArray[np.int8]
    scale: F16
    minimum: F16 | None = None


def packed_shapes(rows: int, cols: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Shapes of the packed int8 values and scales of a matrix `[rows, cols]`."""
    panels, padded = round_up(rows, PANEL) // PANEL, round_up(cols, GROUP)
    return (panels, padded // QUAD, PANEL * QUAD), (panels, padded // GROUP, PANEL)


def quantise_q8(w: F32) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
    """int8 values q `[rows, cols]` (cols a multiple of 32) and scales `[rows, groups]`, so that w is about
    q * scale.

    ValueError: NaN, infinity, or values too large for an fp16 scale."""
    rows = len(w)
    groups = w.reshape(rows, -1, GROUP)
    amax = np.maximum(groups.max(axis=2), -groups.min(axis=2))
    if not np.all(amax < _LIMIT * 65504.0):  # false for NaN as well
        raise ValueError("holds NaN, infinity or values too large for int8 with fp16 scales")
    scale = (amax / np.float32(_LIMIT)).astype(np.float16)
    # Subnormal fp16 scales are coarse: if rounding down would clip the largest value, take the next larger.
    short = scale.astype(np.float32) * np.float32(_LIMIT + 0.5) < amax
    scale = np.where(short, np.nextafter(scale, np.float16(np.inf)), scale)
    wide = scale.astype(np.float32)
    inverse = np.divide(1, wide, out=np.zeros_like(wide), where=wide > 0)
    scaled = groups * inverse[:, :, None]
    np.rint(scaled, out=scaled)
    np.clip(scaled, -_LIMIT, _LIMIT, out=scaled)
    return scaled.astype(np.int8).reshape(rows, -1), scale


def pack_q8(w: F32) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
    """Packed int8 values and scales of a matrix f32 `[rows, cols]`. ValueError: see quantise_q8."""
    rows, cols = w.shape
    values, scales = packed_shapes(rows, cols)
    packed = np.empty(values, np.int8)
    packed_scales = np.empty(scales, np.float16)
    step = max(1, (1 << 20) // (values[1] * values[2]))  # a few MB of temporaries for any matrix
    for first in range(0, values[0], step):
        last = min(first + step, values[0])
        part = np.zeros(((last - first) * PANEL, values[1] * QUAD), np.float32)
        source = w[first * PANEL : last * PANEL]
        part[: len(source), :cols] = source
        packed[first:last], packed_scales[first:last] = _packed_q8(*quantise_q8(part), last - first)
    return packed, packed_scales


def _packed_q8(q: NDArray[np.int8], scale: F16, panels: int) -> tuple[NDArray[np.int8], F16]:
    """Packed values and scales of `panels` panels, from int8 values `[rows, cols]` and scales
    `[rows, groups]`."""
    quads = _panels(q, panels, 0).reshape(panels, PANEL, -1, QUAD).transpose(0, 2, 1, 3)
    return quads.reshape(panels, -1, PANEL * QUAD), _panels(scale, panels, 0).transpose(0, 2, 1)


def unpack_q8(packed: NDArray[Any], scales: NDArray[Any], rows: int, cols: int) -> F32:
    """The matrix f32 `[rows, cols]` from packed int8 values and scales."""
    panels, quads, _ = packed.shape
    values = packed.reshape(panels, quads, PANEL, QUAD).transpose(0, 2, 1, 3).astype(np.float32)
    groups = values.reshape(panels, PANEL, quads * QUAD // GROUP, GROUP)
    groups *= scales.transpose(0, 2, 1)[..., None].astype(np.float32)
    return np.ascontiguousarray(groups.reshape(panels * PANEL, quads * QUAD)[:rows, :cols])


def packed_shapes_q4(rows: int, cols: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Shapes of the packed int4 values of a matrix `[rows, cols]`, and of its scales and minima."""
    values, scales = packed_shapes(rows, cols)
    return (values[0], values[1] // 2, values[2]), scales


def pack_q4(w: F32, quantise: Callable[[F32], Int4Arrays]) -> Int4Arrays:
    """Packed int4 values, scales and minima (or None) of a matrix f32 `[rows, cols]`.

    `quantise` is called with several rows at a time, padded to whole groups. ValueError: it raised one."""
    rows, cols = w.shape
    values, shape = packed_shapes_q4(rows, cols)
    groups = shape[1]
    packed = np.empty(values, np.uint8)
    scales, mins = np.empty(shape, np.float16), np.empty(shape, np.float16)
    has_min = False
    step = max(1, (1 << 20) // (values[1] * values[2] * 2))
    for first in range(0, values[0], step):
        last = min(first + step, values[0])
        source = w[first * PANEL : last * PANEL]
        part = np.zeros((len(source), groups * GROUP), np.float32)
        part[:, :cols] = source
        q, scale, minimum = quantise(part)
        has_min = minimum is not None
        q[:, cols:] = 0 if has_min else _MIDDLE
        packed[first:last], scales[first:last], least = _packed_q4(q, scale, minimum, last - first)
        if least is not None:
            mins[first:last] = least
    return packed, scales, mins if has_min else None


def _packed_q4(q: NDArray[np.uint8], scale: F16, minimum: F16 | None, panels: int) -> Int4Arrays:
    """Packed values, scales and minima of `panels` panels, from int4 values `[rows, cols]`, scales and minima
    `[rows, groups]`."""
    packed = _interleaved(_panels(q, panels, _MIDDLE if minimum is None else 0))
    least = None if minimum is None else _panels(minimum, panels, 0).transpose(0, 2, 1)
    return packed, _panels(scale, panels, 0).transpose(0, 2, 1), least


def pack_exactly(w: Quantised, kind: WeightType) -> tuple[NDArray[Any], ...] | None:
    """Packed values, scales and (q4_min) minima of a quantised matrix, without rounding. None: the type
    cannot hold it exactly."""
    panels = round_up(len(w.values), PANEL) // PANEL
    low, high = int(w.values.min()), int(w.values.max())
    if kind == "q8":
        held = w.minimum is None and low >= -_LIMIT
        return _packed_q8(w.values, w.scale, panels) if held else None
    values, minimum = w.values, w.minimum
    if minimum is None:
        if low < -_MIDDLE or high >= _MIDDLE:
            return None
        values = values + np.int8(_MIDDLE)
        if kind == "q4_min":
            with np.errstate(over="ignore"):
                minimum = w.scale * np.float16(-_MIDDLE)  # exact, unless it overflows
    elif kind == "q4":
        return None
    if minimum is not None and not np.isfinite(minimum).all():
        return None
    packed, scales, mins = _packed_q4(values.astype(np.uint8), w.scale, minimum, panels)
    return (packed, scales) if mins is None else (packed, scales, mins)


def unpack_q4(
    packed: NDArray[Any], scales: NDArray[Any], mins: NDArray[Any] | None, rows: int, cols: int
) -> F32:
    """The matrix f32 `[rows, cols]` from packed int4 values, scales and minima."""
    panels, groups, _ = scales.shape
    lines = packed.reshape(panels, groups, _HALF // QUAD, PANEL, QUAD).transpose(0, 3, 1, 2, 4)
    halves = lines.reshape(panels, PANEL, groups, _HALF)
    values = np.concatenate([halves & 15, halves >> 4], axis=3).astype(np.float32)
    scale = scales.transpose(0, 2, 1)[..., None].astype(np.float32)
    if mins is None:
        values -= _MIDDLE
        values *= scale
    else:  # the product is exact in f32, so that the result is rounded once, as by fma
        values *= scale
        values += mins.transpose(0, 2, 1)[..., None].astype(np.float32)
    return np.ascontiguousarray(values.reshape(panels * PANEL, groups * GROUP)[:rows, :cols])


def unpack(data: NDArray[Any], scales: NDArray[Any], mins: NDArray[Any] | None, rows: int, cols: int) -> F32:
    """The matrix f32 `[rows, cols]` from packed int8 or (uint8) int4 values, scales and minima."""
    if data.dtype == np.uint8:
        return unpack_q4(data, scales, mins, rows, cols)
    return unpack_q8(data, scales, rows, cols)


def _panels(values: NDArray[Any], panels: int, padding: int) -> NDArray[Any]:
    """An array `[rows, n]` as `[panels, 16, n]`, padded with `padding`."""
    missing = panels * PANEL - len(values)
    if missing:
        values = np.pad(values, ((0, missing), (0, 0)), constant_values=padding)
    return values.reshape(panels, PANEL, -1)


def _interleaved(q: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """int4 values `[panels, 16, cols]`, packed two per byte in the order of the kernels."""
    panels, _, cols = q.shape
    halves = q.reshape(panels, PANEL, cols // GROUP, 2, _HALF // QUAD, QUAD)
    pairs: NDArray[np.uint8] = halves[:, :, :, 0] | np.left_shift(halves[:, :, :, 1], 4)
    return pairs.transpose(0, 2, 3, 1, 4).reshape(panels, cols // GROUP * (_HALF // QUAD), PANEL * QUAD)
