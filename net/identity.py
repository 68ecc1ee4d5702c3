"""Who a process is, and whether two of them can work together: pure checks on what Hello says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..engine.layout import NUMERICS_VERSION
from .errors import MismatchError, NodeLostError, printable
from .messages import Hello, Offer, Peer, Purpose

if TYPE_CHECKING:
    from ..engine.model_directory import Model


@dataclass(frozen=True, slots=True)
class Identity:
    """A process: `incarnation` is a random u64 drawn when it starts, `model` the hash of the model it has."""

    name: str
    incarnation: int
    engine: str
    numerics: int
    model: str

    def hello(self, purpose: Purpose, offer: Offer | None = None) -> Hello:
        """What this process says first on a connection."""
        return Hello(purpose, self.name, self.incarnation, self.engine, self.numerics, self.model, offer)


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What a coordinator must know about a model besides its hash: the number of units, the size of the
    vocabulary, the positions of a context, and the f32 columns that cross a cut."""

    units: int
    vocab: int
    context: int
    cut_cols: int


def identity_of(model: Model, name: str, incarnation: int, version: str) -> Identity:
    """The identity of a process of `version` that has opened a model."""
    return Identity(printable(name, 64) or "?", incarnation, version, NUMERICS_VERSION, model.hash)


def shape_of(model: Model) -> ModelShape:
    """The shape of an opened model."""
    program = model.program
    cols = program.cut_cols
    return ModelShape(len(program.units), program.vocab, model.config.context, cols)


def check_hello(mine: Identity, theirs: Hello, who: str) -> None:
    """MismatchError, naming both values, when the two cannot compute one answer together."""
    if theirs.numerics != mine.numerics:
        raise MismatchError(
            f"{who} computes by numerics version {theirs.numerics} (shoal {theirs.engine}), {mine.name} by "
            f"{mine.numerics} (shoal {mine.engine}): install the same shoal on both"
        )
    if theirs.model != mine.model:
        raise MismatchError(
            f"{who} has the model {theirs.model[:16]}, {mine.name} has {mine.model[:16]}: "
            "give both the same model directory"
        )


def check_peer(peer: Peer, theirs: Hello) -> None:
    """NodeLostError when another process answers at the address of the node that was meant."""
    if theirs.incarnation != peer.incarnation:
        raise NodeLostError(
            f"at {peer.host}:{peer.port} answers {theirs.name} ({theirs.incarnation:016x}), not {peer.name} "
            f"({peer.incarnation:016x}): was it restarted, or is the address good on one device only?"
        )
