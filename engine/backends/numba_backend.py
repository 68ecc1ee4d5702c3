"""The program with matmuls compiled by Numba: for a device without a C compiler. Approximate, like NumPy.

Only what takes the time is compiled; everything else is the NumPy backend's. Imported only when it is the
backend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..batch import F32
from ..errors import MissingDependencyError
from ..layout import GROUP, PANEL, round_up
from ..quant import unpack_q4
from .base import Linked, WeightData, cpu_threads
from .numpy_backend import NumpyExecutor

try:
    import numba
except ImportError as e:
    raise MissingDependencyError("the numba backend needs numba: pip install 'shoal[numba]'") from e


@dataclass(frozen=True, slots=True)
class _Panels:
    """int8 `[panels, cols, 16]`, outputs innermost so that LLVM vectorises over them; scales f32 `[panels,
    groups, 16]`."""

    data: NDArray[np.int8]
    scales: F32
    rows: int
    cols: int


class NumbaExecutor(NumpyExecutor):
    """NumPy's ops, with the int8 matmul compiled for this CPU."""

    name = "numba"

    def __init__(self, linked: Linked, threads: int = 1) -> None:
        numba.set_num_threads(min(threads, cpu_threads()))
        super().__init__(linked)

    def prepare(self, weight: WeightData) -> Any:
        """int8 matrices are repacked once, at load; tables that are only looked up are so too, and expanded
        on use."""
        if weight.scales is None or weight.mins is not None:
            return super().prepare(weight)
        panels = len(weight.data)
        if weight.data.dtype == np.uint8:
            ones, rows = np.ones_like(weight.scales), panels * PANEL
            numbers = unpack_q4(weight.data, ones, None, rows, weight.scales.shape[1] * GROUP)
            data = numbers.astype(np.int8).reshape(panels, PANEL, -1).transpose(0, 2, 1)
        else:
            quads = weight.data.reshape(panels, -1, PANEL, weight.data.shape[-1] // PANEL)
            data = quads.transpose(0, 1, 3, 2).reshape(panels, -1, PANEL)
        data = np.ascontiguousarray(data)
        return _Panels(data, weight.scales.astype(np.float32), weight.rows, weight.cols)

    def rows(self, weight: Any, tokens: NDArray[np.int32]) -> F32:
        """The rows of an embedding table that the tokens name."""
        if not isinstance(weight, _Panels):
            return super().rows(weight, tokens)
        panel, lane = np.divmod(tokens, PANEL)
        scales = np.repeat(weight.scales[panel, :, lane], GROUP, axis=1)
        table: F32 = (weight.data[panel, :, lane] * scales)[:, : weight.cols]
        return table

    def product(self, x: F32, weight: Any) -> F32:
        """x @ weight^T; x already holds values that int8 numbers stand for, so floats lose nothing that
        matters."""
        if not isinstance(weight, _Panels):
            return super().product(x, weight)
        cols = weight.data.shape[1]
        padded = np.zeros((len(x), round_up(cols, GROUP)), np.float32)
        padded[:, : x.shape[1]] = x
        out = np.empty((len(x), len(weight.data) * PANEL), np.float32)
        _matmul(padded, weight.data, weight.scales, out)
        return out[:, : weight.rows]


@numba.njit(cache=True, nogil=True, parallel=True, fastmath={"contract"})
def _matmul(x: F32, data: NDArray[np.int8], scales: F32, out: F32) -> None:
    """out `[rows, panels * 16]` = x `[rows, cols]` times the panels.

    The lane loop stands outside the loop over k on purpose: LLVM vectorises it and keeps the sums in
    registers (measured 20 GB/s a thread; with the loops swapped, 2)."""
    for p in numba.prange(data.shape[0]):
        for r in range(x.shape[0]):
            for lane in range(16):
                out[r, p * 16 + lane] = 0
            for g in range(scales.shape[1]):
                for lane in range(16):
                    t = np.float32(0)
                    for k in range(32):
                        t += np.float32(data[p, g * 32 + k, lane]) * x[r, g * 32 + k]
                    out[r, p * 16 + lane] += t * scales[p, g, lane]
