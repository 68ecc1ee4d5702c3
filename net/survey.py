"""A survey of nodes: their offers and the links between them, for a plan that is not carried out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..engine.errors import ShoalError
from .coordinator import DEFAULT_OPTIONS, Coordinator, CoordinatorOptions
from .identity import Identity, ModelShape
from .placement import Links, NodeInfo, Placement


@dataclass(frozen=True, slots=True)
class Survey:
    """Nodes and links: what a plan is made from."""

    nodes: tuple[NodeInfo, ...]
    links: Links


class _Enough(ShoalError):
    """Raised by the planner of `survey` to end the coordinator when it would plan."""

    def __init__(self, survey: Survey) -> None:
        super().__init__("the survey is done")
        self.survey = survey


async def survey(
    addresses: Sequence[tuple[str, int]],
    identity: Identity,
    shape: ModelShape,
    options: CoordinatorOptions = DEFAULT_OPTIONS,
) -> Survey:
    """Connects to nodes and measures their links. The nodes are in the order of the addresses. Errors as for
    Coordinator.open."""

    def plan(nodes: Sequence[NodeInfo], links: Links) -> Placement:
        raise _Enough(Survey(tuple(nodes), dict(links)))

    try:
        async with Coordinator.open(addresses, identity, shape, plan, replace(options, measure_links=True)):
            raise AssertionError("a coordinator without a plan does not serve")
    except _Enough as enough:
        return enough.survey
