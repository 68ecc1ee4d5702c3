"""Small programs for the C library, written in Python and run on any instruction set and number of threads.

Standalone on purpose: it packs weights and pages itself, from the words of csrc/kernels.h: a mistake in the
engine's own packing cannot hide one in the kernels.
"""

from __future__ import annotations

import atexit
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from shoal.engine.backends._abi import ffi
from shoal.engine.source_hash import source_hash

from .weights import ENUM, GROUP, PAGE, Weight

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
FLAGS = ("-std=c11", "-O3", "-ffp-contract=off", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror")
STATUS = {value: name[6:] for name, value in ffi.typeof("enum shoal_status").relements.items()}


class Refused(Exception):
    """The library gave a status other than OK."""

    def __init__(self, status: str, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status


@cache
def library_path() -> Path:
    """The library that `make lib` built if it is of these sources, else one compiled here and now."""
    built = ROOT / "src" / "shoal" / "libshoal.so"
    if built.exists():
        lib = ffi.dlopen(str(built))
        if ffi.string(lib.shoal_source_hash()).decode() == source_hash():
            return built
    folder = tempfile.mkdtemp(prefix="shoal-kernels-")
    atexit.register(shutil.rmtree, folder)
    return compile_library(Path(folder) / "libshoal.so")


@cache
def library() -> Any:
    return ffi.dlopen(str(library_path()))


def compile_library(output: Path, *flags: str) -> Path:
    """csrc/ as a shared library; any warning is an error."""
    sources = sorted(str(path) for path in CSRC.glob("*.c"))
    define = f'-DSHOAL_SOURCE_HASH="{source_hash()}"'
    subprocess.run(
        ["cc", *FLAGS, *flags, "-fPIC", "-shared", define, "-o", str(output), *sources, "-lpthread", "-lm"],
        check=True,
    )
    return output


@cache
def isas() -> tuple[str, ...]:
    """Instruction sets that can run here, scalar first."""
    rows = sorted(
        (value, name) for name, value in ENUM.items() if name.startswith("ISA_") and value != ENUM["ISA_AUTO"]
    )
    return tuple(name[4:].lower() for value, name in rows if library().shoal_isa_available(value))


@cache
def pool(threads: int) -> Any:
    """A pool that all tests share: threads that wait are asleep."""
    return library().shoal_pool_open(threads)


@dataclass
class State:
    """Keys and values of one layer."""

    kv_heads: int
    head_dim: int
    kind: str = "F16"

    @property
    def dtype(self) -> Any:
        return {"F32": np.float32, "F16": np.float16, "Q8": np.int8}[self.kind]

    @property
    def page_bytes(self) -> int:
        """Keys, values and, for int8, scales of each position's groups of keys and of its values."""
        if self.kind == "Q8":
            groups = -(-self.head_dim // GROUP)
            return PAGE * self.kv_heads * (groups * (GROUP + 2) + self.head_dim + 4)
        return 2 * PAGE * self.kv_heads * self.head_dim * np.dtype(self.dtype).itemsize


@dataclass
class Rows:
    """A run of rows of one sequence; pages `[states][n]` are made when the first run needs them."""

    rows: int
    first: int = 0
    wanted: int = 0
    sample: int = 0
    pages: list[list[Any]] = field(default_factory=list)
    history: Any = None
    sampling: dict[str, Any] = field(default_factory=dict)
    reported: int = 0
    given: Sequence[int] | None = None


@dataclass
class Program:
    """Tables under construction. Buffers, weights and states are named by their index."""

    max_rows: int = 64
    max_wanted: int | None = None
    ops: list[dict[str, Any]] = field(default_factory=list)
    buffers: list[tuple[int, int, int]] = field(default_factory=list)
    weights: list[Weight] = field(default_factory=list)
    states: list[State] = field(default_factory=list)
    inputs: list[int] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)

    def buffer(self, cols: int, kind: str = "F32", domain: str = "ALL_ROWS") -> int:
        self.buffers.append((ENUM[kind], cols, ENUM[domain]))
        return len(self.buffers) - 1

    def input(self, cols: int) -> int:
        self.inputs.append(self.buffer(cols))
        return self.inputs[-1]

    def output(self, buffer: int) -> int:
        self.outputs.append(buffer)
        return buffer

    def weight(self, weight: Weight) -> int:
        self.weights.append(weight)
        return len(self.weights) - 1

    def state(self, *args: Any) -> int:
        self.states.append(State(*args))
        return len(self.states) - 1

    def op(self, kind: str, out: int = -1, x: int = -1, *weights: int, **fields: Any) -> int:
        """Adds an op and gives its `out`."""
        row = {
            "kind": ENUM[f"OP_{kind}"],
            "out": out,
            "in": x,
            "angles": -1,
            "state": -1,
        }
        self.ops.append({**row, "weights": list(weights), "n_weights": len(weights), **fields})
        return out

    def table(self, keep: list[Any]) -> Any:
        """The shoal_program; keep holds what it points at."""
        p = ffi.new("shoal_program *")
        tables = {
            "ops": ffi.new("shoal_op[]", self.ops),
            "buffers": ffi.new("shoal_buffer[]", self.buffers),
            "weights": ffi.new("shoal_weight[]", [w.row() for w in self.weights]),
            "states": ffi.new("shoal_state[]", [(ENUM[s.kind], s.kv_heads, s.head_dim) for s in self.states]),
            "inputs": ffi.new("int32_t[]", self.inputs),
            "outputs": ffi.new("int32_t[]", self.outputs),
        }
        for name, rows in tables.items():
            setattr(p, name, rows)
            setattr(p, f"n_{name}", len(rows))
        p.max_rows = self.max_rows
        p.max_wanted = self.max_rows if self.max_wanted is None else self.max_wanted
        keep += [p, *tables.values(), *self.weights]
        return p

    def open(self, isa: str = "scalar", threads: int = 1) -> Executor:
        return Executor(self, isa, threads)


class Executor:
    """An opened program."""

    def __init__(self, program: Program, isa: str, threads: int) -> None:
        self.program, self._keep = program, []
        handle, error = ffi.new("shoal_executor **"), ffi.new("char[]", 256)
        status = library().shoal_open(
            program.table(self._keep), pool(threads), ENUM[f"ISA_{isa.upper()}"], handle, error, 256
        )
        check(status, error)
        self._handle = ffi.gc(handle[0], library().shoal_close)

    def workspace_bytes(self) -> int:
        return int(library().shoal_workspace_bytes(self._handle))

    def run(
        self,
        sequences: Sequence[Rows],
        inputs: Sequence[Any] = (),
        tokens: Any = None,
        want: bool | Collection[int] = True,
    ) -> Outcome:
        """One batch; inputs `[rows, cols]` each. `want`: whether outputs are asked for, or which."""
        p, keep = self.program, []
        rows, wanted = sum(s.rows for s in sequences), sum(s.wanted for s in sequences)
        batch = ffi.new("shoal_batch *")
        batch.sequences, batch.n_sequences = describe(p, sequences, keep), len(sequences)
        if tokens is not None:
            batch.tokens = pointer(keep, "int32_t[]", np.asarray(tokens, np.int32))
        arrays = [np.ascontiguousarray(x, np.float32) for x in inputs]
        assert [a.shape for a in arrays] == [(rows, p.buffers[b][1]) for b in p.inputs]
        batch.inputs = pointers(keep, arrays)
        domains = [p.buffers[b][2] for b in p.outputs]
        outputs = [
            np.full((rows if d == ENUM["ALL_ROWS"] else wanted, p.buffers[b][1]), np.nan, np.float32)
            for b, d in zip(p.outputs, domains, strict=True)
        ]
        keep.append(ffi.new("float *[]", len(outputs) or 1))
        batch.outputs = pointers(keep, outputs) if want else keep[-1]
        for i in range(len(outputs)):
            if not isinstance(want, bool) and i not in want:
                batch.outputs[i] = ffi.NULL
        drawn = np.full(wanted, -7, np.int32)
        batch.drawn = pointer(keep, "int32_t[]", drawn)
        most = batch.most_reported = max(s.reported for s in sequences)
        reports = np.full((wanted, most), -7, np.int32)
        logprobs = np.zeros((wanted, most), np.float32)
        batch.reports, batch.logprobs = (
            pointer(keep, "int32_t[]", reports),
            pointer(keep, "float[]", logprobs),
        )
        self.run_raw(batch)
        return Outcome(outputs, drawn, reports, logprobs)

    def run_raw(self, batch: Any) -> None:
        """One batch as it stands. Refused: the library said no."""
        error = ffi.new("char[]", 256)
        check(library().shoal_run(self._handle, batch, error, 256), error)


@dataclass
class Outcome:
    outputs: list[Any]
    drawn: Any
    reports: Any
    logprobs: Any


def check(status: int, error: Any) -> None:
    if STATUS[status] != "OK":
        raise Refused(STATUS[status], ffi.string(error).decode())


def pointer(keep: list[Any], ctype: str, array: Any) -> Any:
    keep.append(ffi.from_buffer(ctype, array))
    return keep[-1]


def pointers(keep: list[Any], arrays: Sequence[Any]) -> Any:
    keep.append(ffi.new("float *[]", [pointer(keep, "float[]", a) for a in arrays] or 1))
    return keep[-1]


def describe(p: Program, sequences: Sequence[Rows], keep: list[Any]) -> Any:
    """The shoal_sequence rows. Pages made here are full of NaN: a kernel that reads too far is found out."""
    rows = ffi.new("shoal_sequence[]", len(sequences))
    keep.append(rows)
    for row, s in zip(rows, sequences, strict=True):
        while len(s.pages) < len(p.states):
            s.pages.append([])
        for pages, state in zip(s.pages, p.states, strict=True):
            while len(pages) * PAGE < s.first + s.rows:
                pages.append(np.full(state.page_bytes, 0xFF, np.uint8).view(state.dtype))
        stride = max((len(pages) for pages in s.pages), default=1)
        table = ffi.new("void *[]", len(s.pages) * stride + 1)
        for i, pages in enumerate(s.pages):
            for j, page in enumerate(pages):
                table[i * stride + j] = pointer(keep, "char[]", page)
        keep.append(table)
        row.rows, row.first, row.wanted, row.sample = s.rows, s.first, s.wanted, s.sample
        row.pages, row.pages_stride = table, stride
        if s.history is not None:
            row.history = pointer(keep, "int32_t[]", s.history)
        row.sampling = {"top_p": 1.0, "repetition_penalty": 1.0, **_tables(s.sampling, keep)}
        row.reported = s.reported
        if s.given is not None:
            row.given = pointer(keep, "int32_t[]", np.asarray(s.given, np.int32))
    return rows


def _tables(sampling: dict[str, Any], keep: list[Any]) -> dict[str, Any]:
    """The sampling with `bias` {token: value} and the mask `allowed` as C sees them."""
    fields = dict(sampling)
    bias, allowed = fields.pop("bias", {}), fields.pop("allowed", None)
    if bias:
        fields["n_biases"] = len(bias)
        fields["biased"] = pointer(keep, "int32_t[]", np.array(list(bias), np.int32))
        fields["biases"] = pointer(keep, "float[]", np.array(list(bias.values()), np.float32))
    if allowed is not None:
        fields["allowed"] = pointer(keep, "uint8_t[]", np.packbits(allowed, bitorder="little"))
    return fields


def everywhere(
    program: Program, work: Callable[[Executor], Sequence[Any]], threads: Sequence[int] = (1, 2, 3)
) -> Sequence[Any]:
    """What `work` gives on the definition, if every set and number of threads gives the same bits."""
    expected = work(program.open("scalar", 1))
    for isa in isas():
        for n in threads:
            for a, b in zip(work(program.open(isa, n)), expected, strict=True):
                same(a, b)
    return expected


def same(a: Any, b: Any) -> None:
    """The same bits, signs of zeros and all."""
    np.testing.assert_array_equal(
        np.ascontiguousarray(a).view(np.int32), np.ascontiguousarray(b).view(np.int32)
    )
