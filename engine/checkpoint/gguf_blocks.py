"""Extracts quantised values from GGUF block types with one fp16 scale per block, which can be copied exactly.

Blocks have 32 values or a multiple of 32. The `gguf` package dequantises them; with all scales replaced by 1
it returns the quantised values themselves."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import F16
from ..layout import GROUP
from ..packing import Quantised
from .gguf_file import import_gguf

SCALES = {
    "Q8_0": 0,
    "Q4_0": 0,
    "Q4_1": 0,
    "Q5_0": 0,
    "IQ4_NL": 0,
    "TQ1_0": 52,
    "TQ2_0": 64,
}
"""Types with one f16 scale per block, and its byte offset in the block (ggml-common.h)."""
_MINIMUM = 2  # byte offset of the f16 minimum in a Q4_1 block
_ONE = np.array([1], "<f2").view(np.uint8)


def quantised(kind: str, data: NDArray[np.uint8], rows: int) -> Quantised:
    """The quantised values of a matrix of type `kind` with `rows` rows; `data` has the bytes of its
    blocks."""
    gguf = import_gguf()
    type_ = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[type_]
    blocks = data.reshape(-1, size).copy()

    def taken(at: int) -> F16:
        values: NDArray[Any] = blocks[:, at : at + 2].copy().view("<f2")
        return values.astype(np.float16).repeat(block // GROUP).reshape(rows, -1)

    scale = taken(SCALES[kind])
    blocks[:, SCALES[kind] : SCALES[kind] + 2] = _ONE
    minimum = None
    if kind == "Q4_1":
        minimum = taken(_MINIMUM)
        blocks[:, _MINIMUM : _MINIMUM + 2] = 0
    values = np.empty((len(blocks), block), np.int8)
    step = (1 << 20) // block  # few blocks at a time: the package makes several float copies of them
    for first in range(0, len(blocks), step):
        part = blocks[first : first + step].reshape(1, -1)
        values[first : first + step] = gguf.quants.dequantize(part, type_).reshape(-1, block)
    return Quantised(values.reshape(rows, -1), scale, minimum)
