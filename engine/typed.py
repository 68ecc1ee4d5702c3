"""The pass that sets the types of a program. Families write float programs, the model directory determines
the types of matrices, and quantised matrices need int8 inputs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from .program import Buffer, Matmul, Op, Program, Quantise, Unit, Weight, WeightType


def typed(program: Program, matrices: WeightType, head: WeightType) -> Program:
    """The program with types: `head` for the LM head and an embedding tied to it, `matrices` for all other
    matrices. A classification head, which is small, stays f32. Inputs of quantised matrices are quantised."""
    last = len(program.units) - 1
    shared = program.units[last].tied
    head = "f32" if program.labels else head

    def weight(u: int, w: Weight) -> Weight:
        if w.vector:
            return w
        return replace(w, type=head if u == last or (u == 0 and w.name in shared) else matrices)

    units = tuple(
        replace(unit, weights=tuple(weight(u, w) for w in unit.weights))
        for u, unit in enumerate(program.units)
    )
    return _with_int8_inputs(replace(program, units=units))


def _with_int8_inputs(program: Program) -> Program:
    """The program with int8 inputs for matmuls with quantised matrices. A buffer becomes int8 if only such
    matmuls read it and all ops that write it can write int8. Any other input is copied to an int8 buffer by a
    Quantise."""
    ops = [(unit, op) for unit in program.units for op in unit.ops]
    readers = {name for unit, op in ops for name in op.reads() if not _reads_int8(unit, op)}
    writers = {op.writes() for _, op in ops if not op.writes_int8}
    wanted = {op.x for unit, op in ops if isinstance(op, Matmul) and _reads_int8(unit, op)}
    quantised = wanted - readers - writers - {*program.cut}
    copies = {name: f"{name}_q8" for name in wanted - quantised}

    def converted(unit: Unit) -> Iterator[Op]:
        ready: set[str | None] = set()
        for op in unit.ops:
            if isinstance(op, Matmul) and _reads_int8(unit, op) and op.x in copies:
                if op.x not in ready:
                    yield Quantise(copies[op.x], op.x)
                    ready.add(op.x)
                op = replace(op, x=copies[op.x])
            yield op
            ready.discard(op.writes())

    def buffers() -> Iterator[Buffer]:
        for buffer in program.buffers:
            yield replace(buffer, type="q8") if buffer.name in quantised else buffer
            if buffer.name in copies:
                yield Buffer(copies[buffer.name], buffer.cols, "q8", buffer.domain)

    return replace(
        program,
        units=tuple(replace(unit, ops=tuple(converted(unit))) for unit in program.units),
        buffers=tuple(buffers()),
    )


def _reads_int8(unit: Unit, op: Op) -> bool:
    """Whether the op is a matmul with quantised matrices, which needs an int8 input."""
    return isinstance(op, Matmul) and unit.weight(op.weights[0]).type != "f32"
