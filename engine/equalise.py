"""Channel equalisation: moves scale between weights and the activations that they multiply, so that rounding
both to int8 loses less.

If an op's output feeds matmuls, its channel j can be divided by s_j and column j of the matmuls multiplied by
s_j. The division is folded into the weights that produce the channel, so it costs nothing at run time. s =
sqrt(size of the channel / largest weight of the column), as in SmoothQuant (Xiao et al., arXiv 2211.10438)
with alpha 0.5; sizes are measured (`calibrate`). There are three kinds of folds, found by op types and not by
names: into the weight of a norm; into the projection of a Gate's second half; and into the projection of the
values of attention. The latter two include biases."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .arrays import F32, F64
from .program import Attend, Gate, Matmul, Norm, Op, Store, Unit

_RANGE = 64.0  # largest factor by which a channel is scaled


def equalise(unit: Unit, weights: dict[str, F32], sizes: dict[tuple[str, ...], F64]) -> frozenset[str]:
    """Rescales the weights of a unit in place, without changing its output in exact arithmetic. Returns the
    names of the changed weights.

    `sizes` has the size of every input column of each matmul, by the names of its weights; they are rescaled
    too."""
    changed: set[str] = set()
    for i, op in enumerate(unit.ops):
        readers = list(_readers(unit.ops, i))
        if not readers or not all(isinstance(reader, Matmul) for reader in readers):
            continue
        names = [name for reader in readers if isinstance(reader, Matmul) for name in reader.weights]
        if not {*names} <= weights.keys():
            continue  # a table that another unit shares must not change
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
    """Folds scales into the rows of the value projection; returns the scales of the attention's output
    columns. Query heads that share a kv head share its scales."""
    state = unit.state(op.state)
    shape = (state.kv_heads, op.heads // state.kv_heads, state.head_dim)
    s = _scales(size.reshape(shape).max(axis=1).ravel(), largest.reshape(shape).max(axis=1).ravel())
    part.divide(weights, s)
    return np.broadcast_to(s.reshape(shape[0], 1, shape[2]), shape).reshape(-1)


def _scales(size: F64, largest: F64) -> F64:
    """Scales sqrt(size / largest) divided by their median, limited to 1/64 … 64, and rounded to 8 bits, which
    removes the last bits, in which machines differ."""
    floor = max(float(size.max()), 1e-30) * 1e-6
    s = np.sqrt(np.maximum(size, floor) / np.maximum(largest, float(np.finfo(np.float32).tiny)))
    s = np.clip(s / np.median(s), 1 / _RANGE, _RANGE)
    mantissa, exponent = np.frexp(s)
    rounded: F64 = np.ldexp(np.rint(mantissa * 256) / 256, exponent)
    return rounded


def _readers(ops: tuple[Op, ...], i: int) -> Iterator[Op]:
    """Ops that read the output of op i before it is overwritten."""
    name = ops[i].writes()
    for op in ops[i + 1 :]:
        if name in op.reads():
            yield op
        if name is not None and op.writes() == name:
            return


@dataclass(frozen=True, slots=True)
class _Part:
    """A weight of a matmul whose outputs are the last columns of a buffer, and its bias."""

    weight: str
    bias: str | None

    @property
    def names(self) -> set[str]:
        """Names of the weight and, if there is one, the bias."""
        return {self.weight} if self.bias is None else {self.weight, self.bias}

    def divide(self, weights: dict[str, F32], s: F64) -> None:
        """Divides the outputs of the part by s, by rescaling the weight and the bias."""
        weights[self.weight] = (weights[self.weight] / s[:, None]).astype(np.float32)
        if self.bias is not None:
            weights[self.bias] = (weights[self.bias] / s).astype(np.float32)


def _part(unit: Unit, i: int, buffer: str, first: int) -> _Part | None:
    """The part that computes the columns from `first` on of a buffer that op i reads. None, unless exactly
    one weight does and no other op changes those columns."""
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
    """The part that computes the values that op i, an Attend, reads from its state; None: see `_part`."""
    stores = [
        (j, op) for j, op in enumerate(unit.ops[:i]) if isinstance(op, Store) and op.state == attend.state
    ]
    if len(stores) != 1:
        return None
    j, store = stores[0]
    return _part(unit, j, store.x, store.value)
