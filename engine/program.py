"""A model as a program: ops over named buffers, weights and states, unit by unit.

This is the computational graph. A family writes it once (`families/`); every backend runs it, `costs` reads
bytes and MACs off it, and a cut between two units is the list of buffers in `Program.cut`. Units are numbered
0 (embedding), 1 … n (layers), n + 1 (final norm and head); ranges of units are half-open."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Literal

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

    `source` is its name in a Hugging Face checkpoint. Families leave `type` alone: the model directory
    decides it (`typed`). Vectors stay f32 (f64 for inverse frequencies, which no checkpoint holds: their
    values are in `Program.constants`)."""

    name: str
    rows: int
    cols: int
    source: str = ""
    vector: bool = False
    type: WeightType = "f32"


@dataclass(frozen=True, slots=True)
class KvState:
    """Paged keys and values of one layer: `kv_heads` heads of `head_dim` columns each."""

    name: str
    kv_heads: int
    head_dim: int


@dataclass(frozen=True, slots=True)
class Embed:
    """out = the rows of the table that the tokens name."""

    out: str
    table: str


@dataclass(frozen=True, slots=True)
class Angles:
    """out = cos then sin of position x inverse frequency; `[rows, 2 * half]`."""

    out: str
    inv_freq: str


@dataclass(frozen=True, slots=True)
class Norm:
    """out = RMS norm of x, times weight; quantised when out is q8; gathers wanted rows when out holds
    those."""

    out: str
    x: str
    weight: str
    epsilon: float


@dataclass(frozen=True, slots=True)
class Quantise:
    """out (q8) = x (f32), int8 with one scale a row and group."""

    out: str
    x: str


@dataclass(frozen=True, slots=True)
class Matmul:
    """out = x @ [weights stacked by rows]^T, added to what out holds if `accumulate`."""

    out: str
    x: str
    weights: tuple[str, ...]
    accumulate: bool = False


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotates `heads` heads of `head_dim` columns at the start of x in place (first half against second
    half)."""

    x: str
    angles: str
    heads: int
    head_dim: int


@dataclass(frozen=True, slots=True)
class Store:
    """Writes keys (from column `key`) and values (from column `value`) of x into the state, at the rows'
    positions."""

    x: str
    state: str
    key: int
    value: int


@dataclass(frozen=True, slots=True)
class Attend:
    """out = causal attention of `heads` query heads at the start of x over the state."""

    out: str
    x: str
    state: str
    heads: int
    scale: float


@dataclass(frozen=True, slots=True)
class Gate:
    """out = activation(first half of x) * second half of x; quantised when out is q8."""

    out: str
    x: str
    activation: Literal["silu", "gelu_tanh"]


@dataclass(frozen=True, slots=True)
class Sample:
    """Draws the next token of every sequence that asked for one from x (logits)."""

    x: str


Op = Embed | Angles | Norm | Quantise | Matmul | Rope | Store | Attend | Gate | Sample


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

    def buffer(self, name: str) -> Buffer:
        """The buffer of that name. KeyError: no such buffer."""
        for buffer in self.buffers:
            if buffer.name == name:
                return buffer
        raise KeyError(name)

    def ops(self, first: int, last: int) -> Iterator[tuple[int, Op]]:
        """(unit, op) of a stage that runs units [first, last), in order; the prologue's ops come with unit
        -1."""
        body = [(u, op) for u in range(first, last) for op in self.units[u].ops]
        read = {name for _, op in body for name in reads(op)}
        yield from ((-1, op) for op in self.prologue if written(op) in read)
        yield from body


def typed(program: Program, matrices: WeightType, head: WeightType) -> Program:
    """The program with the types of its matrices: `head` for the last unit's and the table that it shares
    with unit 0, `matrices` for all others."""
    last = len(program.units) - 1
    shared = program.units[last].tied

    def weight(u: int, w: Weight) -> Weight:
        if w.vector:
            return w
        return replace(w, type=head if u == last or (u == 0 and w.name in shared) else matrices)

    return replace(
        program,
        units=tuple(
            replace(unit, weights=tuple(weight(u, w) for w in unit.weights))
            for u, unit in enumerate(program.units)
        ),
    )


def reads(op: Op) -> tuple[str, ...]:
    """Names of the buffers that an op reads."""
    names = tuple(getattr(op, f.name) for f in fields(op) if f.name in ("x", "angles"))
    return (*names, op.out) if isinstance(op, Matmul) and op.accumulate else names


def written(op: Op) -> str:
    """Name of the buffer that an op writes; empty if it writes a state or draws tokens."""
    if isinstance(op, Rope):
        return op.x
    return getattr(op, "out", "")
