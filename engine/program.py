"""A model as a program: ops over named buffers, weights and states, unit by unit.

This is the computational graph. A family writes it once (`families/`); every backend runs it, `costs`
reads bytes and MACs off it, and a cut between two units is the list of buffers in `Program.cut`. Units
are numbered 0 (embedding), 1 … n (layers), n + 1 (final norm and head); ranges of units are half-open."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from .layout import GROUP, PANEL, round_up

BufferType = Literal["f32", "q8"]
WeightType = Literal["f32", "q8", "q4", "q4_min"]
"""Of matrices: floats, int8, int4, int4 with a minimum a group."""
Domain = Literal["rows", "wanted"]


@dataclass(frozen=True, slots=True)
class Buffer:
    """Activations `[rows, cols]`; `wanted` buffers hold only the rows whose logits are wanted."""

    name: str
    cols: int
    type: BufferType = "f32"
    domain: Domain = "rows"


@dataclass(frozen=True, slots=True)
class Weight:
    """A tensor of one unit: a matrix `[rows, cols]`, or a vector `[cols]` with rows = 1.

    `source` is its name in a Hugging Face checkpoint. Families write programs of floats: the model directory
    decides `type` (`typed`). Vectors stay f32 (f64 for inverse frequencies, which no checkpoint holds: their
    values are in `Program.constants`)."""

    name: str
    rows: int
    cols: int
    source: str = ""
    vector: bool = False
    type: WeightType = "f32"

    @property
    def bytes(self) -> int:
        """Bytes as our files hold it (padding of panels and groups included)."""
        if self.type == "f32":
            return self.rows * self.cols * 4
        groups = round_up(self.rows, PANEL) * round_up(self.cols, GROUP) // GROUP
        return groups * {"q8": GROUP + 2, "q4": GROUP // 2 + 2, "q4_min": GROUP // 2 + 4}[self.type]


@dataclass(frozen=True, slots=True)
class KvState:
    """Paged keys and values of one layer: `kv_heads` heads of `head_dim` columns each."""

    name: str
    kv_heads: int
    head_dim: int


class Op:
    """One operation of a program. A subclass is a frozen dataclass whose fields are called as in
    `shoal_op` (csrc/kernels.h; `x` is its `in`), which is how the native backend passes them on. Costs,
    equalisation, calibration and `shoal inspect` ask its methods, and nothing else, what it reads, writes
    and needs."""

    __slots__ = ()

    @property
    def kind(self) -> str:
        """Its name in small letters: "matmul"."""
        return re.sub("(?<!^)(?=[A-Z])", "_", type(self).__name__).lower()

    def reads(self) -> tuple[str, ...]:
        """Names of the buffers that it reads."""
        return ()

    def writes(self) -> str | None:
        """Name of the buffer that it writes; None if it writes a state or draws tokens."""
        return None

    def changes(self) -> tuple[int, int] | None:
        """The columns [first, last) of its output that an op in place changes; None: it writes all
        anew."""
        return None

    def reads_state(self) -> str | None:
        """Name of the state that it reads."""
        return None

    def writes_state(self) -> str | None:
        """Name of the state that it writes."""
        return None

    def weight_names(self) -> tuple[str, ...]:
        """Names of the weights of its unit (of an op in the prologue: of the constants) that it reads; biases
        are apart."""
        return ()

    def bias_names(self) -> tuple[str, ...]:
        """Names of the biases that it adds."""
        return ()

    def read_bytes(self, unit: Unit) -> int:
        """Bytes of weights and biases that one row makes it read."""
        return sum(unit.weight(name).bytes for name in (*self.weight_names(), *self.bias_names()))

    def macs(self, unit: Unit) -> int:
        """Multiply-accumulates of matrix products, a row."""
        return 0

    def attend_macs(self, unit: Unit) -> int:
        """Multiply-accumulates of attention, a row and position of the state."""
        return 0

    @property
    def writes_int8(self) -> bool:
        """Whether it can write its output as int8 (q8) as well as in floats."""
        return False


@dataclass(frozen=True, slots=True)
class Embed(Op):
    """out = the rows of the table that the tokens name."""

    out: str
    table: str

    def writes(self) -> str:
        return self.out

    def weight_names(self) -> tuple[str, ...]:
        return (self.table,)

    def read_bytes(self, unit: Unit) -> int:
        """One row of the table."""
        table = unit.weight(self.table)
        return table.bytes // table.rows


@dataclass(frozen=True, slots=True)
class Angles(Op):
    """out = cos then sin of position x inverse frequency; `[rows, 2 * half]`."""

    out: str
    inv_freq: str

    def writes(self) -> str:
        return self.out

    def weight_names(self) -> tuple[str, ...]:
        return (self.inv_freq,)


@dataclass(frozen=True, slots=True)
class Norm(Op):
    """out = RMS norm of x, times weight; quantised when out is q8; gathers wanted rows when out holds
    those."""

    out: str
    x: str
    weight: str
    epsilon: float

    def reads(self) -> tuple[str, ...]:
        return (self.x,)

    @property
    def writes_int8(self) -> bool:
        return True

    def writes(self) -> str:
        return self.out

    def weight_names(self) -> tuple[str, ...]:
        return (self.weight,)


@dataclass(frozen=True, slots=True)
class HeadNorm(Op):
    """RMS norm in place of each of `heads` heads of `head_dim` columns, from `column` of out on, times weight
    `[head_dim]`."""

    out: str
    weight: str
    column: int
    heads: int
    head_dim: int
    epsilon: float

    def reads(self) -> tuple[str, ...]:
        return (self.out,)

    def writes(self) -> str:
        return self.out

    def changes(self) -> tuple[int, int]:
        return self.column, self.column + self.heads * self.head_dim

    def weight_names(self) -> tuple[str, ...]:
        return (self.weight,)


@dataclass(frozen=True, slots=True)
class Quantise(Op):
    """out (q8) = x (f32), int8 with one scale a row and group."""

    out: str
    x: str

    def reads(self) -> tuple[str, ...]:
        return (self.x,)

    def writes(self) -> str:
        return self.out


@dataclass(frozen=True, slots=True)
class Matmul(Op):
    """out = x @ [weights stacked by rows]^T + biases, added to what out holds if `accumulate`."""

    out: str
    x: str
    weights: tuple[str, ...]
    accumulate: bool = False
    biases: tuple[str | None, ...] = ()
    """By weight, the vector that is added to its outputs, or None; empty: no weight has a bias."""

    def reads(self) -> tuple[str, ...]:
        return (self.x, self.out) if self.accumulate else (self.x,)

    def writes(self) -> str:
        return self.out

    def weight_names(self) -> tuple[str, ...]:
        return self.weights

    def bias_names(self) -> tuple[str, ...]:
        return tuple(name for name in self.biases if name is not None)

    def macs(self, unit: Unit) -> int:
        return sum(w.rows * w.cols for w in map(unit.weight, self.weights))


@dataclass(frozen=True, slots=True)
class Rope(Op):
    """Rotates `heads` heads of `head_dim` columns at the start of out in place (first half against second
    half)."""

    out: str
    angles: str
    heads: int
    head_dim: int

    def reads(self) -> tuple[str, ...]:
        return (self.out, self.angles)

    def writes(self) -> str:
        return self.out

    def changes(self) -> tuple[int, int]:
        return 0, self.heads * self.head_dim


@dataclass(frozen=True, slots=True)
class Store(Op):
    """Writes keys (from column `key`) and values (from column `value`) of x into the state, at the rows'
    positions."""

    x: str
    state: str
    key: int
    value: int

    def reads(self) -> tuple[str, ...]:
        return (self.x,)

    def writes_state(self) -> str:
        return self.state


@dataclass(frozen=True, slots=True)
class Attend(Op):
    """out = causal attention of `heads` query heads at the start of x over the state."""

    out: str
    x: str
    state: str
    heads: int
    scale: float

    def reads(self) -> tuple[str, ...]:
        return (self.x,)

    def writes(self) -> str:
        return self.out

    def reads_state(self) -> str:
        return self.state

    def attend_macs(self, unit: Unit) -> int:
        """One with the key, one with the value, in every query head and column."""
        return 2 * self.heads * unit.state(self.state).head_dim


@dataclass(frozen=True, slots=True)
class Gate(Op):
    """out = activation(first half of x) * second half of x; quantised when out is q8."""

    out: str
    x: str
    activation: Literal["silu", "gelu_tanh"]

    def reads(self) -> tuple[str, ...]:
        return (self.x,)

    @property
    def writes_int8(self) -> bool:
        return True

    def writes(self) -> str:
        return self.out


@dataclass(frozen=True, slots=True)
class Sample(Op):
    """Draws the next token of every sequence that asked for one from x (logits)."""

    x: str

    def reads(self) -> tuple[str, ...]:
        return (self.x,)


@dataclass(frozen=True, slots=True)
class Unit:
    """One unit of a model: what a device holds, loads, moves."""

    name: str
    ops: tuple[Op, ...]
    weights: tuple[Weight, ...]
    states: tuple[KvState, ...] = ()
    tied: tuple[str, ...] = ()
    """Weights that this unit shares with unit 0, whose file holds them."""

    def weight(self, name: str) -> Weight:
        """The weight of that name. KeyError: no such weight."""
        for weight in self.weights:
            if weight.name == name:
                return weight
        raise KeyError(name)

    def state(self, name: str) -> KvState:
        """The state of that name. KeyError: no such state."""
        for state in self.states:
            if state.name == name:
                return state
        raise KeyError(name)


@dataclass(frozen=True, slots=True)
class Program:
    """A whole model: `units[a:b]` after `prologue` is what a stage runs."""

    units: tuple[Unit, ...]
    prologue: tuple[Op, ...]
    """Ops that depend on positions only: run first by every stage that reads their buffers."""
    buffers: tuple[Buffer, ...]
    cut: tuple[str, ...]
    """Buffers that cross from one unit to the next."""
    constants: tuple[tuple[str, tuple[float, ...]], ...]
    """f64 vectors that every stage holds (`common.safetensors`), computed once, when the model was
    converted."""
    logits: str
    vocab: int
    ignored: tuple[str, ...] = ()
    """Patterns (fnmatch) of tensors that a checkpoint may hold and the program does not use."""
    window: int | None = None
    """Positions that attention looks back, itself included; None: all. Longer contexts are refused."""

    def buffer(self, name: str) -> Buffer:
        """The buffer of that name. KeyError: no such buffer."""
        for buffer in self.buffers:
            if buffer.name == name:
                return buffer
        raise KeyError(name)

    @property
    def cut_cols(self) -> int:
        """Columns of a hidden row: the buffers of the cut side by side."""
        return sum(self.buffer(name).cols for name in self.cut)

    def ops(self, first: int, last: int) -> Iterator[tuple[int, Op]]:
        """(unit, op) of a stage that runs units [first, last), in order; the prologue's ops come with
        unit -1."""
        body = [(u, op) for u in range(first, last) for op in self.units[u].ops]
        read = {name for _, op in body for name in op.reads()}
        yield from ((-1, op) for op in self.prologue if op.writes() in read)
        yield from body
