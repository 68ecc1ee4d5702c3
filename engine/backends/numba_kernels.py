"""The compiled kernels of the numba backend: products with packed weights, and ops that would take NumPy many
calls.

Weights are read in the layout of their file, four bytes of one output as one 32-bit word, so that the 16
outputs of a panel are 16 adjacent words. The innermost loop runs over them without a branch, so that LLVM
vectorises it. The words of a group are unrolled by hand, because LLVM vectorises innermost loops only.
Kernels are compiled once per machine and cached (`cache`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np

_F32, _I32 = np.float32, np.int32


def _compiled(function: Callable[..., Any], *, parallel: bool = False) -> Callable[..., Any]:
    compiled: Callable[..., Any] = numba.njit(
        cache=True, nogil=True, fastmath={"contract", "nsz"}, parallel=parallel
    )(function)
    return compiled


@numba.njit(inline="always")
def _bytes(word: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    """The dot product of the signed bytes of a word with four inputs."""
    # Numba widens integers to 64 bits; narrowing at once lets LLVM use 32.
    first, second, third = _I32(word << 24), _I32(word << 16), _I32(word << 8)
    return (
        _F32(_I32(first >> 24)) * a
        + _F32(_I32(second >> 24)) * b
        + _F32(_I32(third >> 24)) * c
        + _F32(_I32(word >> 24)) * d
    )


@numba.njit(inline="always")
def _nibbles(word: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    """The dot product of the low nibbles of a word's bytes with four inputs."""
    return (
        _F32(_I32(word & 15)) * a
        + _F32(_I32(_I32(word >> 8) & 15)) * b
        + _F32(_I32(_I32(word >> 16) & 15)) * c
        + _F32(_I32(_I32(word >> 24) & 15)) * d
    )


def _matmul_q8(x: Any, words: Any, scales: Any, out: Any) -> None:
    """Adds the product of x `[rows, groups * 32]` and an int8 matrix to out `[rows, panels, 16]`; the
    matrix is words `[panels, groups, 8, 16]` and scales `[panels, groups, 16]`."""
    for p in numba.prange(words.shape[0]):
        for r in range(x.shape[0]):
            for g in range(words.shape[1]):
                k = g * 32
                for i in range(16):
                    t = _bytes(words[p, g, 0, i], x[r, k + 0], x[r, k + 1], x[r, k + 2], x[r, k + 3])
                    t += _bytes(words[p, g, 1, i], x[r, k + 4], x[r, k + 5], x[r, k + 6], x[r, k + 7])
                    t += _bytes(words[p, g, 2, i], x[r, k + 8], x[r, k + 9], x[r, k + 10], x[r, k + 11])
                    t += _bytes(words[p, g, 3, i], x[r, k + 12], x[r, k + 13], x[r, k + 14], x[r, k + 15])
                    t += _bytes(words[p, g, 4, i], x[r, k + 16], x[r, k + 17], x[r, k + 18], x[r, k + 19])
                    t += _bytes(words[p, g, 5, i], x[r, k + 20], x[r, k + 21], x[r, k + 22], x[r, k + 23])
                    t += _bytes(words[p, g, 6, i], x[r, k + 24], x[r, k + 25], x[r, k + 26], x[r, k + 27])
                    t += _bytes(words[p, g, 7, i], x[r, k + 28], x[r, k + 29], x[r, k + 30], x[r, k + 31])
                    out[r, p, i] += t * scales[p, g, i]


def _matmul_q4(x: Any, sums: Any, words: Any, scales: Any, offsets: Any, out: Any) -> None:
    """Adds the product of x `[rows, groups * 32]` and an int4 matrix to out `[rows, panels, 16]`. The
    matrix is words `[panels, groups, 4, 16]`, scales and offsets `[panels, groups, 16]`: a weight is nibble
    * scale + offset. `sums` `[rows, groups]` are the sums of x by group."""
    for p in numba.prange(words.shape[0]):
        for r in range(x.shape[0]):
            for g in range(words.shape[1]):
                k = g * 32
                for i in range(16):
                    w = words[p, g, 0, i]
                    t = _nibbles(w, x[r, k + 0], x[r, k + 1], x[r, k + 2], x[r, k + 3])
                    t += _nibbles(_I32(w >> 4), x[r, k + 16], x[r, k + 17], x[r, k + 18], x[r, k + 19])
                    w = words[p, g, 1, i]
                    t += _nibbles(w, x[r, k + 4], x[r, k + 5], x[r, k + 6], x[r, k + 7])
                    t += _nibbles(_I32(w >> 4), x[r, k + 20], x[r, k + 21], x[r, k + 22], x[r, k + 23])
                    w = words[p, g, 2, i]
                    t += _nibbles(w, x[r, k + 8], x[r, k + 9], x[r, k + 10], x[r, k + 11])
                    t += _nibbles(_I32(w >> 4), x[r, k + 24], x[r, k + 25], x[r, k + 26], x[r, k + 27])
                    w = words[p, g, 3, i]
                    t += _nibbles(w, x[r, k + 12], x[r, k + 13], x[r, k + 14], x[r, k + 15])
                    t += _nibbles(_I32(w >> 4), x[r, k + 28], x[r, k + 29], x[r, k + 30], x[r, k + 31])
                    out[r, p, i] += t * scales[p, g, i] + sums[r, g] * offsets[p, g, i]


# Two versions, since starting parallel loops (200 per token) on a single thread costs more than it gains.
MATMUL_Q8 = {parallel: _compiled(_matmul_q8, parallel=parallel) for parallel in (False, True)}
MATMUL_Q4 = {parallel: _compiled(_matmul_q4, parallel=parallel) for parallel in (False, True)}


@_compiled
def quantised(x: Any) -> Any:
    """x `[rows, cols]` quantised to int8 with one scale per row and group, and dequantised again."""
    rows, cols = x.shape
    out = np.empty((rows, cols), np.float32)
    for r in range(rows):
        for first in range(0, cols, 32):
            last = min(first + 32, cols)
            largest = _F32(0)
            for k in range(first, last):
                largest = max(largest, abs(x[r, k]))
            inverse, scale = _F32(0), largest / _F32(127)
            if largest >= _F32(1e-30):
                inverse = _F32(127) / largest
            for k in range(first, last):
                out[r, k] = np.rint(min(max(x[r, k] * inverse, _F32(-127)), _F32(127))) * scale
    return out


@_compiled
def norm(x: Any, weight: Any, epsilon: Any) -> Any:
    """RMS norm of the rows of x, times weight `[cols]`."""
    out = np.empty(x.shape, np.float32)
    for r in range(x.shape[0]):
        total = _F32(0)
        for k in range(x.shape[1]):
            total += x[r, k] * x[r, k]
        scale = _F32(1) / np.sqrt(total / _F32(x.shape[1]) + _F32(epsilon))
        for k in range(x.shape[1]):
            out[r, k] = x[r, k] * scale * weight[k]
    return out


@_compiled
def silu_gate(x: Any) -> Any:
    """silu(first half of x) * second half."""
    half = x.shape[1] // 2
    out = np.empty((x.shape[0], half), np.float32)
    for r in range(x.shape[0]):
        for k in range(half):
            a = x[r, k]
            out[r, k] = a / (_F32(1) + np.exp(-a)) * x[r, half + k]
    return out
