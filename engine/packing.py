"""int8 and int4 weights: groups of 32 inputs share an fp16 scale; packed in the panels that the kernels
read.

Layout (csrc/kernels.h): int8 numbers `[panels, padded cols / 4, 64]`, where 64 is 16 rows x 4 inputs;
int4 numbers, two a byte, `[panels, padded cols / 8, 64]`; scales, and minima where int4 has them, fp16
`[panels, groups, 16]`. Rows and columns beyond the matrix hold zeros."""

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
"""Numbers 0 to 15 `[rows, cols]`, scales and minima (or None) `[rows, groups]`."""
_LIMIT = 127  # -128 has no positive twin: the kernels multiply magnitudes
_MIDDLE = 8  # the nibble that stands for zero where a group has no minimum
_HALF = GROUP // 2  # the second half of a group stands in the high nibbles


@dataclass(frozen=True, slots=True)
class Quantised:
    """A matrix whose values are `numbers * scale`, plus `minimum` where there is one: integers `[rows, cols]`
    (cols a multiple of 32; 0 to 15 where there are minima), and an fp16 scale and minimum for each group of
    32 columns."""

    numbers: NDArray[np.int8]
    scale: F16
    minimum: F16 | None = None


def packed_shapes(rows: int, cols: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Shapes of the packed numbers and of their scales."""
    panels, padded = round_up(rows, PANEL) // PANEL, round_up(cols, GROUP)
    return (panels, padded // QUAD, PANEL * QUAD), (panels, padded // GROUP, PANEL)


def quantise_q8(w: F32) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
    """q `[rows, cols]` (cols a multiple of 32) and scales `[rows, groups]`: w is about q * scale.

    ValueError: NaN, infinity, or values beyond what an fp16 scale can reach."""
    rows = len(w)
    groups = w.reshape(rows, -1, GROUP)
    amax = np.maximum(groups.max(axis=2), -groups.min(axis=2))
    if not np.all(amax < _LIMIT * 65504.0):  # false for NaN as well
        raise ValueError("holds NaN, infinity or values too large for int8 with fp16 scales")
    scale = (amax / np.float32(_LIMIT)).astype(np.float16)
    # Subnormal fp16 steps are coarse: where rounding down would clip the largest value, go one up.
    short = scale.astype(np.float32) * np.float32(_LIMIT + 0.5) < amax
    scale = np.where(short, np.nextafter(scale, np.float16(np.inf)), scale)
    wide = scale.astype(np.float32)
    inverse = np.divide(1, wide, out=np.zeros_like(wide), where=wide > 0)
    scaled = groups * inverse[:, :, None]
    np.rint(scaled, out=scaled)
    np.clip(scaled, -_LIMIT, _LIMIT, out=scaled)
    return scaled.astype(np.int8).reshape(rows, -1), scale


def pack_q8(w: F32) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
    """A matrix f32 `[rows, cols]` as packed numbers and scales. ValueError: see quantise_q8."""
    rows, cols = w.shape
    numbers, scales = packed_shapes(rows, cols)
    packed = np.empty(numbers, np.int8)
    packed_scales = np.empty(scales, np.float16)
    step = max(1, (1 << 20) // (numbers[1] * numbers[2]))  # a few MB of temporaries, whatever the matrix
    for first in range(0, numbers[0], step):
        last = min(first + step, numbers[0])
        part = np.zeros(((last - first) * PANEL, numbers[1] * QUAD), np.float32)
        source = w[first * PANEL : last * PANEL]
        part[: len(source), :cols] = source
        packed[first:last], packed_scales[first:last] = _packed_q8(*quantise_q8(part), last - first)
    return packed, packed_scales


def _packed_q8(q: NDArray[np.int8], scale: F16, panels: int) -> tuple[NDArray[np.int8], F16]:
    """Numbers `[rows, cols]` and scales `[rows, groups]` of some panels, packed."""
    quads = _panels(q, panels, 0).reshape(panels, PANEL, -1, QUAD).transpose(0, 2, 1, 3)
    return quads.reshape(panels, -1, PANEL * QUAD), _panels(scale, panels, 0).transpose(0, 2, 1)


def unpack_q8(packed: NDArray[Any], scales: NDArray[Any], rows: int, cols: int) -> F32:
    """The f32 `[rows, cols]` that packed numbers and scales stand for."""
    panels, quads, _ = packed.shape
    numbers = packed.reshape(panels, quads, PANEL, QUAD).transpose(0, 2, 1, 3).astype(np.float32)
    groups = numbers.reshape(panels, PANEL, quads * QUAD // GROUP, GROUP)
    groups *= scales.transpose(0, 2, 1)[..., None].astype(np.float32)
    return np.ascontiguousarray(groups.reshape(panels * PANEL, quads * QUAD)[:rows, :cols])


def packed_shapes_q4(rows: int, cols: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Shapes of the packed nibbles, and of their scales and minima."""
    numbers, scales = packed_shapes(rows, cols)
    return (numbers[0], numbers[1] // 2, numbers[2]), scales


def pack_q4(w: F32, quantise: Callable[[F32], Int4Arrays]) -> Int4Arrays:
    """A matrix f32 `[rows, cols]` as packed nibbles, scales and minima.

    `quantise` chooses the numbers of some rows, padded to whole groups. ValueError: what it raises."""
    rows, cols = w.shape
    numbers, shape = packed_shapes_q4(rows, cols)
    groups = shape[1]
    packed = np.empty(numbers, np.uint8)
    scales, mins = np.empty(shape, np.float16), np.empty(shape, np.float16)
    has_min = False
    step = max(1, (1 << 20) // (numbers[1] * numbers[2] * 2))
    for first in range(0, numbers[0], step):
        last = min(first + step, numbers[0])
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
    """Nibbles `[rows, cols]`, scales and minima `[rows, groups]` of some panels, packed."""
    packed = _interleaved(_panels(q, panels, _MIDDLE if minimum is None else 0))
    least = None if minimum is None else _panels(minimum, panels, 0).transpose(0, 2, 1)
    return packed, _panels(scale, panels, 0).transpose(0, 2, 1), least


def pack_exactly(w: Quantised, kind: WeightType) -> tuple[NDArray[Any], ...] | None:
    """Packed numbers, scales and (q4_min) minima of the same values, none of them rounded. None: the type
    cannot hold them."""
    panels = round_up(len(w.numbers), PANEL) // PANEL
    low, high = int(w.numbers.min()), int(w.numbers.max())
    if kind == "q8":
        held = w.minimum is None and low >= -_LIMIT
        return _packed_q8(w.numbers, w.scale, panels) if held else None
    numbers, minimum = w.numbers, w.minimum
    if minimum is None:
        if low < -_MIDDLE or high >= _MIDDLE:
            return None
        numbers = numbers + np.int8(_MIDDLE)
        if kind == "q4_min":
            with np.errstate(over="ignore"):
                minimum = w.scale * np.float16(-_MIDDLE)  # exact, unless it overflows
    elif kind == "q4":
        return None
    if minimum is not None and not np.isfinite(minimum).all():
        return None
    packed, scales, mins = _packed_q4(numbers.astype(np.uint8), w.scale, minimum, panels)
    return (packed, scales) if mins is None else (packed, scales, mins)


def unpack_q4(
    packed: NDArray[Any], scales: NDArray[Any], mins: NDArray[Any] | None, rows: int, cols: int
) -> F32:
    """The f32 `[rows, cols]` that packed nibbles, scales and minima stand for."""
    panels, groups, _ = scales.shape
    lines = packed.reshape(panels, groups, _HALF // QUAD, PANEL, QUAD).transpose(0, 3, 1, 2, 4)
    halves = lines.reshape(panels, PANEL, groups, _HALF)
    numbers = np.concatenate([halves & 15, halves >> 4], axis=3).astype(np.float32)
    scale = scales.transpose(0, 2, 1)[..., None].astype(np.float32)
    if mins is None:
        numbers -= _MIDDLE
        numbers *= scale
    else:  # both products are exact, so that this rounds once, as fma does
        numbers *= scale
        numbers += mins.transpose(0, 2, 1)[..., None].astype(np.float32)
    return np.ascontiguousarray(numbers.reshape(panels * PANEL, groups * GROUP)[:rows, :cols])


def unpack(data: NDArray[Any], scales: NDArray[Any], mins: NDArray[Any] | None, rows: int, cols: int) -> F32:
    """The f32 `[rows, cols]` of an int8 or (uint8) int4 matrix."""
    if data.dtype == np.uint8:
        return unpack_q4(data, scales, mins, rows, cols)
    return unpack_q8(data, scales, rows, cols)


def _panels(values: NDArray[Any], panels: int, padding: int) -> NDArray[Any]:
    """`[rows, n]` as `[panels, 16, n]`, filled up with `padding`."""
    missing = panels * PANEL - len(values)
    if missing:
        values = np.pad(values, ((0, missing), (0, 0)), constant_values=padding)
    return values.reshape(panels, PANEL, -1)


def _interleaved(q: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Nibbles `[panels, 16, cols]`, two a byte, in the order of the kernels."""
    panels, _, cols = q.shape
    halves = q.reshape(panels, PANEL, cols // GROUP, 2, _HALF // QUAD, QUAD)
    pairs: NDArray[np.uint8] = halves[:, :, :, 0] | np.left_shift(halves[:, :, :, 1], 4)
    return pairs.transpose(0, 2, 3, 1, 4).reshape(panels, cols // GROUP * (_HALF // QUAD), PANEL * QUAD)
