"""The process of `shoal up`: the coordinator of a house that stays, and what belongs to it.

The network runs in the thread of a Portal: the coordinator, the port where devices connect, and the child
process that is this device's own node. That node connects to the port like those of other devices. Commands
of this user come in over a Unix socket (shoal/local), whose threads use the portal. The main thread waits for
a signal.
"""

from __future__ import annotations

import argparse
import ipaddress
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial

import trio

from . import house, last_start
from .arguments import address
from .cluster_view import coordinator_identity
from .contexts import context_of
from .engine.errors import ShoalError
from .engine.model_directory import Model
from .local.server import Head
from .local.server import serve as serve_socket
from .nearby import announce
from .net.connection import open_tasks
from .net.coordinator import Coordinator, CoordinatorOptions
from .net.identity import Identity, host_port, shape_of
from .net.known import KnownLinks
from .net.listen import named
from .net.messages import MOST_ADDRESSES, Address
from .net.reverse import DeviceListener
from .net.tls import TlsStream, Trust
from .network_planner import NetworkPlanner
from .network_rebalancer import NetworkRebalancer
from .nodes import Nodes
from .planner import Plan, units_text
from .planning import default_workload
from .portal import logging_thread, open_portal
from .private import private_of
from .skeletons import SkeletonSource
from .up_first import First
from .up_http import serve_http

_LOOK_SECONDS = 1.0
_GIVE_SECONDS = 60.0


def serve(args: argparse.Namespace, first: First) -> None:
    """Runs until SIGINT or SIGTERM, by the arguments of `shoal up`. Errors as for `shoal up`."""
    with ExitStack() as stack:
        model = Model.open(first.model)
        context = context_of(args.context, model)
        workload = default_workload(context, given=args.context is not None, streams=args.streams)
        private, shrink = private_of(args.private), args.context is None
        plans = NetworkPlanner(model, workload, shrink=shrink, explain=False, private=private)
        say = stack.enter_context(logging_thread(_tell))
        ended = threading.Event()
        me, skeleton = coordinator_identity(model), SkeletonSource(model)
        head = _Head(args, first, model, me, plans, say, ended, skeleton)
        portal = stack.enter_context(open_portal(head.opened))
        _keep(partial(house.keep_model, str(first.model)), say)
        nodes = Nodes(portal, plans)
        serving = Head(model, nodes, lambda: nodes.context, nodes.status, house.head_port())
        stack.enter_context(serve_socket(first.socket, serving))
        stack.enter_context(serve_http(args, model, nodes, say))
        with suppress(KeyboardInterrupt):
            ended.wait()
            return
        say("ends")


def _keep(keep: Callable[[], None], say: Callable[[str], None]) -> None:
    """Keeps something for the next start, as far as the disk allows."""
    try:
        keep()
    except (OSError, ShoalError) as error:
        say(f"cannot be kept for the next start: {error}")


@dataclass(frozen=True, slots=True)
class _Head:
    """What the loop of the network opens. `ended` is set when it ends."""

    args: argparse.Namespace
    first: First
    model: Model
    identity: Identity
    plans: NetworkPlanner
    say: Callable[[str], None]
    ended: threading.Event
    skeleton: SkeletonSource

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[Coordinator]:
        """The coordinator, with the port for devices and this device's own node."""
        trust, moves = self.identity.trust, self.args.moves
        assert trust is not None, "the house has been begun"
        listeners = self.first.listeners
        try:
            self.say(f"{self.model.path.name} for the house of {trust.own.name}")
            self._look_where(trust, listeners)
            devices = DeviceListener(self.identity, self.say, answer_model=self._give_model)
            before, links = last_start.recalled(self.model.hash)
            known = KnownLinks(links)
            known.keep(trust.prefixes)
            options = CoordinatorOptions(
                moves=moves,
                rebalancer=None if moves == "off" else NetworkRebalancer(self.plans),
                log=self.say,
                open_stream=devices.open_stream,
                open_ended=True,
                known_links=known,
                expected=before & trust.prefixes,
            )
            shape = shape_of(self.model)
            opening = Coordinator.open((), self.identity, shape, self.plans, options)
            async with opening as coordinator, open_tasks() as tasks:
                devices.on_device(lambda it: coordinator.add(it.host, it.port, it.incarnation, anew=it.anew))
                tasks.start_soon(devices.serve, listeners)
                tasks.start_soon(self._watch, trust, coordinator, known)
                tasks.start_soon(self._watch_where, trust, listeners)
                tasks.start_soon(self.first.own.keep, self.say)
                if self.args.mdns:
                    tasks.start_soon(announce, "node", trust.key, listeners, self.say)
                yield coordinator
                tasks.cancel_scope.cancel()
        finally:
            self.ended.set()

    async def _give_model(self, stream: TlsStream) -> None:
        """Serves a connection that has asked for the model."""
        gone = suppress(trio.BrokenResourceError, trio.ClosedResourceError)
        with gone, trio.move_on_after(_GIVE_SECONDS):
            async with self.skeleton.body() as body:
                await stream.send_all(body)
            await stream.send_eof()
            while await stream.receive_some():  # so that what was sent last is read
                pass

    def _look_where(self, trust: Trust, listeners: Sequence[trio.SocketListener]) -> None:
        """Finds out where other devices can connect to this one, and has them told if that has changed."""
        shown = [address(text) for text in named(listeners)]
        others = [where for where in shown if not ipaddress.ip_address(where[0]).is_loopback]
        now = tuple(Address(*where) for where in (others or shown)[:MOST_ADDRESSES])
        if now != trust.addresses:
            trust.moved(now)
            _keep(partial(house.keep_head, now), self.say)
            self.say(f"devices connect to {', '.join(host_port(where.host, where.port) for where in now)}")

    async def _watch_where(self, trust: Trust, listeners: Sequence[trio.SocketListener]) -> None:
        while True:
            await trio.sleep(_LOOK_SECONDS)
            self._look_where(trust, listeners)

    async def _watch(self, trust: Trust, coordinator: Coordinator, known: KnownLinks) -> None:
        """Says which device has which layers, whenever that has changed, and keeps for the next start what it
        can begin with."""
        said, kept = None, None
        while True:
            chain, placement = coordinator.current, coordinator.placement
            if chain is not None and chain.open and placement.stages != said:
                said = placement.stages
                units = self.model.n_units
                held = "; ".join(f"{s.device}: {units_text(s.first, s.last, units)}" for s in said)
                speed, context = f"{placement.tokens_per_s:.3g} tokens/s", f"{placement.context} tokens"
                self.say(f"ready: about {speed}, a context of {context}; {held}")
                if isinstance(placement.detail, Plan) and placement.detail.ends:
                    self.say(placement.detail.ends)
            known.keep(trust.prefixes)
            now = coordinator.devices, dict(known.links)
            if said is not None and now != kept:
                kept = now
                await trio.to_thread.run_sync(
                    _keep, partial(last_start.keep, self.model.hash, *now), self.say
                )
            await trio.sleep(_LOOK_SECONDS)


def _tell(text: object) -> None:
    print(f"shoal: {text}", flush=True)
