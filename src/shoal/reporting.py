"""Builds the Status of a head (status.py) from what its coordinator, its planner and its nodes tell."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from . import __version__
from .engine.model_directory import Model
from .net.errors import printable
from .net.holding import FetchReport
from .net.identity import host_port
from .net.members import ClusterState
from .net.messages import Epoch
from .net.moves import Move
from .net.overview import Overview
from .net.placement import StageReport
from .planner import Assignment, LinkSpeed, Plan, units_text
from .planning import runs_layers
from .status import (
    STATUS_VERSION,
    DeviceStatus,
    LinkStatus,
    MoveStatus,
    PlanStatus,
    State,
    Status,
    TransferStatus,
)

SHOWN_MOVES = 20
"""The latest moves that a status has."""
_LONGEST = 1000


class StepTimes:
    """The seconds of each stage's decode calls, since the last look."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[Epoch | None, int, float]] = {}
        self._times: dict[str, float] = {}

    def look(self, reports: Sequence[StageReport]) -> dict[str, float]:
        """The mean by device, of the calls since the last look at the same epoch; of a device without any,
        the mean before that."""
        seen, times = {}, {}
        for report in reports:
            name, epoch, work = report.node, report.stats.epoch, report.stats.decode
            then, steps, seconds = self._seen.get(name, (None, 0, 0.0))
            if then != epoch:
                steps, seconds = 0, 0.0
                self._times.pop(name, None)
            seen[name] = epoch, work.steps, work.seconds
            if work.steps > steps:
                times[name] = (work.seconds - seconds) / (work.steps - steps)
            elif name in self._times:
                times[name] = self._times[name]
        self._seen, self._times = seen, times
        return times


def status_of(
    model: Model,
    overview: Overview,
    plan: Plan | None,
    measured: Mapping[str, float],
) -> Status:
    """The status of a head. `plan` is the one in force, predicted anew by the latest measurements, and
    `measured` the seconds of a decode call by device."""
    state, placement = overview.state, overview.state.placement
    predicted = {} if plan is None else {stage.device: stage.seconds for stage in plan.stages}
    return Status(
        STATUS_VERSION,
        __version__,
        printable(model.path.name, 400) or "model",
        model.hash,
        state.units,
        placement.context,
        state.phase,
        _text(state.failure) if state.phase in ("waiting", "failed") else "",
        state.epoch.counter,
        _devices(overview, predicted, measured),
        tuple(_link(ends, overview.links[ends]) for ends in sorted(overview.links)),
        None if plan is None else _plan(plan),
        overview.tokens,
        (overview.tokens_per_s or 0.0) if overview.running else 0.0,
        overview.running,
        overview.queued,
        overview.recoveries,
        tuple(_move(move) for move in overview.moves[-SHOWN_MOVES:]),
        tuple(_transfer(fetch) for fetch in overview.fetches if fetch.got < fetch.wanted),
    )


def _text(error: object) -> str:
    return "" if error is None else printable(str(error), _LONGEST)


def _devices(
    overview: Overview, predicted: Mapping[str, float], measured: Mapping[str, float]
) -> tuple[DeviceStatus, ...]:
    """The devices with a stage in the order of the chain, then the others."""
    state = overview.state
    stages = {stage.device: stage for stage in state.placement.stages}
    order = list(stages)
    found = []
    for i, (member, node) in enumerate(zip(state.members, overview.nodes, strict=True)):
        if member.barred:  # another member is the same node
            continue
        address = host_port(member.host, member.port)
        stage = stages.get(member.label) if member.label else None
        offer = None if member.hello is None else member.hello.offer
        device = DeviceStatus(
            printable(member.label or address, 400),
            address,
            _state(state, i, stage),
            _text(member.lost) if member.lost is not None else printable(member.condition.reason, _LONGEST),
            None if stage is None else (stage.first, stage.last),
            "" if stage is None else units_text(stage.first, stage.last, state.units),
            len(node.copies),
            offer.device.ram_bytes if offer is not None and runs_layers(offer.device) else None,
            node.ram_bytes,
            member.condition.share,
            predicted.get(member.label),
            measured.get(member.label),
            node.waiting,
            None if member.held is None else len(member.held),
            member.condition.battery,
            member.condition.temperature,
        )
        found.append((order.index(member.label) if stage is not None else len(order), i, device))
    return tuple(device for _, _, device in sorted(found, key=lambda one: one[:2]))


def _state(state: ClusterState, i: int, stage: Assignment | None) -> State:
    member = state.members[i]
    if member.pending:
        return "joining"
    if member.lost is not None:
        return "lost" if member.may_return else "refused"
    if member.condition.leaving:
        return "leaving"
    return "ready" if stage is None else "working"


def _link(ends: tuple[str, str], link: LinkSpeed) -> LinkStatus:
    rate = None if math.isinf(link.bytes_per_s) else link.bytes_per_s
    return LinkStatus(*ends, link.latency_s, link.latency_p95_s, rate)


def _plan(plan: Plan) -> PlanStatus:
    alone = plan.best_alone
    if alone is None:
        return PlanStatus(plan.tokens_per_s, None, None, plan.ends)
    return PlanStatus(plan.tokens_per_s, alone.device, alone.tokens_per_s, plan.ends)


def _transfer(fetch: FetchReport) -> TransferStatus:
    problem = printable(fetch.problem, _LONGEST)
    return TransferStatus(fetch.label, fetch.got, fetch.wanted, fetch.bytes_per_s, problem)


def _move(move: Move) -> MoveStatus:
    moved = move.moved
    return MoveStatus(
        printable(move.line(), _LONGEST),
        move.aborted,
        moved.seconds,
        move.standstill,
        moved.sent,
        move.before,
        move.after,
    )
