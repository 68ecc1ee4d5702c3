"""Weights of the kernels' tests, packed from the words of csrc/kernels.h, and the matrices they stand for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from shoal.engine.backends._abi import ffi

ENUM = {
    name.removeprefix("SHOAL_"): value
    for enum in ("isa", "type", "domain", "activation", "op_kind", "status", "layout")
    for name, value in ffi.typeof(f"enum shoal_{enum}").relements.items()
}
PAGE, CHUNK, LANES, GROUP, PANEL, QUAD = (
    ENUM[name] for name in ("PAGE", "CHUNK", "LANES", "GROUP", "PANEL", "QUAD")
)


@dataclass
class Weight:
    """A weight in memory, and the float64 matrix that it stands for."""

    data: Any
    scales: Any
    kind: str
    rows: int
    cols: int
    dense: Any
    mins: Any = None

    def row(self, **changes: Any) -> dict[str, Any]:
        """The shoal_weight; `changes` make it lie."""
        row = {"data": ffi.from_buffer(self.data), "data_bytes": self.data.nbytes}
        for name in ("scales", "mins"):
            array = getattr(self, name)
            row[name] = ffi.NULL if array is None else ffi.from_buffer("uint16_t[]", array)
            row[f"{name}_bytes"] = 0 if array is None else array.nbytes
        return {**row, "type": ENUM[self.kind], "rows": self.rows, "cols": self.cols, **changes}


def f32(matrix: Any) -> Weight:
    """A weight of floats, `[rows, cols]` or `[cols]`."""
    data = np.atleast_2d(np.ascontiguousarray(matrix, np.float32))
    return Weight(data, None, "F32", *data.shape, data.astype(np.float64))


def f64(vector: Any) -> Weight:
    """Inverse frequencies."""
    data = np.atleast_2d(np.ascontiguousarray(vector, np.float64))
    return Weight(data, None, "F64", *data.shape, data)


def q8(q: Any, scales: Any) -> Weight:
    """int8 `[rows, cols]` with fp16 scales `[rows, groups]`, packed into panels."""
    rows, cols = q.shape
    full, full_scales = whole(q), whole(scales, GROUP)
    panels, groups = len(full) // PANEL, full_scales.shape[1]
    data = full.reshape(panels, PANEL, groups * GROUP // QUAD, QUAD).transpose(0, 2, 1, 3).copy()
    dense = full.astype(np.float64) * np.repeat(full_scales.astype(np.float64), GROUP, axis=1)
    return Weight(data, by_panel(full_scales), "Q8", rows, cols, dense[:rows, :cols])


def q4(q: Any, scales: Any, mins: Any = None) -> Weight:
    """Nibbles `[rows, cols]` in [0, 15] with fp16 scales and, if given, mins `[rows, groups]`, packed."""
    rows, cols = q.shape
    full, full_scales = whole(q, fill=0 if mins is not None else 8), whole(scales, GROUP)
    panels, groups = len(full) // PANEL, full_scales.shape[1]
    halves = full.reshape(panels, PANEL, groups, 2, GROUP // 2 // QUAD, QUAD).transpose(3, 0, 2, 4, 1, 5)
    data = np.ascontiguousarray(halves[0] | halves[1] << 4, np.uint8)
    each = np.repeat(full_scales.astype(np.float64), GROUP, axis=1)
    if mins is None:
        return Weight(data, by_panel(full_scales), "Q4", rows, cols, ((full - 8.0) * each)[:rows, :cols])
    full_mins = whole(mins, GROUP)
    dense = full * each + np.repeat(full_mins.astype(np.float64), GROUP, axis=1)
    return Weight(
        data, by_panel(full_scales), "Q4", rows, cols, dense[:rows, :cols], mins=by_panel(full_mins)
    )


def whole(array: Any, unit: int = 1, fill: int = 0) -> Any:
    """Padded to whole panels of rows, and to whole groups of `GROUP // unit` columns."""
    rows, cols = array.shape
    per_group = GROUP // unit
    full = np.full((-(-rows // PANEL) * PANEL, -(-cols // per_group) * per_group), fill, array.dtype)
    full[:rows, :cols] = array
    return full


def by_panel(scales: Any) -> Any:
    """fp16 `[rows, groups]` as bits `[panels, groups, 16]`."""
    return scales.reshape(-1, PANEL, scales.shape[1]).transpose(0, 2, 1).copy().view(np.uint16)


def random_q8(rng: np.random.Generator, rows: int, cols: int) -> Weight:
    """Any int8 and scales near 0.01; now and then a scale that is zero or subnormal in fp16."""
    return q8(rng.integers(-127, 128, (rows, cols), dtype=np.int8), random_scales(rng, rows, cols))


def random_q4(rng: np.random.Generator, rows: int, cols: int, mins: bool) -> Weight:
    """Any nibbles; scales of both signs; mins near -8 scales, or none."""
    scales = random_scales(rng, rows, cols)
    scales[rng.random(scales.shape) < 0.5] *= np.float16(-1)
    offsets = scales * rng.uniform(-12, -4, scales.shape).astype(np.float16) if mins else None
    return q4(rng.integers(0, 16, (rows, cols), dtype=np.uint8), scales, offsets)


def random_scales(rng: np.random.Generator, rows: int, cols: int) -> Any:
    """Near 0.01; now and then zero, or subnormal in fp16."""
    scales = rng.uniform(0.002, 0.02, (rows, -(-cols // GROUP))).astype(np.float16)
    scales[rng.random(scales.shape) < 0.02] = 0
    scales[rng.random(scales.shape) < 0.02] = 3e-7
    return scales


def random_weight(kind: str, rng: np.random.Generator, rows: int, cols: int) -> Weight:
    """A matrix of type F32, Q8, Q4 or, with mins, Q4M."""
    match kind:
        case "F32":
            return f32(floats(rng, rows, cols))
        case "Q8":
            return random_q8(rng, rows, cols)
        case _:
            return random_q4(rng, rows, cols, kind == "Q4M")


def floats(rng: np.random.Generator, *shape: int) -> Any:
    """Normal floats f32."""
    return rng.standard_normal(shape).astype(np.float32)
