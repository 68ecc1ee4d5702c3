"""What a unit costs, read off its program: bytes held, bytes read per token, MACs, state, and what
crosses a cut.

The planner's rows are made of these (the command line and `net` join the two), so cost model and engine
cannot drift."""

from __future__ import annotations

from dataclasses import dataclass

from .kv_page import page_bytes
from .layout import PAGE
from .model_directory import Model
from .program import Program

_F32, _F64 = 4, 8


@dataclass(frozen=True, slots=True)
class UnitCost:
    """Costs of one unit; all per row of one sequence where it says so."""

    name: str
    bytes: int
    """Weights held in memory, those shared with unit 0 included."""
    read_bytes: int
    """Weight bytes read to decode one row."""
    macs: int
    """Multiply-accumulates of the matmuls, per row."""
    attend_macs: int
    """Multiply-accumulates of attention, per row and position of the state it looks at."""
    kv_bytes_per_token: int
    fixed_state_bytes: int
    cut_bytes: int
    """Bytes of one row that cross to the next unit; of the last unit, one token id."""


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
    """Bytes of the last unit that are unit 0's too: a device with both holds them once."""
    last = model.program.units[-1]
    return sum(last.weight(name).bytes for name in last.tied)


def constant_bytes(program: Program) -> int:
    """Bytes of the vectors that every stage holds."""
    return sum(len(values) * _F64 for _, values in program.constants)
