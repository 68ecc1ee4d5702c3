"""Both ends of a model at home: the embedding and the LM head on devices that are the user's own, so that no
other device of the chain sees a token id.

A chain has one stage for each device. So a device that is to have both ends of a longer chain is two rows:
the device itself, which holds the embedding with the first layers, and a second range `beside` it, which
holds the last unit. More layers in the second range would gain nothing, since the same CPU would compute them
in the same time. The two share the RAM that the device promises.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from .rows import LOOPBACK, Assignment, Cluster, Device, ModelCosts, Question

if TYPE_CHECKING:
    from .evaluation import Plan

SMALL = 0.05
"""The part of the tokens/s that both ends at home may cost where nobody has asked for it; and the part of the
RAM of a device that its second range may take then."""


def second_bytes(model: ModelCosts) -> int:
    """The RAM that a second range needs: the last unit without a table that the first range has, too."""
    last = model.units[-1]
    return last.bytes - model.tied_bytes + last.workspace_bytes


def second_range(model: ModelCosts, device: Device, scratch: int = 0) -> tuple[Device, Device]:
    """The device with the RAM that is left for its first range, and its second range, whose calls need
    `scratch` bytes more than those of the planner's model. ValueError: there is no room for it."""
    need = second_bytes(model) + scratch
    if need >= device.ram_bytes - device.base_bytes:
        raise ValueError(
            f"{device.name} promises {device.ram_bytes / 1e6:.1f} MB, which has no room for the LM head "
            f"({need / 1e6:.1f} MB) beside other layers"
        )
    end = replace(device, name=end_of(device.name), ram_bytes=need, base_bytes=scratch, beside=device.name)
    return replace(device, ram_bytes=device.ram_bytes - need), end


def end_of(name: str) -> str:
    """The name of the second range of a device."""
    return f"end of {name}"[:100]


def with_second_range(model: ModelCosts, cluster: Cluster, name: str) -> Cluster:
    """The cluster with a second range of that device. Errors as for second_range."""
    first, end = second_range(model, cluster.device(name))
    devices = tuple(first if device.name == name else device for device in cluster.devices)
    links = dict(cluster.links)
    for (source, target), link in cluster.links.items():
        if source == name:
            links[end.name, target] = link
        if target == name:
            links[source, end.name] = link
    links[name, end.name] = links[end.name, name] = LOOPBACK
    return replace(cluster, devices=(*devices, end), links=links)


def at_home(cluster: Cluster, stages: Sequence[Assignment], home: Collection[str]) -> bool:
    """Whether both ends of a chain are on devices of `home`, of which second ranges are part."""
    return all(_is_home(cluster.device(stage.device), home) for stage in (stages[0], stages[-1]))


def _is_home(device: Device, home: Collection[str]) -> bool:
    return (device.beside or device.name) in home


def questions(question: Question, home: Collection[str]) -> Iterator[Question]:
    """The question with each choice of two ends at home; it has no ends so far."""
    devices = question.cluster.devices
    names = [device.name for device in devices if device.name in home and not device.beside]
    pairs = [(first, last) for first in names for last in names]
    pairs += [(device.beside, device.name) for device in devices if device.beside in names]
    for first, last in pairs:
        try:
            yield replace(question, constraints=replace(question.constraints, first=first, last=last))
        except ValueError:  # it contradicts the layers that were given, or their order
            continue


@dataclass(frozen=True, slots=True)
class Cost:
    """What both ends at home cost beside the best plan of all, as a part of its speed by the objective."""

    home: Plan
    free: Plan

    @property
    def share(self) -> float:
        """0.05: 5 % fewer tokens/s, or 5 % of the speed at which the first token comes."""
        return 1 - seconds_of(self.free) / seconds_of(self.home)

    @property
    def text(self) -> str:
        """The cost in words."""
        if self.share < 0.0005:
            return "costs nothing"
        if self.free.objective == "first_token":
            after = f"{self.home.first_token_seconds * 1e3:.0f} ms instead of"
            return (
                f"costs {self.share:.1%}: first token after {after} {self.free.first_token_seconds * 1e3:.0f}"
            )
        rates = f"{self.home.tokens_per_s:.2f} tokens/s instead of {self.free.tokens_per_s:.2f}"
        return f"costs {self.share:.1%}: {rates}"


def seconds_of(plan: Plan) -> float:
    """What the objective of a plan makes least."""
    return plan.first_token_seconds if plan.objective == "first_token" else plan.step_seconds
