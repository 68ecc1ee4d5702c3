"""The state of a head and its devices at one moment: what `shoal top` shows, and what programs get as JSON
(docs/status.md)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from .engine.strict import Between, Printable

STATUS_VERSION = 1
State = Literal["joining", "ready", "working", "leaving", "lost", "refused"]
Name = Annotated[str, Printable(1, 400)]
Sentence = Annotated[str, Printable(0, 1000)]
Count = Annotated[int, Between(0, 1 << 60)]
Seconds = Annotated[float, Between(0, 1e9)]
Rate = Annotated[float, Between(0, 1e18)]
Share = Annotated[float, Between(0, 1)]


@dataclass(frozen=True, slots=True)
class DeviceStatus:
    """A device and its node.

    `state`: "joining" (not reached yet), "ready" (has no layers), "working" (has layers), "leaving" (its
    layers move to others), "lost" (is dialled again) or "refused" (is not used any more). `reason` says why
    it is lost, refused, or does not work all the time: `share` is the part of the time in which its owner
    lets it compute. `units` [first, last) are those of its stage, `layers` the same in words, and `copies`
    how many others it has in RAM; on its disk are the files of `held` units (None: all). It has promised
    `ram_promise` bytes, and its process had `ram` when its stage was loaded. A step of one row should take it
    `predicted_s` now, and has taken `measured_s` in the mean; it did not compute for the part `waiting` of
    the last seconds. A device with a policy tells its `battery`, in per cent, and the `temperature` of that,
    in °C. What is not known is None."""

    name: Name
    address: Name
    state: State
    reason: Sentence = ""
    units: tuple[Count, Count] | None = None
    layers: Sentence = ""
    copies: Count = 0
    ram_promise: Count | None = None
    ram: Count | None = None
    share: Share = 1.0
    predicted_s: Seconds | None = None
    measured_s: Seconds | None = None
    waiting: Share | None = None
    held: Count | None = None
    battery: Annotated[float, Between(0, 100)] | None = None
    temperature: Annotated[float, Between(-100, 200)] | None = None


@dataclass(frozen=True, slots=True)
class LinkStatus:
    """The link from one device to another, or from or to "coordinator", the head itself. `bytes_per_s` None:
    too fast to be measured."""

    source: Name
    target: Name
    latency_s: Seconds
    latency_p95_s: Seconds
    bytes_per_s: Rate | None


@dataclass(frozen=True, slots=True)
class MoveStatus:
    """A change of the plan while answers were computed, in a line; whether it was given up; how long it took,
    for how much of that no answer got a token, and the bytes of keys and values that were sent; and the
    tokens/s before and after it, where answers ran for long enough."""

    text: Sentence
    aborted: bool
    seconds: Seconds
    standstill_s: Seconds
    sent: Count
    tokens_per_s_before: Rate | None
    tokens_per_s_after: Rate | None


@dataclass(frozen=True, slots=True)
class TransferStatus:
    """Weights on their way to the disk of a device: bytes that are there, of those that are wanted, and the
    reason why the others do not come, or empty."""

    device: Name
    got: Count
    wanted: Count
    bytes_per_s: Rate
    problem: Sentence = ""


@dataclass(frozen=True, slots=True)
class PlanStatus:
    """The plan in force: the tokens/s that it predicts for one answer; the device that would be the fastest
    of those which can hold the whole model alone, with its tokens/s; and a sentence that says whether both
    ends of the model stay on the head's device, and what that costs (empty: there was no choice)."""

    tokens_per_s: Rate
    alone: Name | None
    alone_tokens_per_s: Rate | None
    ends: Sentence = ""


@dataclass(frozen=True, slots=True)
class Status:
    """A head. `phase` is what it does: "serving" answers (also while layers move: "moving", "committing"), or
    one of "gathering", "measuring", "planning", "loading" and "waiting" (for devices), with the `reason`.
    `model` is the name of the model, `units` their number, `context` that of the plan in tokens (0: no plan).
    `tokens` is the number of tokens of all answers so far, `tokens_per_s` that of the last three seconds, 0
    if none runs; `running` answers hold keys and values, `queued` ones wait for room.
    `recoveries`: how often answers went on after a loss."""

    version: Annotated[int, Between(STATUS_VERSION, STATUS_VERSION)]
    shoal: Name
    model: Name
    hash: Name
    units: Count
    context: Count
    phase: Name
    reason: Sentence
    epoch: Count
    devices: tuple[DeviceStatus, ...]
    links: tuple[LinkStatus, ...]
    plan: PlanStatus | None
    tokens: Count
    tokens_per_s: Rate
    running: Count
    queued: Count
    recoveries: Count
    moves: tuple[MoveStatus, ...]
    transfers: tuple[TransferStatus, ...]
