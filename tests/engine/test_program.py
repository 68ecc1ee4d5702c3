"""The ops as data: what each says of itself, and that the C table knows it."""

from __future__ import annotations

from dataclasses import fields

import pytest

from shoal.engine import program
from shoal.engine.backends._abi import ffi
from shoal.engine.backends.numpy_backend import NumpyExecutor
from shoal.engine.program import (
    Attend,
    Embed,
    Gate,
    HeadNorm,
    KvState,
    Matmul,
    Norm,
    Op,
    Rope,
    Store,
    Unit,
    Weight,
)

KINDS = [
    kind
    for kind in vars(program).values()
    if isinstance(kind, type) and issubclass(kind, Op) and kind is not Op
]
WEIGHTS = {"table", "inv_freq", "weight"}
C_FIELDS = {name for name, _ in ffi.typeof("shoal_op").fields}


@pytest.mark.parametrize("kind", KINDS)
def test_every_op_is_in_the_c_interface_and_in_the_definition(kind: type[Op]) -> None:
    """A field that C lacks would be dropped without a word on its way there."""
    names = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    assert names - WEIGHTS - {"x"} <= C_FIELDS
    assert kind in NumpyExecutor.ops


def test_every_kind_of_the_c_interface_has_a_class() -> None:
    kinds = {name.removeprefix("SHOAL_OP_").lower() for name in ffi.typeof("enum shoal_op_kind").relements}
    assert kinds == {object.__new__(kind).kind for kind in KINDS}


UNIT = Unit(
    "u",
    (),
    (Weight("a", 5, 33), Weight("b", 7, 33, type="q8"), Weight("n", 1, 33, vector=True)),
    (KvState("kv", 2, 16),),
)


@pytest.mark.parametrize(
    ("op", "reads", "writes", "states", "weights", "macs", "read"),
    [
        (Embed("x", "a"), (), "x", (None, None), ("a",), (0, 0), 33 * 4),
        (Norm("y", "x", "n", 1e-5), ("x",), "y", (None, None), ("n",), (0, 0), 33 * 4),
        (
            Matmul("y", "x", ("a", "b")),
            ("x",),
            "y",
            (None, None),
            ("a", "b"),
            (12 * 33, 0),
            5 * 33 * 4 + 2 * 16 * (32 + 2),
        ),
        (
            Matmul("y", "x", ("a", "b"), biases=(None, "n")),
            ("x",),
            "y",
            (None, None),
            ("a", "b"),
            (12 * 33, 0),
            5 * 33 * 4 + 2 * 16 * (32 + 2) + 33 * 4,
        ),
        (HeadNorm("y", "n", 16, 2, 16, 1e-5), ("y",), "y", (None, None), ("n",), (0, 0), 33 * 4),
        (
            Matmul("y", "x", ("a",), accumulate=True),
            ("x", "y"),
            "y",
            (None, None),
            ("a",),
            (5 * 33, 0),
            5 * 33 * 4,
        ),
        (Rope("y", "angles", 3, 16), ("y", "angles"), "y", (None, None), (), (0, 0), 0),
        (Store("y", "kv", 0, 32), ("y",), None, (None, "kv"), (), (0, 0), 0),
        (Attend("z", "y", "kv", 4, 0.25), ("y",), "z", ("kv", None), (), (0, 2 * 4 * 16), 0),
        (Gate("z", "y", "silu"), ("y",), "z", (None, None), (), (0, 0), 0),
    ],
    ids=lambda value: value.kind if isinstance(value, Op) else "",
)
def test_an_op_says_what_it_reads_writes_and_costs(
    op: Op,
    reads: tuple[str, ...],
    writes: str | None,
    states: tuple[str | None, str | None],
    weights: tuple[str, ...],
    macs: tuple[int, int],
    read: int,
) -> None:
    assert (op.reads(), op.writes(), op.weight_names()) == (reads, writes, weights)
    assert (op.reads_state(), op.writes_state()) == states
    assert (op.macs(UNIT), op.attend_macs(UNIT), op.read_bytes(UNIT)) == (*macs, read)
    changed = {Rope: (0, 48), HeadNorm: (16, 48)}
    assert op.changes() == changed.get(type(op))
    assert op.bias_names() == (("n",) if isinstance(op, Matmul) and op.biases else ())
