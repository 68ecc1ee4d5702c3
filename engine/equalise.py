"""Channel equalisation: moves scale between weights that meet, so that int8 rounds both sides more
finely.

Where one op's output feeds matmuls, channel j of it may be divided by s_j and column j of the matmuls
multiplied by s_j; the division is folded into the weights that made the channel, so it costs nothing when the
model runs. s = sqrt(size of the channel / largest weight of the column), as in SmoothQuant (Xiao et al.,
arXiv 2211.10438) with alpha 0.5, where the sizes are measured (`calibrate`). Three folds, found by the ops
and not by names: a norm's weight; the ungated half of a Gate; the values of an attention, the latter two with
their biases."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .arrays import F32, F64
from .program import Attend, Gate, Matmul, Norm, Op, Store, Unit

_RANGE = 64.0  # no channel moves by more


def equalise(unit: Unit, weights: dict[str, F32], sizes: dict[tuple[str, ...], F64]) -> frozenset[str]:
    """Rescales the unit's weights in place; in exact arithmetic the unit computes the same. Returns the names
    of those that changed.

    `sizes` holds the size of every input column of each matmul, by its weights' names; it is rescaled
    too."""
    changed: set[str] = set()
    for i, op in enumerate(unit.ops):
        readers = list(_readers(unit.ops, i))
        if not readers or not all(isinstance(reader, Matmul) for reader in readers):
            continue
        names = [name for reader in readers if isinstance(reader, Matmul) for name in reader.weights]
        if not {*names} <= weights.keys():
            continue  # a table shared with another unit must stay as it is
        sized = next(reader for reader in readers if isinstance(reader, Matmul))
        size = sizes[sized.weights]
        largest = np.max([np.abs(weights[name]).max(axis=0) for name in names], axis=0).astype(np.float64)
        if isinstance(op, Norm):
            s = _scales(size, largest)
            weights[op.weight] = (weights[op.weight] / s).astype(np.float32)
            changed.add(op.weight)
        elif isinstance(op, Gate) and (part := _part(unit, i, op.x, size.size)):
            s = _scales(size, largest)
            part.divide(weights, s)
            changed |= part.names
        elif isinstance(op, Attend) and (part := _value_part(unit, i, op)):
            s = _fold_values(unit, op, part, weights, size, largest)
            changed |= part.names
        else:
            continue
        for name in names:
            weights[name] = (weights[name] * s).astype(np.float32)
        for reader in readers:
            if isinstance(reader, Matmul):
                sizes[reader.weights] = sizes[reader.weights] / s
        changed.update(names)
    return frozenset(changed)


def _fold_values(
    unit: Unit, op: Attend, part: _Part, weights: dict[str, F32], size: F64, largest: F64
) -> F64:
    """Folds into the values' rows; the query heads of a group share the values, so they share the scales."""
    state = unit.state(op.state)
    shape = (state.kv_heads, op.heads // state.kv_heads, state.head_dim)
    s = _scales(size.reshape(shape).max(axis=1).ravel(), largest.reshape(shape).max(axis=1).ravel())
    part.divide(weights, s)
    return np.broadcast_to(s.reshape(shape[0], 1, shape[2]), shape).reshape(-1)


def _scales(size: F64, largest: F64) -> F64:
    """sqrt(size / largest), within limits about its median, and rounded to 8 bits, which cuts off the
    last bits, in which machines differ."""
    floor = max(float(size.max()), 1e-30) * 1e-6
    s = np.sqrt(np.maximum(size, floor) / np.maximum(largest, float(np.finfo(np.float32).tiny)))
    s = np.clip(s / np.median(s), 1 / _RANGE, _RANGE)
    mantissa, exponent = np.frexp(s)
    rounded: F64 = np.ldexp(np.rint(mantissa * 256) / 256, exponent)
    return rounded


def _readers(ops: tuple[Op, ...], i: int) -> Iterator[Op]:
    """Ops that read what op i writes, before it is written anew."""
    name = ops[i].writes()
    for op in ops[i + 1 :]:
        if name in op.reads():
            yield op
        if name is not None and op.writes() == name:
            return


@dataclass(frozen=True, slots=True)
class _Part:
    """A weight of a matmul whose outputs are the last columns of a buffer, and their bias."""

    weight: str
    bias: str | None

    @property
    def names(self) -> set[str]:
        """Names of what is there of the two."""
        return {self.weight} if self.bias is None else {self.weight, self.bias}

    def divide(self, weights: dict[str, F32], s: F64) -> None:
        """Divides the outputs by s."""
        weights[self.weight] = (weights[self.weight] / s[:, None]).astype(np.float32)
        if self.bias is not None:
            weights[self.bias] = (weights[self.bias] / s).astype(np.float32)


def _part(unit: Unit, i: int, buffer: str, first: int) -> _Part | None:
    """The part that makes the columns from `first` on of a buffer that op i reads; None unless exactly
    one does, and nothing else has touched those columns."""
    for op in reversed(unit.ops[:i]):
        if op.writes() == buffer:
            changed = op.changes()
            if changed is not None and changed[1] <= first:
                continue
            if not isinstance(op, Matmul) or op.accumulate:
                return None
            *others, last = op.weights
            if sum(unit.weight(name).rows for name in others) != first:
                return None
            return _Part(last, op.biases[-1] if op.biases else None)
    return None


def _value_part(unit: Unit, i: int, attend: Attend) -> _Part | None:
    """The part that makes the values that op i, an Attend, reads from its state."""
    stores = [
        (j, op) for j, op in enumerate(unit.ops[:i]) if isinstance(op, Store) and op.state == attend.state
    ]
    if len(stores) != 1:
        return None
    j, store = stores[0]
    return _part(unit, j, store.x, store.value)
