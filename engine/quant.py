"""int8 weights: groups of 32 inputs share an fp16 scale; packed in the panels that the kernels read.

Layout (csrc/kernels.h): numbers int8 `[panels, padded cols / 4, 64]`, where 64 is 16 rows x 4 inputs, and
scales fp16 `[panels, groups, 16]`. Rows and columns beyond the matrix hold zeros."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .layout import GROUP, PANEL, QUAD, round_up

F32 = NDArray[np.float32]
_LIMIT = 127  # -128 has no positive twin: the kernels multiply magnitudes


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
        q, scale = quantise_q8(part)
        quads = q.reshape(last - first, PANEL, numbers[1], QUAD).transpose(0, 2, 1, 3)
        packed[first:last] = quads.reshape(last - first, numbers[1], numbers[2])
        packed_scales[first:last] = scale.reshape(last - first, PANEL, scales[1]).transpose(0, 2, 1)
    return packed, packed_scales


def unpack_q8(packed: NDArray[Any], scales: NDArray[Any], rows: int, cols: int) -> F32:
    """The f32 `[rows, cols]` that packed numbers and scales stand for."""
    panels, quads, _ = packed.shape
    numbers = packed.reshape(panels, quads, PANEL, QUAD).transpose(0, 2, 1, 3).astype(np.float32)
    groups = numbers.reshape(panels, PANEL, quads * QUAD // GROUP, GROUP)
    groups *= scales.transpose(0, 2, 1)[..., None].astype(np.float32)
    return np.ascontiguousarray(groups.reshape(panels * PANEL, quads * QUAD)[:rows, :cols])
