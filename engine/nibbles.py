"""Chooses int4 numbers: which nibbles, scale and minimum of a group of 32 weights do least harm.

The harm of an error e in column j is taken as importance_j * e^2, where the importance is the mean square of
what the column multiplies (`calibrate`). Candidates for the scale are tried on all groups side by side; each
gets its numbers by rounding, then the scale that fits those numbers best."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .layout import GROUP
from .quant import F32, Nibbles

F64 = NDArray[np.float64]
_LARGEST_F16 = 65504.0
_CHUNK = 1 << 11  # groups at once: their temporaries stay in the cache
# The largest magnitude of a group becomes this many steps. Its sign is the sign of the scale, so that the
# larger end of -8 ... 7 is its own.
_STEPS = (-8.0, -8.8, -8.4, -7.6, -7.2, -6.8, -6.4, -6.0)
_SHRINKS = (0.0, 0.04, 0.08, 0.12)  # parts of a group's range that are cut off


def quantise_q4(w: F32, importance: F64 | None = None, *, has_min: bool = False) -> Nibbles:
    """Numbers, scales and minima of w `[rows, cols]`, cols a multiple of 32; importance `[cols]`, default 1.

    Without minima w is about (q - 8) * scale, with them q * scale + min. ValueError: NaN, infinity, or values
    beyond what an fp16 scale can reach."""
    rows, cols = w.shape
    groups = np.ascontiguousarray(w, np.float32).reshape(-1, GROUP)
    if not np.all(np.abs(groups) < _LARGEST_F16):  # false for NaN as well
        raise ValueError("holds NaN, infinity or values too large for int4 with fp16 scales")
    weight = np.ones(cols, np.float32) if importance is None else _normalised(importance)
    weights = np.broadcast_to(weight.reshape(1, -1, GROUP), (rows, cols // GROUP, GROUP)).reshape(-1, GROUP)
    q = np.empty(groups.shape, np.uint8)
    scale = np.empty(len(groups), np.float16)
    minimum = np.empty(len(groups), np.float16) if has_min else None
    for first in range(0, len(groups), _CHUNK):
        at = slice(first, first + _CHUNK)
        if minimum is None:
            q[at], scale[at] = _best_scale(groups[at], weights[at])
        else:
            q[at], scale[at], minimum[at] = _best_line(groups[at], weights[at])
    shape = (rows, cols // GROUP)
    return q.reshape(rows, cols), scale.reshape(shape), None if minimum is None else minimum.reshape(shape)


def _normalised(importance: F64) -> F32:
    """Importances about 1, and none so small that its column stops to matter."""
    mean = float(np.mean(importance))
    if not mean > 0:
        return np.ones(importance.shape, np.float32)
    return np.maximum(importance / mean, 1e-4).astype(np.float32)


def _best_scale(w: F32, h: F32) -> tuple[NDArray[np.uint8], NDArray[np.float16]]:
    """For groups `[n, 32]` of weights and importances: numbers and scales without a minimum."""
    largest = np.take_along_axis(w, np.abs(w).argmax(axis=1, keepdims=True), axis=1)
    hw = h * w
    best = np.zeros(w.shape, np.float32)
    best_scale = np.zeros(largest.shape, np.float16)
    least = (hw * w).sum(axis=1, keepdims=True)
    for steps in _STEPS:
        q = _rounded(w, _f16(largest / np.float32(steps)), -8, 7)
        scale = _f16(_quotient((hw * q).sum(axis=1, keepdims=True), (h * q * q).sum(axis=1, keepdims=True)))
        q = _rounded(w, scale, -8, 7)
        e = w - q * scale
        error = (h * e * e).sum(axis=1, keepdims=True)
        better = error < least
        least = np.where(better, error, least)
        best_scale = np.where(better, scale, best_scale)
        best = np.where(better, q, best)
    return (best + 8).astype(np.uint8), best_scale[:, 0].astype(np.float16)


def _best_line(w: F32, h: F32) -> tuple[NDArray[np.uint8], NDArray[np.float16], NDArray[np.float16]]:
    """The same with a minimum. What already lies on 16 even steps, as in a Q4_1 file, is found again."""
    low, high = w.min(axis=1, keepdims=True), w.max(axis=1, keepdims=True)
    hw, h_sum = h * w, h.sum(axis=1, keepdims=True)
    hw_sum = hw.sum(axis=1, keepdims=True)
    best = np.zeros(w.shape, np.float32)
    best_scale, best_min = np.zeros_like(low), np.zeros_like(low)
    least = np.full(low.shape, np.inf, np.float32)

    def consider(scale: F32, minimum: F32) -> F32:
        nonlocal best, best_scale, best_min, least
        q = _rounded(w - minimum, scale, 0, 15)
        e = w - (q * scale + minimum)
        error = (h * e * e).sum(axis=1, keepdims=True)
        better = error < least
        least = np.where(better, error, least)
        best_scale, best_min = np.where(better, scale, best_scale), np.where(better, minimum, best_min)
        best = np.where(better, q, best)
        return q

    for below in _SHRINKS:
        for above in _SHRINKS:
            minimum = _f16(low + np.float32(below) * (high - low))
            q = consider(_f16((high - low) * np.float32((1 - below - above) / 15)), minimum)
            hq, hq_sum = h * q, (h * q).sum(axis=1, keepdims=True)
            slope = _quotient(
                h_sum * (hq * w).sum(axis=1, keepdims=True) - hq_sum * hw_sum,
                h_sum * (hq * q).sum(axis=1, keepdims=True) - hq_sum * hq_sum,
            )
            scale = _f16(slope)
            consider(scale, _f16(_quotient(hw_sum - scale * hq_sum, h_sum)))
    return best.astype(np.uint8), best_scale[:, 0].astype(np.float16), best_min[:, 0].astype(np.float16)


def _rounded(w: F32, scale: F32, low: int, high: int) -> F32:
    """w in steps of the scale, to the nearest that there is."""
    q = w * _quotient(np.float32(1), scale)
    np.rint(q, out=q)
    np.clip(q, low, high, out=q)
    return q


def _quotient(a: F32 | np.float32, b: F32) -> F32:
    """a / b, and 0 where b is 0."""
    return np.divide(a, b, out=np.zeros_like(b), where=b != 0)


def _f16(x: F32) -> F32:
    """What an fp16 keeps of x."""
    return x.astype(np.float16).astype(np.float32)
