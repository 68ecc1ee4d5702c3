"""Chooses int4 numbers: which nibbles, scale and minimum of a group of 32 weights do least harm.

The harm of an error e in column j is taken as importance_j * e^2, where the importance is the mean square
of what the column multiplies (`calibrate`). Candidates for the scale are tried on many groups side by
side; each gets its numbers by rounding, then the scale that fits those numbers best.

Groups stand in columns, `[32, n]`, and are summed by a fixed tree, so that every machine chooses
alike."""

from __future__ import annotations

import numpy as np

from .arrays import F16, F32, F64, U8
from .layout import GROUP
from .packing import Int4Arrays

_LARGEST = 65504.0  # of an fp16
_CHUNK = 1 << 11  # groups at once: their temporaries stay in the cache
# The largest magnitude of a group becomes so many steps. The scale takes its sign, so that the larger end
# of -8 ... 7 is its own.
_STEPS = (-8.0, -8.8, -8.4, -7.6, -7.2, -6.8, -6.4, -6.0)
_CUTS = (0.0, 0.04, 0.08, 0.12)  # parts of a group's range that are left out at either end


def quantise_q4(w: F32, importance: F64 | None = None, *, has_min: bool = False) -> Int4Arrays:
    """Numbers, scales and minima of w `[rows, cols]`, cols a multiple of 32; importance `[cols]`, default
    1.

    Without minima w is about (q - 8) * scale, with them q * scale + min. ValueError: NaN, infinity, or
    values beyond what an fp16 scale can reach."""
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
            numbers, scale[at] = _best_scale(part, h)
        else:
            numbers, scale[at], minimum[at] = _best_line(part, h)
        q[at] = numbers.T
    shape = (rows, cols // GROUP)
    return q.reshape(rows, cols), scale.reshape(shape), None if minimum is None else minimum.reshape(shape)


def _normalised(importance: F64) -> F32:
    """Importances about 1, of 8 bits, which cuts off the last bits, in which machines differ; none so
    small that its column no longer matters."""
    mean = float(np.mean(importance))
    if not mean > 0:
        return np.ones(importance.shape, np.float32)
    mantissa, exponent = np.frexp(np.maximum(importance / mean, 1e-4))
    rounded: F64 = np.ldexp(np.rint(mantissa * 256) / 256, exponent)
    return rounded.astype(np.float32)


def _best_scale(w: F32, h: F32) -> tuple[U8, F16]:
    """For groups `[32, n]` of weights and importances: numbers and scales without a minimum."""
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
    """The same with a minimum. What already lies on 16 even steps, as in a Q4_1 file, is found again."""
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

    for below in _CUTS:
        for above in _CUTS:
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
    """w in steps of the scale, to the nearest that there is."""
    q = w * _quotient(np.float32(1), scale)
    np.rint(q, out=q)
    np.clip(q, low, high, out=q)
    return q


def _sum(x: F32) -> F32:
    """The sums of the columns, `[1, n]`."""
    while len(x) > 1:
        half = len(x) // 2
        x = x[:half] + x[half:]
    return x


def _quotient(a: F32 | np.float32, b: F32) -> F32:
    """a / b, and 0 where b is 0."""
    return np.divide(a, b, out=np.zeros_like(b), where=b != 0)


def _f16(x: F32) -> F32:
    """What an fp16 keeps of x."""
    return x.astype(np.float16).astype(np.float32)
