"""The Numba backend, for devices without a C compiler. It is approximate, like NumPy's.

The expensive ops are compiled (`numba_kernels`); the others are the NumPy backend's. This module is imported
only if the backend is used."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ..arrays import F32
from ..errors import MissingDependencyError
from ..host import usable_cpus
from ..layout import GROUP, PANEL, round_up
from ..packing import unpack
from ..program import Gate, Norm
from .base import BoundProgram, Outcome, SequenceRows, WeightData
from .numpy_backend import NumpyExecutor

try:
    import numba

    from . import numba_kernels as kernels
except ImportError as e:
    raise MissingDependencyError("the numba backend needs numba: pip install 'shoal[numba]'") from e


_locks = [threading.Lock()]
"""The lock of all runs, because some of Numba's thread pools abort the process if two threads use them at
once."""
os.register_at_fork(after_in_child=lambda: _locks.__setitem__(0, threading.Lock()))


@dataclass(frozen=True, slots=True)
class _Panels:
    """A packed matrix: its bytes as int32 words `[panels, groups, words, 16]`, and scales f32
    `[panels, groups, 16]`. For int4 `offsets` (the same shape) is added to each weight."""

    packed: WeightData
    words: NDArray[np.int32]
    scales: F32
    offsets: F32 | None


class NumbaExecutor(NumpyExecutor):
    """The NumPy executor with the expensive ops compiled for this CPU."""

    def __init__(self, bound: BoundProgram, threads: int = 1) -> None:
        threads = min(threads, len(usable_cpus()))
        self._threads = threads
        self._parallel = threads > 1
        super().__init__(bound)

    def run(
        self,
        sequences: Sequence[SequenceRows],
        hidden: F32 | None,
        want_logits: bool,
        cancel: NDArray[np.int32],
    ) -> Outcome:
        """See base.Executor.run."""
        with _locks[0]:
            numba.set_num_threads(self._threads)  # a setting of the calling thread
            return super().run(sequences, hidden, want_logits, cancel)

    def prepare(self, weight: WeightData) -> Any:
        """Converts a weight to the form that this backend's ops read: scales become f32, because Numba has no
        f16; quantised values are not copied."""
        if weight.scales is None:
            return weight.data
        scales, offsets = weight.scales.astype(np.float32), None
        words = weight.data.view(np.int32).reshape(*scales.shape[:2], -1, PANEL)
        if weight.data.dtype == np.uint8:
            offsets = -8 * scales if weight.mins is None else weight.mins.astype(np.float32)
        return _Panels(weight, words, scales, offsets)

    def rows(self, weight: Any, tokens: NDArray[np.int32]) -> F32:
        """The rows of an embedding table at the token ids: f32 `[tokens, cols]`."""
        if not isinstance(weight, _Panels):
            return super().rows(weight, tokens)
        w = weight.packed
        assert w.scales is not None
        panels, lanes = np.divmod(tokens, PANEL)
        mins = None if w.mins is None else w.mins[panels]
        table = unpack(w.data[panels], w.scales[panels], mins, len(tokens) * PANEL, w.cols)
        return np.ascontiguousarray(table.reshape(len(tokens), PANEL, -1)[np.arange(len(tokens)), lanes])

    def product(self, x: F32, weight: Any) -> F32:
        """x @ weight^T. x holds dequantised int8 values, so computing in floats loses nothing that
        matters."""
        if not isinstance(weight, _Panels):
            return super().product(x, weight)
        rows, cols = x.shape
        if cols % GROUP:
            x = np.pad(x, ((0, 0), (0, round_up(cols, GROUP) - cols)))
        out = np.zeros((rows, len(weight.words), PANEL), np.float32)
        if weight.offsets is None:
            kernels.MATMUL_Q8[self._parallel](x, weight.words, weight.scales, out)
        else:
            sums = x.reshape(rows, -1, GROUP).sum(axis=2)
            matmul = kernels.MATMUL_Q4[self._parallel]
            matmul(x, sums, weight.words, weight.scales, weight.offsets, out)
        return out.reshape(rows, -1)[:, : weight.packed.rows]

    def norm(self, unit: int, op: Norm) -> None:
        x = self.buffers[op.x]
        if self.domains[op.out] == self.domains[op.x]:
            self._write(op.out, kernels.norm(x, self.weights[unit, op.weight].reshape(-1), op.epsilon))
        else:
            super().norm(unit, op)

    def gate(self, unit: int, op: Gate) -> None:
        if op.activation == "silu":
            self._write(op.out, kernels.silu_gate(self.buffers[op.x]))
        else:
            super().gate(unit, op)

    def _write(self, name: str, value: F32) -> None:
        self.buffers[name] = kernels.quantised(value) if self.types[name] == "q8" else value

    ops: ClassVar[dict[type[Any], Callable[[Any, int, Any], None]]] = {
        **NumpyExecutor.ops,
        Norm: norm,
        Gate: gate,
    }
