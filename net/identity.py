"""The identity of a process, and checks of Hello messages: whether two processes can compute together."""

from __future__ import annotations

import ipaddress
import secrets
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ..engine.costs import unit_cost
from ..engine.layout import NUMERICS_VERSION
from .errors import MismatchError, NodeLostError, printable
from .messages import Hello, Offer, PairedDevice, Peer, Purpose

if TYPE_CHECKING:
    from ..engine.model_directory import Model
    from .tls import Trust


@dataclass(frozen=True, slots=True)
class Identity:
    """A process. `incarnation` is a random u64 drawn when it starts, and `model` the hash of its model. With
    `trust`, all of its connections are to devices of its house, and use TLS; `incarnation` is from there."""

    name: str
    incarnation: int
    engine: str
    numerics: int
    model: str
    trust: Trust | None = field(default=None, compare=False, repr=False)

    def hello(self, purpose: Purpose, offer: Offer | None = None, ticket: int = 0) -> Hello:
        """The first message of this process on a connection."""
        return Hello(
            purpose, self.name, self.incarnation, self.engine, self.numerics, self.model, offer, ticket
        )


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What a coordinator must know about a model besides its hash: the number of units, the size of the
    vocabulary, the positions of a context, the f32 columns that cross a cut, and the bytes of each unit's
    weights (empty: unknown)."""

    units: int
    vocab: int
    context: int
    cut_cols: int
    unit_bytes: tuple[int, ...] = ()


def identity_of(model: Model, name: str, version: str, trust: Trust | None = None) -> Identity:
    """The identity of a process that runs shoal `version` and has opened `model`, with a new incarnation."""
    incarnation = secrets.randbits(64) if trust is None else trust.incarnation()
    return Identity(printable(name, 64) or "?", incarnation, version, NUMERICS_VERSION, model.hash, trust)


def shape_of(model: Model) -> ModelShape:
    """The shape of an opened model."""
    program = model.program
    cols = program.cut_cols
    sizes = tuple(unit_cost(model, u).bytes for u in range(model.n_units))
    return ModelShape(len(program.units), program.vocab, model.config.context, cols, sizes)


def check_hello(mine: Identity, theirs: Hello, who: str) -> None:
    """Checks that two processes can compute one answer together. MismatchError: they differ in numerics or
    model; the message names both values."""
    if theirs.numerics != mine.numerics:
        older = who if theirs.numerics < mine.numerics else mine.name
        raise MismatchError(
            f"{who} has numerics version {theirs.numerics} (shoal {theirs.engine}), {mine.name} has "
            f"{mine.numerics} (shoal {mine.engine}): upgrade shoal on {older}"
        )
    if theirs.model != mine.model:
        raise MismatchError(
            f"{who} has the model {theirs.model[:16]}, {mine.name} has {mine.model[:16]}: "
            "give both the same model directory"
        )


def hello_of(mine: Identity, device: PairedDevice | None, theirs: Hello, who: str) -> Hello:
    """The Hello of a process of the device at the other end, which TLS has found: under its own name, if that
    ends with the one of the device in the house, so that no device bears another's. Without a house it is
    taken as it is. UntrustedError: the process claims to be another device's."""
    if mine.trust is None or device is None:
        return theirs
    mine.trust.check_incarnation(device, theirs.incarnation, who)
    if theirs.name == device.name or theirs.name.endswith(f" {device.name}"):
        return theirs
    short = theirs.name[: max(0, 60 - len(device.name))]
    return replace(theirs, name=f"{short} of {device.name}" if short else device.name)


def is_home(mine: Identity, incarnation: int, host: str) -> bool:
    """Whether a process that has said Hello runs on this device: in a house by its key, which TLS has checked
    against the incarnation; without one if it was reached under a loopback address."""
    if mine.trust is not None:
        return incarnation >> 32 == mine.incarnation >> 32
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return False


def check_peer(peer: Peer, theirs: Hello) -> None:
    """Checks that the expected node answered. NodeLostError: another process has its address."""
    if theirs.incarnation != peer.incarnation:
        raise NodeLostError(
            f"{theirs.name} ({theirs.incarnation:016x}) answers at {host_port(peer.host, peer.port)}, not "
            f"{peer.name} ({peer.incarnation:016x}): connect again if it has restarted, or give an address "
            "that is the same on all devices"
        )


def host_port(host: str, port: int) -> str:
    """HOST:PORT as the command line takes it: an IPv6 address is in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
