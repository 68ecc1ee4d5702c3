"""Opens and runs programs with fields changed at random: python -m tests.kernels.fuzz SEED COUNT [LIBRARY].

Run in a process of its own, so that a crash is a failed test. What the C side cannot see (the sizes behind
pages, inputs and outputs) is made to fit the changed tables; everything else is as wrong as the dice say.
LIBRARY may be one built with -fsanitize=address,undefined, with libasan preloaded: then any access beyond an
allocation ends the process.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from . import harness
from .harness import STATUS, Rows, describe, ffi, library, pool
from .test_programs import llama
from .weights import ENUM, PAGE

TABLES = ("ops", "buffers", "weights", "states", "inputs", "outputs")
VALUES = (
    0,
    1,
    -1,
    2,
    3,
    4,
    7,
    15,
    16,
    17,
    32,
    33,
    48,
    64,
    97,
    133,
    255,
    256,
    512,
    1 << 16,
    1 << 24,
    (1 << 24) + 1,
    1 << 28,
    2**31 - 1,
    -(2**31),
)
FLOATS = (0.0, -1.0, 1.0, 1e30, -1e30, float("nan"), float("inf"), 1e-45)
MOST_BYTES = 1 << 26
MOST_REPORTED = 5


def value(rng: np.random.Generator, old: int) -> int:
    """An integer near the old one, or one that breaks things."""
    if rng.random() < 0.5:
        return int(np.clip(old + rng.integers(-3, 4), -(2**31), 2**31 - 1))
    return VALUES[rng.integers(len(VALUES))]


def change(rng: np.random.Generator, row: Any, name: str) -> None:
    """Another value for one field of a struct."""
    old = getattr(row, name)
    if isinstance(old, float):
        setattr(row, name, FLOATS[rng.integers(len(FLOATS))])
    elif isinstance(old, int):
        unsigned = ffi.typeof(row).item.kind == "struct" and name in (
            "data_bytes",
            "scales_bytes",
            "mins_bytes",
            "seed",
        )
        setattr(row, name, abs(value(rng, min(old, 2**31 - 1))) if unsigned else value(rng, old))
    elif ffi.typeof(old).kind == "array":
        old[rng.integers(len(old))] = value(rng, old[0])
    elif rng.random() < 0.3:
        setattr(row, name, ffi.NULL)


def names(row: Any) -> list[str]:
    return [name for name, _ in ffi.typeof(row).item.fields]


def change_program(rng: np.random.Generator, p: Any) -> None:
    for _ in range(rng.integers(1, 4)):
        where = rng.integers(8)
        if where < 2:
            fields = [name for name in names(p) if name not in TABLES]
            name = fields[rng.integers(len(fields))]
            old = getattr(p, name)
            # A count may only shrink: nothing can tell C how long a table really is.
            new = value(rng, old)
            setattr(p, name, new if name.startswith("max") else min(new, old))
            continue
        table = TABLES[rng.integers(len(TABLES))] if where < 4 else "ops"
        n = max(getattr(p, f"n_{table}"), 0)
        if not n:
            continue
        rows, at = getattr(p, table), int(rng.integers(n))
        if table in ("inputs", "outputs"):
            rows[at] = value(rng, rows[at])
        else:
            row = rows + at
            change(rng, row, names(row)[rng.integers(len(names(row)))])


def run(rng: np.random.Generator, executor: Any, p: Any, program: harness.Program, keep: list[Any]) -> int:
    """Runs one batch, changed or not, on memory that fits the tables; gives the status."""
    sequences = [
        Rows(int(n), int(f), int(n), 1, history=rng.integers(0, 133, 600).astype(np.int32))
        for n, f in ((3, 0), (1, 560), (20, 250))
    ]
    if rng.random() < 0.3:
        sequences = sequences[1:2]  # whose attention threads share
    for s in sequences:
        s.sampling = {"temperature": 1.0, "repetition_penalty": 1.5, "top_k": 3}
        s.sample, s.reported = [(1, 0), (1, 3), (s.wanted, 2), (0, MOST_REPORTED)][rng.integers(4)]
        if s.sample == 0:
            s.given = np.resize([0, 3, 132], 600)
    program.states = [
        harness.State(s.kv_heads, s.head_dim, "F16" if s.type == ENUM["F16"] else "F32")
        for s in p.states[0 : p.n_states]
    ]
    page = sum(2 * PAGE * s.kv_heads * s.head_dim * 4 for s in program.states)
    cols = [p.buffers[b].cols for b in (*p.inputs[0 : p.n_inputs], *p.outputs[0 : p.n_outputs])]
    if page * 16 > MOST_BYTES or sum(cols) * 24 * 4 > MOST_BYTES:
        return -1
    rows = describe(program, sequences, keep)
    for pages in (page for sequence in sequences for state in sequence.pages for page in state):
        pages[:] = 0
    if rng.random() < 0.5:
        for _ in range(rng.integers(1, 3)):
            row = rows + int(rng.integers(len(sequences)))
            part = row if rng.random() < 0.7 else ffi.addressof(row, "sampling")
            fields = [name for name in names(part) if name != "sampling"]
            name = fields[rng.integers(len(fields))]
            if name == "pages_stride":  # as with counts: only smaller than the truth
                row.pages_stride = min(value(rng, row.pages_stride), row.pages_stride)
            else:
                change(rng, part, name)
            if part is row and row.first + row.rows > 600:
                row.history = ffi.NULL
    tokens = rng.integers(0, 133, 24).astype(np.int32)
    if rng.random() < 0.1:
        tokens[rng.integers(24)] = VALUES[rng.integers(len(VALUES))]
    # Rows may have been changed; arrays are as long as the rows say, if C will believe them.
    total = max(24, sum(max(rows[i].rows, 0) for i in range(len(sequences))))
    if total > p.max_rows:
        total = 24
    if total * sum(cols) * 4 > MOST_BYTES:
        return -1
    batch = ffi.new("shoal_batch *")
    arrays = [np.ones((total, c), np.float32) for c in cols]
    batch.sequences, batch.n_sequences = rows, len(sequences)
    batch.tokens = harness.pointer(keep, "int32_t[]", np.resize(tokens, total))
    batch.inputs = harness.pointers(keep, arrays[: p.n_inputs])
    batch.outputs = harness.pointers(keep, arrays[p.n_inputs :])
    batch.drawn = harness.pointer(keep, "int32_t[]", np.zeros(total, np.int32))
    batch.most_reported = MOST_REPORTED
    batch.reports = harness.pointer(keep, "int32_t[]", np.zeros(total * MOST_REPORTED, np.int32))
    batch.logprobs = harness.pointer(keep, "float[]", np.zeros(total * MOST_REPORTED, np.float32))
    error = ffi.new("char[]", 256)
    status = library().shoal_run(executor, batch, error, 256)
    assert status == 0 or ffi.string(error), "a status without a message"
    return int(status)


def main(seed: int, count: int) -> None:
    outcomes: Counter[str] = Counter()
    for case in range(seed, seed + count):
        rng = np.random.default_rng(case)
        keep: list[Any] = []
        program = llama("F16" if case % 2 else "F32", max_rows=64)
        p = program.table(keep)
        if rng.random() < 0.9:
            change_program(rng, p)
        handle, error = ffi.new("shoal_executor **"), ffi.new("char[]", 256)
        status = library().shoal_open(p, pool(2), ENUM["ISA_AUTO"], handle, error, 256)
        if status:
            assert handle[0] == ffi.NULL and ffi.string(error), "refused without a message"
            outcomes[f"open {STATUS[status]}"] += 1
            continue
        status = run(rng, handle[0], p, program, keep)
        outcomes["too large to try" if status < 0 else f"run {STATUS[status]}"] += 1
        library().shoal_close(handle[0])
    print(dict(outcomes))


if __name__ == "__main__":
    if len(sys.argv) > 3:
        chosen = Path(sys.argv[3])
        harness.library_path = lambda: chosen  # type: ignore[assignment]
    main(int(sys.argv[1]), int(sys.argv[2]))
