"""The process of `shoal node`: what it offers to coordinators, and how it serves them.

It offers the RAM that it promises not to exceed and the speed that it measured at its start. Its stages keep
the promise: keys and values get what weights and workspace leave.
"""

from __future__ import annotations

import argparse
import os
import platform
import secrets
import signal
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import trio

from . import __version__
from .engine.backends import choose
from .engine.costs import constant_bytes, tied_bytes, unit_cost
from .engine.errors import NoPlanError, ShoalError
from .engine.files import write_whole
from .engine.host import Ram, ram, resident_bytes
from .engine.measure import Watch, measure, median, stopwatch
from .engine.memory import return_large_frees
from .engine.model_directory import Model
from .engine.power import PowerReader
from .engine.stage import Stage, StageOptions
from .engine.threads import chosen
from .net.assignment import NodeParts
from .net.errors import NetError, StageStuckError
from .net.identity import identity_of
from .net.inbox import enough_bytes
from .net.listen import addresses, listen, named, reachable
from .net.messages import Offer
from .net.node import Node
from .net.slow import Slowness, SlowWatch, Turn, slow_stage, turn
from .node_care import Care
from .planner import Device
from .planning import (
    FREE_SHARE,
    MB,
    device_row,
    message_bytes,
    planner_model,
    scratch_bytes,
    stage_expectation,
    workspace_bytes,
)
from .store import resolve

_LAST_SECONDS = 3.5
"""How long a node that ends waits for the call of its stage."""
_AT_ONCE_SECONDS = 1.0
"""The same for a node that was told to end at once."""


def serve(args: argparse.Namespace) -> None:
    """Serves until SIGINT or SIGTERM, or the policy says so, by the arguments of `shoal node`. At the second
    signal it ends at once. AddressInUseError: the port is in use."""
    return_large_frees()
    host, port = args.listen
    slowness = Slowness(args.slow, args.slow_file)
    hosts = addresses(host)
    others = reachable(hosts)
    if others is not None and not args.insecure:
        what = host if host == others else f"{host} ({others})"
        raise NetError(
            f"other devices can reach {what}, and connections are not encrypted yet: listen on 127.0.0.1, "
            "or add --insecure if you trust everybody on that network"
        )
    backend, reason = choose(args.backend)
    if reason is not None:
        _log(f"shoal: running on {backend}: {reason}")
    model = Model.open(resolve(args.model))
    base = resident_bytes()
    open_listeners = partial(listen, host, hosts, port)
    trio.run(_main, args, open_listeners, model, base, promised_bytes(args.ram, base, ram()), slowness)


async def _main(
    args: argparse.Namespace,
    open_listeners: Callable[[], Awaitable[list[trio.SocketListener]]],
    model: Model,
    base: int,
    promised: int,
    slowness: Slowness,
) -> None:
    listeners = await open_listeners()  # before the slow parts: a port in use is reported at once
    found = named(listeners)
    try:
        care = Care(args.policy, PowerReader(args.power_files), _log)
        await care.begin()
        threads, why = chosen(args.threads, choose(args.backend)[0], args.isa)  # as `shoal run` does
        options = StageOptions(args.backend, args.isa, threads, resident=args.resident, keep_rows=True)
        hop = await _hop_seconds()
        turns: Turn = nullcontext if args.slow_turns is None else partial(turn, args.slow_turns)
        plays = args.slow_file is not None or slowness.factor() > 1
        watch = SlowWatch(slowness, turn=turns) if plays else stopwatch
        offer = await trio.to_thread.run_sync(_offer, args, model, options, base, promised, hop, watch)
        opener = StageOpener(model, options, offer.device)
        parts = NodeParts(
            identity=identity_of(model, args.name or platform.node(), secrets.randbits(64), __version__),
            offer=offer,
            units=model.n_units,
            open_stage=lambda first, last: slow_stage(opener(first, last), slowness, turns),
            kv_bytes=opener.kv_bytes,
            stateless=frozenset(u for u, unit in enumerate(model.program.units) if not unit.states),
            resident=resident_bytes,
            log=_log,
            expect=stage_expectation(planner_model(model, options), offer.device),
            enough=enough_bytes(options.max_rows, model.program.cut_cols),
            condition=care.condition,
        )
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            async with trio.open_nursery() as nursery:
                node = Node(parts)
                await nursery.start(node.serve, listeners)
                if args.port_file is not None:
                    write_whole(args.port_file, f"{found[0]}\n")
                plural, by = "s" if offer.threads > 1 else "", f" ({why})" if why else ""
                print(
                    f"listening on {', '.join(found)} as {parts.identity.name}: {offer.backend}, "
                    f"{offer.threads} thread{plural}{by}, {offer.device.ram_bytes / MB:.0f} MB",
                    flush=True,
                )
                again = await care.until_left(node, signals)
                patience, code = (_LAST_SECONDS, 0) if again is None else (_AT_ONCE_SECONDS, 128 + again)
                insist = threading.Timer(patience, _leave_stage, (node, code))
                insist.daemon = True
                insist.start()
                nursery.cancel_scope.cancel()
            insist.cancel()
        if again is not None:
            signal.raise_signal(again)
    finally:
        for listener in listeners:
            await trio.aclose_forcefully(listener)


def _leave_stage(node: Node, code: int) -> None:
    """Ends the process although a call of its stage runs: a thread cannot be ended from outside."""
    stuck = node.stuck(_LAST_SECONDS)
    if stuck is not None:
        _log(f"shoal: error: {stuck}")
    os._exit(code if stuck is None else StageStuckError.exit_code)


async def _hop_seconds() -> float:
    """Median time to a worker thread and back, which every step needs on its way to the stage."""
    times = []
    for _ in range(25):
        start = time.perf_counter()
        await trio.to_thread.run_sync(int)
        times.append(time.perf_counter() - start)
    return median(times)


def promised_bytes(asked_mb: int | None, base: int, ram: Ram) -> int:
    """The RAM that this node promises not to exceed, its process of `base` bytes included.

    ShoalError: `--ram` is more than this device has, or it is missing and the system does not say how much it
    has."""
    if asked_mb is not None:
        if ram.total is not None and asked_mb > -(-ram.total // MB):
            raise ShoalError(
                f"--ram {asked_mb} is more than the {ram.total / MB:.0f} MB {ram.bound}, and a node that "
                "uses more is killed while it answers: give a smaller number"
            )
        return asked_mb * MB
    if ram.total is None or ram.estimate is None:
        raise ShoalError(
            "this system does not say how much RAM it has: say how much this node may use with --ram MB"
        )
    promised = min(int(ram.estimate * FREE_SHARE) + base, ram.total)
    if ram.available is None:
        _log(
            f"shoal: this system does not say how much RAM is available, so a third of the "
            f"{ram.total / MB:.0f} MB {ram.bound} is assumed; --ram MB sets another limit"
        )
    return promised


def _offer(
    args: argparse.Namespace,
    model: Model,
    options: StageOptions,
    base: int,
    promised: int,
    hop: float,
    watch: Watch,
) -> Offer:
    """The offer of this device for a model. `hop` is the time to a worker thread and back, which a node that
    plays a slower device does not slow down; all else is measured with the clock `watch`."""
    scratch = scratch_bytes(model, chosen(options.threads, choose(options.backend)[0], options.isa)[0])
    workspace = workspace_bytes(model, options, 0, model.n_units)
    room = promised - base - scratch - constant_bytes(model.program) - workspace
    measured = measure(model, options, seconds=args.measure_seconds, room=room, watch=watch)
    device = device_row(
        args.name or platform.node(),
        measured,
        ram_bytes=promised,
        # Plans assume one thread, so scratch memory of this node's threads counts as memory of its process.
        base_bytes=max(base, resident_bytes()) + scratch,
        hop_s=hop,
    )
    return Offer(device, options.max_rows, measured.threads, measured.backend, measured.exact)


class StageOpener:
    """Opens stages within the promised RAM. Keys and values get what weights and workspace leave."""

    def __init__(self, model: Model, options: StageOptions, device: Device) -> None:
        self._model, self._options, self._device = model, options, device

    def __call__(self, first: int, last: int) -> Stage:
        """The stage of units [first, last). NoPlanError: it does not fit."""
        options = replace(self._options, kv_bytes=self.kv_bytes(first, last))
        return Stage(self._model, first, last, options)

    def kv_bytes(self, first: int, last: int, beside: range = range(0)) -> int:
        """What a stage of units [first, last) leaves for keys and values, while a stage of units `beside` is
        ready as well, whose workspace takes no memory before it runs. NoPlanError: nothing."""
        model, device = self._model, self._device
        units = {*range(first, last), *beside}
        held = sum(unit_cost(model, u).bytes for u in units)
        if len(units) == model.n_units:
            held -= tied_bytes(model)
        held += constant_bytes(model.program) + workspace_bytes(model, self._options, first, last)
        held += message_bytes(model, self._options)
        left = device.ram_bytes - device.base_bytes - held
        if left <= 0:
            others = f" beside [{beside.start}, {beside.stop})" if beside else ""
            raise NoPlanError(
                f"units [{first}, {last}){others} need {held / MB:.0f} MB and the process itself "
                f"{device.base_bytes / MB:.0f} MB, of {device.ram_bytes / MB:.0f} MB promised: "
                f"{-left / MB + 1:.0f} MB are missing"
            )
        return left


def bare_bytes(path: str) -> int:
    """Bytes of RAM that this process uses after it has measured itself with a model, as a node does."""
    return_large_frees()
    measure(Model.open(path), StageOptions(resident=True), seconds=0.1, room=0)
    return resident_bytes()


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
