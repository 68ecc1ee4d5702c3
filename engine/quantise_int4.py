"""int4 quantisation of weights: chooses the values, scale and minimum of each group of 32.

It minimises the sum of importance_j * e_j^2, where e_j is the error in column j and the importance is the
mean square of the activations that the column multiplies (`calibrate`). Several candidate scales are tried
for many groups at once. Each candidate rounds the weights to quantised values, and then fits the scale to
those values.

Arrays have one group per column, `[32, n]`, and columns are summed by a fixed tree, so that every machine
makes the same choice."""

from __future__ import annotations

import numpy as np

from .arrays import F16, F32, F64, U8
from .layout import GROUP
from .packing import Int4Arrays

_LARGEST = 65504.0  # largest fp16 value
_CHUNK = 1 << 11  # groups per pass: their temporaries stay in the cache
# Candidates for w / scale, where w is the weight of largest magnitude in a group. They are negative (the
# scale has the opposite sign of w), because the range -8 ... 7 extends further on that side.
_STEPS = (-8.0, -8.8, -8.4, -7.6, -7.2, -6.8, -6.4, -6.0)
_CLIPS = (0.0, 0.04, 0.08, 0.12)  # candidate fractions of a group's range to clip at either end


def quantise_q4(w: F32, importance: F64 | None = None, *, has_min: bool = False) -> Int4Arrays:
    """Quantised values, scales and minima of w `[rows, cols]`, where cols is a multiple of 32; importance
    is `[cols]`, 1 by default.

    Without minima w is about (q - 8) * scale, with minima q * scale + min. ValueError: NaN, infinity, or
    values too large for an fp16 scale."""
    rows, cols = w.shape
    groups = w.reshape(-1, GROUP)
    if not np.all(np.abs(groups) < _LARGEST):  # false for NaN as well
        raise ValueError("holds NaN, infinity or values too large for int4 with fp16 scales")
    column = np.ones(cols, np.float32) if importance is None else _normalised(importance)
    weights = np.tile(column.reshape(-1, GROUP), (rows, 1))
    q = np.empty(groups.shape, np.uint8)
    scale = np.empty(len(groups), np.float16)
    minimum = np.empty(len(groups), np.float16) if has_min else None
    for first in range(0, len(groups), _CHUNK):
        at = slice(first, first + _CHUNK)
        part, h = np.ascontiguousarray(groups[at].T), np.ascontiguousarray(weights[at].T)
        if minimum is None:
            values, scale[at] = _best_scale(part, h)
        else:
            values, scale[at], minimum[at] = _best_line(part, h)
        q[at] = values.T
    shape = (rows, cols // GROUP)
    return q.reshape(rows, cols), scale.reshape(shape), None if minimum is None else minimum.reshape(shape)


def _normalised(importance: F64) -> F32:
    """Importances scaled to a mean of 1, at least 1e-4 and rounded to 8 bits. Rounding removes the last
    bits, in which machines differ; the lower bound keeps every column relevant."""
    mean = float(np.mean(importance))
    if not mean > 0:
        return np.ones(importance.shape, np.float32)
    mantissa, exponent = np.frexp(np.maximum(importance / mean, 1e-4))
    rounded: F64 = np.ldexp(np.rint(mantissa * 256) / 256, exponent)
    return rounded.astype(np.float32)


def _best_scale(w: F32, h: F32) -> tuple[U8, F16]:
    """Quantised values `[32, n]` and scales `[n]` without minima, for groups `[32, n]` of weights w and
    importances h."""
    largest = np.take_along_axis(w, np.abs(w).argmax(axis=0)[None], axis=0)
    hw = h * w
    best, best_scale = np.zeros_like(w), np.zeros_like(largest)
    least = _sum(hw * w)
    for steps in _STEPS:
        q = _rounded(w, _f16(largest / np.float32(steps)), -8, 7)
        scale = _f16(_quotient(_sum(hw * q), _sum(h * q * q)))
        q = _rounded(w, scale, -8, 7)
        e = w - q * scale
        error = _sum(h * e * e)
        better = error < least
        np.copyto(least, error, where=better)
        np.copyto(best_scale, scale, where=better)
        np.copyto(best, q, where=better)
    return (best + 8).astype(np.uint8), best_scale[0].astype(np.float16)


def _best_line(w: F32, h: F32) -> tuple[U8, F16, F16]:
    """Quantised values `[32, n]`, scales and minima `[n]`, for groups `[32, n]` of weights w and importances
    h. Weights that are 16 evenly spaced values already, as from a Q4_1 file, are reproduced."""
    low, high = w.min(axis=0, keepdims=True), w.max(axis=0, keepdims=True)
    h_sum, hw_sum = _sum(h), _sum(h * w)
    best = np.zeros_like(w)
    best_scale, best_min = np.zeros_like(low), np.zeros_like(low)
    least = np.full_like(low, np.inf)

    def consider(scale: F32, minimum: F32) -> F32:
        q = _rounded(w - minimum, scale, 0, 15)
        e = w - (q * scale + minimum)
        error = _sum(h * e * e)
        better = error < least
        for kept, value in ((least, error), (best_scale, scale), (best_min, minimum), (best, q)):
            np.copyto(kept, value, where=better)
        return q

    for below in _CLIPS:
        for above in _CLIPS:
            minimum = _f16(low + np.float32(below) * (high - low))
            q = consider(_f16((high - low) * np.float32((1 - below - above) / 15)), minimum)
            hq = h * q
            hq_sum = _sum(hq)
            scale = _f16(
                _quotient(h_sum * _sum(hq * w) - hq_sum * hw_sum, h_sum * _sum(hq * q) - hq_sum * hq_sum)
            )
            consider(scale, _f16(_quotient(hw_sum - scale * hq_sum, h_sum)))
    return best.astype(np.uint8), best_scale[0].astype(np.float16), best_min[0].astype(np.float16)


def _rounded(w: F32, scale: F32, low: int, high: int) -> F32:
    """w / scale, rounded to the nearest integer and clipped to [low, high]."""
    q = w * _quotient(np.float32(1), scale)
    np.rint(q, out=q)
    np.clip(q, low, high, out=q)
    return q


def _sum(x: F32) -> F32:
    """Sums of the columns, `[1, n]`, by a fixed tree."""
    while len(x) > 1:
        half = len(x) // 2
        x = x[:half] + x[half:]
    return x


def _quotient(a: F32 | np.float32, b: F32) -> F32:
    """a / b, and 0 where b is 0."""
    return np.divide(a, b, out=np.zeros_like(b), where=b != 0)


def _f16(x: F32) -> F32:
    """x rounded to fp16."""
    return x.astype(np.float16).astype(np.float32)
