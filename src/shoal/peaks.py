"""Peak speeds of this device: bytes/s of reading, which limits decoding, and MACs/s, which limits prompts.

One loop in C reads the memory of a stage's weights with the stage's number of threads, with and without
prefetching; the other computes dot products of an instruction set in registers (csrc/peak.c)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from .engine.backends._abi import ffi
from .engine.backends.base import WeightData
from .engine.backends.native import available, library, open_pool
from .engine.program import Matmul
from .engine.stage import Stage

_SECONDS = 0.05
_PIECE = 1 << 18  # bytes that a thread reads at a time at the end, so that none waits for a slow core
_TURNS = 1 << 12


class Peaks:
    """The loops, on threads of their own. A context manager: its end ends the threads."""

    def __init__(self, arrays: Sequence[NDArray[Any]], threads: int, isa: str | None) -> None:
        """Reads `arrays`. `isa` None: there is no peak of dot products. Without the C library there are no
        peaks."""
        self._pool: Any = None
        if available() is not None:
            return
        lib = library()
        flat = [array.reshape(-1).view(np.uint8) for array in arrays]
        pieces = [a[at : at + _PIECE] for a in flat for at in range(0, a.nbytes, _PIECE)]
        self.bytes = sum(piece.nbytes // 64 * 64 for piece in pieces)
        """Bytes of one pass, in whole cache lines."""
        self._keep = [ffi.from_buffer("char[]", piece) for piece in pieces]
        self._data = ffi.new("const char *[]", self._keep)
        self._sizes = ffi.new("uint64_t[]", [piece.nbytes for piece in pieces])
        self._isa = None if isa is None else getattr(lib, f"SHOAL_ISA_{isa.upper()}")
        self._result = ffi.new("uint64_t *")
        self._pool = open_pool(threads)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            ffi.release(self._pool)
            self._pool = None

    def read(self, passes: int, *, fetch: bool) -> tuple[float, int]:
        """Reads everything `passes` times: (seconds, exclusive or of all 64-bit words)."""
        nanoseconds = library().shoal_read_peak(
            self._pool, self._data, self._sizes, len(self._sizes), passes, fetch, self._result
        )
        return nanoseconds / 1e9, int(self._result[0])

    def bytes_per_s(self) -> float | None:
        """Speed of reading: the better of about 50 ms with and without prefetching. None: there is no
        figure."""
        if self._pool is None or not self.bytes:
            return None
        first, _ = self.read(1, fetch=False)
        passes = max(1, round(_SECONDS / max(first, 1e-6)))
        return self.bytes * passes / min(self.read(passes, fetch=fetch)[0] for fetch in (False, True))

    def macs_per_s(self) -> float | None:
        """int8 multiply-accumulates/s, over about 50 ms. None: there is no figure."""
        if self._pool is None or self._isa is None:
            return None
        turns, took = _TURNS, 0
        for _ in range(2):  # the first one finds the number of turns
            took = int(library().shoal_dot_peak(self._pool, self._isa, turns, self._result))
            if not took:
                return None
            turns = max(1, round(turns * _SECONDS * 1e9 / took))
        return int(self._result[0]) / took * 1e9


def arrays_of(weights: Iterable[WeightData]) -> list[NDArray[Any]]:
    """The arrays of some weights: quantised values, and scales and minima if there are any."""
    return [array for w in weights for array in (w.data, w.scales, w.mins) if array is not None]


def peaks_of(stage: Stage) -> Peaks:
    """The peaks for a stage: the memory that its matmuls read, and its number of threads."""
    weights = [
        stage.bound.weights[unit, name]
        for unit, op in stage.bound.ops
        if isinstance(op, Matmul)
        for name in op.weights
    ]
    backend, _, isa = stage.backend.partition(" ")
    return Peaks(arrays_of(weights), stage.threads, isa.strip("()") if backend == "native" else None)
