"""Chooses the types of a model directory that hold a checkpoint's quantised values exactly (`--dtype keep`).

The index has one type for all matrices, and at most another one for the LM head and an embedding tied to it
(`typed`)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .checkpoint import Checkpoint
from .errors import UnsupportedModelError, Warn
from .program import Program, Weight, WeightType

_Q4 = frozenset({"Q4_0", "TQ1_0", "TQ2_0"})
HELD: dict[WeightType, frozenset[str]] = {
    "q4": _Q4,
    "q4_min": _Q4 | {"Q4_1"},
    "q8": _Q4 | {"Q5_0", "IQ4_NL", "Q8_0"},
    "f32": frozenset({"F64", "F32", "F16", "BF16"}),
}
"""By type of weights, the checkpoint types that it can hold exactly; the smallest first. F64 is rounded to
f32, as in every conversion."""
_NAMES: dict[WeightType, tuple[str, bool]] = {
    "q4": ("int4", False),
    "q4_min": ("int4", True),
    "q8": ("int8", False),
    "f32": ("f32", False),
}


@dataclass(frozen=True, slots=True)
class Types:
    """Types of matrices, in the index's terms."""

    dtype: str
    head_dtype: str | None
    has_min: bool


def kept_types(checkpoint: Checkpoint, program: Program, warn: Warn) -> Types:
    """The smallest types that hold all matrices of a checkpoint exactly. An LM head or embedding of another
    type (Q6_K, or F16 with quantised layers) is rounded to int8, and `warn` is called.

    UnsupportedModelError: no single type can hold the matrices of all layers."""
    last = len(program.units) - 1
    layers: dict[str, str] = {}  # checkpoint types of the layers' matrices, with the first tensor of each
    beside: dict[str, str] = {}  # the type and tensor of an embedding that is not tied
    head: dict[str, str] = {}  # the type and tensor of the LM head, and of an embedding tied to it
    for u, unit in enumerate(program.units):
        if u == last and program.labels:
            continue  # a classification head stays f32
        kinds = head if u == last or program.units[last].tied else beside
        for weight in unit.weights:
            if not weight.vector:
                (layers if 0 < u < last else kinds).setdefault(
                    checkpoint.type_of(weight.source), weight.source
                )
    fitting = [held for held, kinds in HELD.items() if kinds.issuperset(layers)]
    best = [held for held in fitting if _holds(held, beside)] or [held for held in fitting if held == "q8"]
    if not best:
        raise UnsupportedModelError(f"{checkpoint.path}: {_why(layers if not fitting else layers | beside)}")
    dtype, has_min = _NAMES[best[0]]
    head_type: WeightType = "q8" if dtype == "int4" and not _holds(best[0], head) else best[0]
    for held, kinds in ((best[0], beside), (head_type, head)):
        for kind, name in kinds.items():
            if not _holds(held, {kind: name}):
                warn(
                    f"{checkpoint.path}: {name} is {kind}, which int8 cannot hold exactly, so it is rounded; "
                    "the layers are kept"
                )
    return Types(dtype, None if head_type == best[0] else "int8", has_min)


def held_in(checkpoint: Checkpoint, weight: Weight) -> bool:
    """Whether the type of a weight can hold the checkpoint's quantised values exactly."""
    return weight.type != "f32" and checkpoint.type_of(weight.source) in HELD[weight.type]


def _holds(held: WeightType, kinds: Iterable[str]) -> bool:
    return held == "f32" or HELD[held].issuperset(kinds)  # f32 holds any value


def _why(kinds: dict[str, str]) -> str:
    listed = ", ".join(f"{kind} ({name})" for kind, name in sorted(kinds.items()))
    return (
        f"no single type holds all its matrices exactly, which are {listed}: --dtype int8 or int4 rounds "
        "them, --dtype f32 keeps their values in 4 bytes each"
    )
