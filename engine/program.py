"""A program: the computational graph of a model, as ops over named buffers, weights and states, unit by unit.

A family writes it once (`families/`); every backend runs it, and `costs` computes bytes and MACs from it. The
buffers in `Program.cut` cross from one unit to the next. Units are 0 (embedding), 1 to n (layers) and n + 1
(final norm and head); ranges of units are half-open. The head is an LM head, whose logits are those of
tokens, or a classification head, whose logits are those of labels."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from .layout import GROUP, PANEL, round_up

BufferType = Literal["f32", "q8"]
WeightType = Literal["f32", "q8", "q4", "q4_min"]
"""Types of matrices: f32, int8, int4, and int4 with a minimum per group."""
Domain = Literal["rows", "wanted"]


@dataclass(frozen=True, slots=True)
class Buffer:
    """Activations `[rows, cols]`. In the domain `wanted` they are those of logit rows only."""

    name: str
    cols: int
    type: BufferType = "f32"
    domain: Domain = "rows"


@dataclass(frozen=True, slots=True)
class Weight:
    """A tensor of one unit: a matrix `[rows, cols]`, or a vector `[cols]` with rows = 1.

    `source` is its name in a Hugging Face checkpoint. Families write float programs; the pass `typed` sets
    `type` to the model directory's. Vectors stay f32. Inverse frequencies are f64: no checkpoint has them,
    and their values are in `Program.constants`."""

    name: str
    rows: int
    cols: int
    source: str = ""
    vector: bool = False
    type: WeightType = "f32"

    @property
    def bytes(self) -> int:
        """Bytes in a model directory, including the padding of panels and groups."""
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
    """One operation of a program. A subclass is a frozen dataclass whose fields have the names of
    `shoal_op`'s (csrc/kernels.h; `x` is `in` there), by which the native backend copies them. Costs,
    equalisation, calibration and `shoal inspect` use only its methods to find out what it reads, writes and
    costs."""

    __slots__ = ()

    @property
    def kind(self) -> str:
        """The op's name in snake case, such as "head_norm"."""
        return re.sub("(?<!^)(?=[A-Z])", "_", type(self).__name__).lower()

    def reads(self) -> tuple[str, ...]:
        """Names of the buffers that the op reads."""
        return ()

    def writes(self) -> str | None:
        """Name of the buffer that the op writes; None if it writes a state or draws tokens."""
        return None

    def changes(self) -> tuple[int, int] | None:
        """Columns [first, last) of its output that an in-place op changes; None: the op overwrites all."""
        return None

    def reads_state(self) -> str | None:
        """Name of the state that the op reads."""
        return None

    def writes_state(self) -> str | None:
        """Name of the state that the op writes."""
        return None

    def weight_names(self) -> tuple[str, ...]:
        """Names of the weights that the op reads, without biases: of its unit, or, in the prologue, of the
        constants."""
        return ()

    def bias_names(self) -> tuple[str, ...]:
        """Names of the biases that the op adds."""
        return ()

    def read_bytes(self, unit: Unit) -> int:
        """Bytes of weights and biases that the op reads for one row."""
        return sum(unit.weight(name).bytes for name in (*self.weight_names(), *self.bias_names()))

    def macs(self, unit: Unit) -> int:
        """Multiply-accumulates of matrix products, per row."""
        return 0

    def attend_macs(self, unit: Unit) -> int:
        """Multiply-accumulates of attention, per row and position of the state."""
        return 0

    @property
    def writes_int8(self) -> bool:
        """Whether the op can write its output as int8 (q8) as well as f32."""
        return False


@dataclass(frozen=True, slots=True)
class Embed(Op):
    """out = the rows of the table at the token ids."""

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
    """out = cosines, then sines, of position * inverse frequency; `[rows, 2 * half]`."""

    out: str
    inv_freq: str

    def writes(self) -> str:
        return self.out

    def weight_names(self) -> tuple[str, ...]:
        return (self.inv_freq,)


@dataclass(frozen=True, slots=True)
class Norm(Op):
    """out = RMS norm of x, times weight; quantised if out is q8. Gathers the logit rows if the domain of out
    is `wanted`."""

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
    """In-place RMS norm of each of `heads` heads of `head_dim` columns, starting at `column` of out, times
    weight `[head_dim]`."""

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
    """out (q8) = x (f32), quantised to int8 with one scale per row and group."""

    out: str
    x: str

    def reads(self) -> tuple[str, ...]:
        return (self.x,)

    def writes(self) -> str:
        return self.out


@dataclass(frozen=True, slots=True)
class Matmul(Op):
    """out = x @ [weights stacked by rows]^T + biases; `accumulate` adds it to out instead."""

    out: str
    x: str
    weights: tuple[str, ...]
    accumulate: bool = False
    biases: tuple[str | None, ...] = ()
    """For each weight, the bias vector of its outputs, or None; empty: no weight has a bias."""

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
    """In-place rotary position embedding of the first `heads` heads of `head_dim` columns of out: column j of
    a head rotates with column j + half."""

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
    """Writes keys (x from column `key` on) and values (x from column `value` on) to the state, at the rows'
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
    """out = causal attention over the state; the first columns of x are `heads` query heads."""

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
        """Two per query head and column: one with the key, one with the value."""
        return 2 * self.heads * unit.state(self.state).head_dim


@dataclass(frozen=True, slots=True)
class Gate(Op):
    """out = activation(first half of x) * second half of x; quantised if out is q8."""

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
    """Draws the next token from the logits x, for every sequence that wants one."""

    x: str

    def reads(self) -> tuple[str, ...]:
        return (self.x,)


@dataclass(frozen=True, slots=True)
class Unit:
    """One unit of a model: the smallest part that a device can load, hold or move."""

    name: str
    ops: tuple[Op, ...]
    weights: tuple[Weight, ...]
    states: tuple[KvState, ...] = ()
    tied: tuple[str, ...] = ()
    """Names of weights that this unit shares with unit 0, whose file has them."""

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
    """The program of a whole model. A stage runs the prologue, then its range of units."""

    units: tuple[Unit, ...]
    prologue: tuple[Op, ...]
    """Ops that depend on positions only. Every stage that reads their buffers runs them first."""
    buffers: tuple[Buffer, ...]
    cut: tuple[str, ...]
    """Names of the buffers that cross from one unit to the next."""
    constants: tuple[tuple[str, tuple[float, ...]], ...]
    """f64 vectors by name that every stage needs (`common.safetensors`), computed when the model is
    converted."""
    logits: str
    vocab: int
    output: Norm | None = None
    """The final norm once more, of every row and in f32, for `Want.ROWS`. It belongs to the last unit, and is
    run only for a batch that wants it."""
    labels: int = 0
    """Labels of the classification head; 0: the model has an LM head."""
    ignored: tuple[str, ...] = ()
    """Patterns (fnmatch) of tensors that a checkpoint may have and the program does not use."""
    window: int | None = None
    """The attention window: positions visible to a query, its own included; None: all. Longer contexts are
    refused."""

    def buffer(self, name: str) -> Buffer:
        """The buffer of that name. KeyError: no such buffer."""
        for buffer in self.buffers:
            if buffer.name == name:
                return buffer
        raise KeyError(name)

    @property
    def logit_cols(self) -> int:
        """Columns of a row of logits: tokens of the vocabulary, or labels."""
        return self.buffer(self.logits).cols

    @property
    def output_cols(self) -> int:
        """Columns of a row of `output`."""
        return 0 if self.output is None else self.buffer(self.output.out).cols

    @property
    def cut_cols(self) -> int:
        """Columns of a hidden row: the concatenated buffers of the cut."""
        return sum(self.buffer(name).cols for name in self.cut)

    def ops(self, first: int, last: int) -> Iterator[tuple[int, Op]]:
        """The ops (unit, op) of a stage with units [first, last), in order; ops of the prologue have unit
        -1. `output` is among those of the last unit."""
        body = [(u, op) for u in range(first, last) for op in self.units[u].ops]
        if self.output is not None and last == len(self.units):
            body.insert(len(body) - len(self.units[-1].ops), (last - 1, self.output))
        read = {name for _, op in body for name in op.reads()}
        yield from ((-1, op) for op in self.prologue if op.writes() in read)
        yield from body
