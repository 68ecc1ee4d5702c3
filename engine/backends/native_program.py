"""A bound range of units as the tables of kernels.h: what `shoal_open` takes, and what `export_c` writes as
C."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..program import Op
from ._abi import ffi
from .base import BoundProgram, WeightData

ENUMS: dict[str, int] = {
    name: value
    for enum in ("type", "domain", "activation", "op_kind", "status")
    for name, value in ffi.typeof(f"enum shoal_{enum}").relements.items()
}
_KV_TYPES = {"f32": "SHOAL_F32", "f16": "SHOAL_F16", "int8": "SHOAL_Q8"}
_OP_FIELDS = frozenset(name for name, _ in ffi.typeof("shoal_op").fields)


def describe(bound: BoundProgram, keep: list[Any]) -> Any:
    """A `shoal_program` with its tables. `keep` gets the objects that it points to."""
    weight_rows = {key: row for row, key in enumerate(bound.weights)}
    buffer_rows = {b.name: row for row, b in enumerate(bound.program.buffers)}
    state_rows = {(unit, state.name): row for row, (unit, state) in enumerate(bound.states)}
    ops = ffi.new("shoal_op[]", [_op(u, op, buffer_rows, weight_rows, state_rows) for u, op in bound.ops])
    buffers = ffi.new(
        "shoal_buffer[]",
        [
            (
                ENUMS[f"SHOAL_{b.type.upper()}"],
                b.cols,
                ENUMS[f"SHOAL_{'ALL' if b.domain == 'rows' else 'WANTED'}_ROWS"],
            )
            for b in bound.program.buffers
        ],
    )
    weights = ffi.new("shoal_weight[]", [_weight(w, keep) for w in bound.weights.values()])
    kv_type = ENUMS[_KV_TYPES[bound.kv_type]]
    states = ffi.new("shoal_state[]", [(kv_type, s.kv_heads, s.head_dim) for _, s in bound.states])
    cut = [buffer_rows[name] for name in bound.program.cut]
    inputs = ffi.new("int32_t[]", [] if bound.reads_tokens else cut)
    ends = [bound.program.logits]
    if bound.program.output is not None:
        ends.append(bound.program.output.out)
    outputs = ffi.new("int32_t[]", [buffer_rows[name] for name in ends] if bound.last else cut)
    keep += [ops, buffers, weights, states, inputs, outputs]
    program = ffi.new("shoal_program *")
    program.ops, program.buffers, program.weights = ops, buffers, weights
    program.states, program.inputs, program.outputs = states, inputs, outputs
    program.n_ops, program.n_buffers, program.n_weights = len(ops), len(buffers), len(weights)
    program.n_states, program.n_inputs, program.n_outputs = len(states), len(inputs), len(outputs)
    program.max_rows, program.max_wanted = bound.max_rows, bound.max_wanted
    return program


def keep_buffer(keep: list[Any], ctype: str, array: NDArray[Any]) -> Any:
    """A C pointer to an array's memory. `keep` holds a reference, so that the memory stays valid."""
    pointer = ffi.from_buffer(ctype, array)
    keep.append(pointer)
    return pointer


def _weight(weight: WeightData, keep: list[Any]) -> dict[str, Any]:
    """A row of the weight table, by field name of `shoal_weight`."""
    row = {"rows": weight.rows, "cols": weight.cols, "data_bytes": weight.data.nbytes}
    row["data"] = keep_buffer(keep, "char[]", weight.data)
    kinds = {np.float32: "F32", np.float64: "F64", np.int8: "Q8", np.uint8: "Q4"}
    row["type"] = ENUMS[f"SHOAL_{kinds[weight.data.dtype.type]}"]
    for name in ("scales", "mins"):
        array = getattr(weight, name)
        if array is not None:
            row[name], row[f"{name}_bytes"] = keep_buffer(keep, "uint16_t[]", array), array.nbytes
    return row


def _op(
    unit: int,
    op: Op,
    buffers: dict[str, int],
    weights: dict[tuple[int, str], int],
    states: dict[tuple[int, str], int],
) -> dict[str, Any]:
    """A row of the op table, by field name of `shoal_op`. The fields of `op` have the same names, except `x`,
    which is `in` there, and names of weights."""
    names = op.weight_names()
    row: dict[str, Any] = dict.fromkeys(("out", "in", "angles", "state"), -1)
    row |= {"weights": [weights[unit, name] for name in names], "n_weights": len(names)}
    for field in fields(op):  # type: ignore[arg-type]
        name, value = field.name, getattr(op, field.name)
        if name in ("out", "x", "angles"):
            row["in" if name == "x" else name] = buffers[value]
        elif name == "state":
            row[name] = states[unit, value]
        elif name == "activation":
            row[name] = ENUMS[f"SHOAL_{value.upper()}"]
        elif name == "biases":
            row["biases"] = [-1 if bias is None else weights[unit, bias] for bias in value]
            row["n_biases"] = len(value)
        elif name in _OP_FIELDS and name not in row:
            row[name] = value
    return {**row, "kind": ENUMS[f"SHOAL_OP_{op.kind.upper()}"]}
