"""The costs of a unit, computed from its program: bytes in memory, bytes read per token, MACs, and bytes of
the state and the cut.

The planner's figures are made from these (by the command line and `net`), so the cost model cannot differ
from what the engine runs."""

from __future__ import annotations

from dataclasses import dataclass

from .kv_page import page_bytes
from .layout import PAGE
from .model_directory import Model
from .program import Program

_F32, _F64 = 4, 8


@dataclass(frozen=True, slots=True)
class UnitCost:
    """Costs of one unit."""

    name: str
    bytes: int
    """Bytes of weights in memory, including those shared with unit 0."""
    read_bytes: int
    """Bytes of weights read to decode one row."""
    macs: int
    """Multiply-accumulates of the matmuls, per row."""
    attend_macs: int
    """Multiply-accumulates of attention, per row and visible position of the state."""
    kv_bytes_per_token: int
    fixed_state_bytes: int
    cut_bytes: int
    """Bytes sent to the next unit per row. For the last unit, the bytes of a token id."""


def unit_cost(model: Model, u: int) -> UnitCost:
    """The costs of unit u of a model."""
    program = model.program
    unit = program.units[u]
    last = u == len(program.units) - 1
    return UnitCost(
        name=unit.name,
        bytes=sum(w.bytes for w in unit.weights),
        read_bytes=sum(op.read_bytes(unit) for op in unit.ops),
        macs=sum(op.macs(unit) for op in unit.ops),
        attend_macs=sum(op.attend_macs(unit) for op in unit.ops),
        kv_bytes_per_token=sum(page_bytes(s, model.kv_dtype) // PAGE for s in unit.states),
        fixed_state_bytes=0,
        cut_bytes=4 if last else sum(program.buffer(name).cols * _F32 for name in program.cut),
    )


def tied_bytes(model: Model) -> int:
    """Bytes of weights that the last unit shares with unit 0; a device with both units has them once."""
    last = model.program.units[-1]
    return sum(last.weight(name).bytes for name in last.tied)


def constant_bytes(program: Program) -> int:
    """Bytes of the constants, which every stage has."""
    return sum(len(values) * _F64 for _, values in program.constants)
