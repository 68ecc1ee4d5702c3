"""The planner's view of running nodes: what they offer, and their links, as a planner.Cluster."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import trio

from . import __version__, house, planner
from .engine.errors import NoPlanError
from .engine.model_directory import Model
from .net.identity import Identity, identity_of, shape_of
from .net.pace import slowed
from .net.placement import COORDINATOR, Links, NodeInfo
from .net.survey import survey
from .planning import runs_layers


def coordinator_identity(model: Model, *, insecure: bool = False) -> Identity:
    """The identity of this process as a coordinator, with a new incarnation each time, so that nodes never
    confuse two coordinators. It is of the house of this device, if there is one; `insecure`: in any case
    without TLS."""
    own = None if insecure else house.trust()
    return identity_of(model, f"coordinator on {platform.node()}", __version__, own)


def cluster_of(nodes: Sequence[NodeInfo], links: Links, *, offered: bool = False) -> planner.Cluster:
    """The planner's view of the nodes that answered and of their links, by the latest measurements; with
    `offered`, of nodes as they were at the start. Nodes that run no layers are none of it, nor second ranges
    without the first. NoPlanError: there is no other."""
    nodes = [node for node in nodes if runs_layers(node.offer.device)]
    pairs = [(node, _first_of(node, nodes)) for node in nodes]
    devices = tuple(
        slowed(
            replace(node.offer.device, name=node.label, beside="" if first is None else first.label),
            1.0 if offered else node.slower,
        )
        for node, first in pairs
        if first is not None or not node.offer.device.beside
    )
    if not devices:
        raise NoPlanError("No plan: there is no device yet that runs layers.")
    there = {COORDINATOR, *(device.name for device in devices)}
    known = {ends: link for ends, link in links.items() if there.issuperset(ends)}
    hosts = {node.label: (node.host, node.home) for node in nodes}
    return planner.Cluster(devices, known, COORDINATOR, hosts)


def _first_of(node: NodeInfo, nodes: Sequence[NodeInfo]) -> NodeInfo | None:
    """The node whose second range a node is, on the same device; None: it is none, or that node is not
    there. What a node says of itself makes it no part of another device."""
    where = node.host, node.home, node.offer.device.beside
    firsts = (one for one in nodes if not one.offer.device.beside)
    return next((one for one in firsts if (one.host, one.home, one.offer.device.name) == where), None)


def home_of(nodes: Sequence[NodeInfo]) -> frozenset[str]:
    """The labels of the nodes on this device, without second ranges (planner/home.py)."""
    return frozenset(node.label for node in nodes if node.home and not node.offer.device.beside)


def held_of(nodes: Sequence[NodeInfo], units: int) -> dict[str, frozenset[int]]:
    """The units whose files nodes hold, by label, of the nodes that do not hold all of them."""
    return {node.label: node.held for node in nodes if node.held is not None and len(node.held) < units}


def survey_cluster(
    model: Model, addresses: Sequence[tuple[str, int]], *, insecure: bool = False
) -> planner.Cluster:
    """Asks running nodes what they offer and measures their links; `insecure` as for coordinator_identity.
    NetError: a node cannot be reached."""
    return cluster_of(*_surveyed(model, addresses, insecure=insecure))


def survey_home(
    model: Model, addresses: Sequence[tuple[str, int]], *, insecure: bool = False
) -> tuple[planner.Cluster, frozenset[str], Mapping[str, frozenset[int]]]:
    """The result of survey_cluster, the labels of the nodes on this device, and the units whose files nodes
    hold (held_of)."""
    nodes, links = _surveyed(model, addresses, insecure=insecure)
    return cluster_of(nodes, links), home_of(nodes), held_of(nodes, model.n_units)


def _surveyed(
    model: Model, addresses: Sequence[tuple[str, int]], *, insecure: bool
) -> tuple[Sequence[NodeInfo], Links]:
    who = coordinator_identity(model, insecure=insecure)
    found = trio.run(partial(survey, addresses, who, shape_of(model)))
    return found.nodes, found.links
