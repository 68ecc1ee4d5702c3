"""Which types of ours hold a checkpoint's tensors as they are: the same values, none of them rounded.

The index has one type for all matrices, and at most another for the LM head and the embedding tied to it
(`typed`); this chooses them from what the file holds (`--dtype keep`)."""

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
"""Types of a checkpoint that each type of ours holds; the smallest first. (F64 is rounded, as everywhere.)"""
_NAMES: dict[WeightType, tuple[str, bool]] = {
    "q4": ("int4", False),
    "q4_min": ("int4", True),
    "q8": ("int8", False),
    "f32": ("f32", False),
}


@dataclass(frozen=True, slots=True)
class Types:
    """Types as the index has them."""

    dtype: str
    head_dtype: str | None
    has_min: bool


def kept_types(checkpoint: Checkpoint, program: Program, warn: Warn) -> Types:
    """The smallest types that hold every matrix as the file does. An LM head or embedding that they do not
    hold (Q6_K, or F16 beside quantised layers) is rounded to int8, and `warn` is called.

    UnsupportedModelError: no one type holds the matrices of all layers."""
    last = len(program.units) - 1
    layers: dict[str, str] = {}  # types of their matrices, with the first tensor of each
    beside: dict[str, str] = {}  # of an embedding that is not tied
    head: dict[str, str] = {}
    for u, unit in enumerate(program.units):
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
                    f"{checkpoint.path}: {name} is {kind}, which int8 cannot hold as it is: it is rounded; "
                    "the layers are kept"
                )
    return Types(dtype, None if head_type == best[0] else "int8", has_min)


def held_in(checkpoint: Checkpoint, weight: Weight) -> bool:
    """Whether the type that a matrix is to have holds the file's quantised values as they are."""
    return weight.type != "f32" and checkpoint.type_of(weight.source) in HELD[weight.type]


def _holds(held: WeightType, kinds: Iterable[str]) -> bool:
    return held == "f32" or HELD[held].issuperset(kinds)  # any value is a float


def _why(kinds: dict[str, str]) -> str:
    listed = ", ".join(f"{kind} ({name})" for kind, name in sorted(kinds.items()))
    return (
        f"no one type here holds its matrices as they are, which are {listed}: --dtype int8 or int4 rounds "
        "them, --dtype f32 keeps their values in 4 bytes each"
    )
