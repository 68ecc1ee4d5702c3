"""What a unit costs, read off its program: bytes held, bytes read per token, MACs, state, and what crosses a
cut.

The planner's rows are made of these (the command line and `net` join the two), so cost model and engine
cannot drift."""

from __future__ import annotations

from dataclasses import dataclass

from .kv import page_bytes
from .layout import GROUP, PAGE, PANEL, round_up
from .program import Attend, Embed, Matmul, Op, Program, Unit, Weight
from .shards import Model

_F16, _F32, _F64 = 2, 4, 8


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


def weight_bytes(weight: Weight) -> int:
    """Bytes of a weight as our files hold it (padding of panels and groups included)."""
    if weight.type == "f32":
        return weight.rows * weight.cols * _F32
    rows, cols = round_up(weight.rows, PANEL), round_up(weight.cols, GROUP)
    per_group = {"q8": GROUP + _F16, "q4": GROUP // 2 + _F16, "q4_min": GROUP // 2 + 2 * _F16}
    return rows * (cols // GROUP) * per_group[weight.type]


def unit_cost(model: Model, u: int) -> UnitCost:
    """The costs of unit u of a model."""
    program = model.program
    unit = program.units[u]
    last = u == len(program.units) - 1
    return UnitCost(
        name=unit.name,
        bytes=sum(weight_bytes(w) for w in unit.weights),
        read_bytes=sum(op_read_bytes(op, unit) for op in unit.ops),
        macs=sum(op_macs(op, unit) for op in unit.ops),
        attend_macs=sum(op_attend_macs(op, unit) for op in unit.ops),
        kv_bytes_per_token=sum(page_bytes(s, model.kv_dtype) // PAGE for s in unit.states),
        fixed_state_bytes=0,
        cut_bytes=4 if last else sum(program.buffer(name).cols * _F32 for name in program.cut),
    )


def tied_bytes(model: Model) -> int:
    """Bytes of the last unit that are unit 0's too: a device with both holds them once."""
    last = model.program.units[-1]
    return sum(weight_bytes(last.weight(name)) for name in last.tied)


def op_weights(op: Op, unit: Unit) -> list[Weight]:
    """The unit's weights that an op reads."""
    match op:
        case Embed(table=name):
            names: tuple[str, ...] = (name,)
        case Matmul(weights=names):
            pass
        case _:
            names = (op.weight,) if hasattr(op, "weight") else ()
    return [unit.weight(name) for name in names]


def op_read_bytes(op: Op, unit: Unit) -> int:
    """Weight bytes that one row makes an op read: one table row for an embedding, everything else whole."""
    total = sum(weight_bytes(w) for w in op_weights(op, unit))
    return total // unit.weight(op.table).rows if isinstance(op, Embed) else total


def op_macs(op: Op, unit: Unit) -> int:
    """Multiply-accumulates of a matmul per row; 0 for other ops."""
    return sum(w.rows * w.cols for w in op_weights(op, unit)) if isinstance(op, Matmul) else 0


def op_attend_macs(op: Op, unit: Unit) -> int:
    """Multiply-accumulates of attention per row and position: one with the key, one with the value, in every
    query head. 0 for other ops."""
    if not isinstance(op, Attend):
        return 0
    return 2 * op.heads * next(state.head_dim for state in unit.states if state.name == op.state)


def constant_bytes(program: Program) -> int:
    """Bytes of the vectors that every stage holds."""
    return sum(len(values) * _F64 for _, values in program.constants)
