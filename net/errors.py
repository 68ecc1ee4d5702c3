"""Exceptions of the network, and the exit code of the command line for each.

    ShoalError                     see engine/errors.py
    └── NetError                13   base; also: a node that is busy with another coordinator
        ├── MismatchError        7   protocol, numerics or model differ between two processes
        ├── AddressInUseError    8   the port to listen on is taken
        ├── RemoteProtocolError  9   the peer broke the protocol: garbage, half a frame, a false length
        ├── NodeLostError       10   a node cannot be reached, closed the connection, or fell silent
        ├── StageStuckError     17   a call of a node's stage does not return
        ├── UntrustedError      18   a device is not of this house, or may not do what it asks
        └── LocalProtocolError  14   this process broke the protocol: a bug here

A message names the peer at fault. An error is sent over the wire as its exit code and its text (`to_wire`,
`from_wire`). The code identifies the class; an unknown code becomes a NetError.
"""

from __future__ import annotations

from ..engine.errors import (
    CancelledRunError,
    ContextError,
    DownloadError,
    MissingDependencyError,
    ModelFileError,
    NoPlanError,
    OperatingSystemError,
    ShoalError,
    UnsupportedModelError,
)

TEXT_LIMIT = 1000
"""Characters of an error's text on the wire."""


class NetError(ShoalError):
    """Base of the errors between processes."""

    exit_code = 13


class MismatchError(NetError):
    """Two processes differ in protocol, numerics or model; the message names both values."""

    exit_code = 7


class AddressInUseError(NetError):
    """The address to listen on is taken."""

    exit_code = 8


class RemoteProtocolError(NetError):
    """The peer broke the protocol."""

    exit_code = 9


class NodeLostError(NetError):
    """A peer cannot be reached, closed the connection, or fell silent."""

    exit_code = 10


class StageStuckError(NetError):
    """A call of a node's stage has been running for much longer than it should: the thread is stuck."""

    exit_code = 17


class UntrustedError(NetError):
    """A device is not of this house, or has no right to what it asks for."""

    exit_code = 18


class LocalProtocolError(NetError):
    """This process broke the protocol: a bug here, not the peer's fault."""

    exit_code = 14


_BY_CODE: dict[int, type[ShoalError]] = {
    kind.exit_code: kind
    for kind in (
        ShoalError, ModelFileError, UnsupportedModelError, ContextError, NoPlanError, DownloadError,
        MissingDependencyError, CancelledRunError, OperatingSystemError, NetError, MismatchError,
        AddressInUseError, RemoteProtocolError, NodeLostError, StageStuckError, UntrustedError,
        LocalProtocolError,
    )
}  # fmt: skip


def to_wire(error: Exception) -> tuple[int, str]:
    """The exit code and the printable text with which an error is sent to a peer."""
    code = error.exit_code if isinstance(error, ShoalError) else NetError.exit_code
    return code, printable(str(error) or type(error).__name__, TEXT_LIMIT)


def from_wire(code: int, text: str, peer: str) -> ShoalError:
    """The exception for an error that a peer sent; its text names the peer."""
    return error_of(code, f"{peer}: {text}")


def error_of(code: int, text: str) -> ShoalError:
    """The exception of the class with that exit code; NetError if there is none."""
    return _BY_CODE.get(code, NetError)(text)


def printable(text: str, limit: int) -> str:
    """The text as one line of at most `limit` characters, without control characters for a terminal."""
    clean = "".join(c if c.isprintable() else " " for c in text)
    return clean if len(clean) <= limit else clean[: limit - 1] + "…"


def leading(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The exception to raise for a group of failed tasks: a single error is taken out of its group.

    If all of several errors are ShoalErrors, it is the first one, with the others as notes. Any other group
    is returned as it is.
    """
    leaves = list(_leaves(group))
    if len(leaves) == 1:
        return leaves[0]
    if not all(isinstance(leaf, ShoalError) for leaf in leaves):
        return group
    first = leaves[0]
    for other in dict.fromkeys(str(leaf) for leaf in leaves[1:]):
        first.add_note(f"also: {other}")
    return first


def _leaves(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for inner in error.exceptions for leaf in _leaves(inner)]
    return [error]
