"""Asks nodes what they offer and measures the links between them, without giving them anything to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..engine.errors import ShoalError
from .coordinator import DEFAULT_OPTIONS, Coordinator, CoordinatorOptions
from .identity import Identity, ModelShape
from .placement import Links, NodeInfo, Placement


@dataclass(frozen=True, slots=True)
class Survey:
    """What a plan is made from."""

    nodes: tuple[NodeInfo, ...]
    links: Links


class _Enough(ShoalError):
    """Ends a coordinator at the moment when it would plan."""

    def __init__(self, survey: Survey) -> None:
        super().__init__("the survey is done")
        self.survey = survey


async def survey(
    addresses: Sequence[tuple[str, int]],
    identity: Identity,
    shape: ModelShape,
    options: CoordinatorOptions = DEFAULT_OPTIONS,
) -> Survey:
    """The nodes at these addresses, in this order, and their links. Errors as for Coordinator.open."""

    def plan(nodes: Sequence[NodeInfo], links: Links) -> Placement:
        raise _Enough(Survey(tuple(nodes), dict(links)))

    try:
        async with Coordinator.open(addresses, identity, shape, plan, replace(options, measure_links=True)):
            raise AssertionError("a coordinator without a plan does not serve")
    except _Enough as enough:
        return enough.survey
