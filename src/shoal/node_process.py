"""The process of `shoal node`: what it offers to coordinators, and how it serves them.

It offers the RAM that it promises not to exceed and the speed that it measured at its start. Its stages keep
the promise: keys and values get what weights and workspace leave.
"""

from __future__ import annotations

import argparse
import os
import platform
import signal
import sys
import threading
import time
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import trio

from . import __version__, house
from .engine.backends import choose
from .engine.costs import constant_bytes, tied_bytes, unit_cost
from .engine.errors import NoPlanError, ShoalError
from .engine.files import write_whole
from .engine.host import Ram, check_promise, ram, resident_bytes
from .engine.measure import Watch, measure, median, stopwatch
from .engine.memory import return_large_frees
from .engine.model_directory import Model
from .engine.power import PowerReader
from .engine.stage import Stage, StageOptions
from .engine.threads import chosen
from .held_files import HeldFiles
from .measured import measured
from .net.assignment import NodeParts
from .net.connection import open_tasks
from .net.dial import open_tcp
from .net.errors import MismatchError, NetError, StageStuckError
from .net.identity import identity_of
from .net.inbox import enough_bytes
from .net.listen import addresses, listen, named, reachable
from .net.messages import Offer
from .net.node import Node
from .net.slow import Slowness, SlowWatch, Turn, slow_stage, turn
from .net.tls import Trust
from .net.work import StageLike
from .planner import Device
from .planner.home import end_of
from .planning import (
    FREE_SHARE,
    MB,
    NOTHING_BYTES,
    device_row,
    message_bytes,
    planner_model,
    scratch_bytes,
    stage_expectation,
    workspace_bytes,
)
from .policy_enforcer import PolicyEnforcer
from .second_range import Nodes, resident_of, say_second, two_rows
from .store import resolve

if TYPE_CHECKING:
    from .house_node import HouseNode

T = TypeVar("T")
_ALONE, _ALL = ("127.0.0.1", 0), ("::", 0)
"""Where a node listens that is told nothing: on this device, or with a house everywhere."""
_LAST_SECONDS = 3.5
"""How long a node that ends waits for the call of its stage."""
_AT_ONCE_SECONDS = 1.0
"""How long a node that was told to end at once waits for the call of its stage."""


def serve(args: argparse.Namespace) -> None:
    """Serves until SIGINT or SIGTERM, or the policy says so, by the arguments of `shoal node`. At the second
    signal it ends at once. AddressInUseError: the port is in use."""
    return_large_frees()
    if args.both_ends is not None and args.model is None:
        raise ShoalError("--both-ends is for the device of the coordinator, and needs a MODEL there")
    own = None if args.insecure else house.trust()
    home = None if args.model is not None and not args.head else _home(own, args)
    host, port = args.listen or (_ALONE if own is None else _ALL)
    hosts = addresses(host)
    others = reachable(hosts)
    if others is not None and own is None and not args.insecure:
        what = host if host == others else f"{host} ({others})"
        raise NetError(
            f"other devices can reach {what}, and this device is paired with none of them: pair it (`shoal "
            "invite` on the head, `shoal join` here), listen on 127.0.0.1, or add --insecure if you trust "
            "everybody on that network"
        )
    backend, reason = choose(args.backend)
    if reason is not None:
        _log(f"shoal: running on {backend}: {reason}")
    open_listeners = lambda more=0: listen(host, hosts, port and port + more)  # noqa: E731
    process = _Process(args, own, home, open_listeners)
    if args.model is None:
        trio.run(process.serve_house)
    else:
        trio.run(process.serve, resolve(args.model))
    if process.again is not None:
        signal.raise_signal(process.again)


def _home(own: Trust | None, args: argparse.Namespace) -> HouseNode:
    """The house of this device. ShoalError: it has none, or is its head."""
    if own is None:
        raise ShoalError(
            "this device has no house to serve: join one with `shoal join TOKEN` (`shoal invite` on its head "
            "prints the token), or give a MODEL for `shoal run --nodes`"
        )
    if args.model is None and own.own.role == "head":
        raise ShoalError("this device is the head of its house: `shoal up` runs a node for it")
    from .house_node import HouseNode

    return HouseNode(own, args.head, _log, mdns=args.mdns)


class _Process:
    """The process of a node: what its arguments say, and what it serves with. `again` is the second signal,
    if there was one. ShoalError: its slow factor is none."""

    def __init__(
        self,
        args: argparse.Namespace,
        own: Trust | None,
        home: HouseNode | None,
        open_listeners: Callable[..., Awaitable[list[trio.SocketListener]]],
    ) -> None:
        self._args, self._own, self._home, self._open_listeners = args, own, home, open_listeners
        self._slowness = Slowness(args.slow, args.slow_file)
        self.again: int | None = None

    async def serve_house(self) -> None:
        """Serves the model of the head of the house, and the next one whenever that has changed."""
        assert self._home is not None
        with _ending_signals() as signals:
            goes_on = True
            while goes_on:
                path = await _unless_told(signals, self._home.find_model)
                goes_on = path is not None and await self._serve(path, signals)

    async def serve(self, path: Path) -> None:
        """Serves one model. MismatchError: the head that it is to serve has another one."""
        if await self._serve(path, None):
            raise MismatchError(f"the head has another model than {path}: give that one, or no MODEL")

    async def _serve(self, path: Path, signals: AsyncIterator[int] | None) -> bool:
        """Serves until this process is to end, or the head has another model, which is the result."""
        args, own = self._args, self._own
        with ExitStack() as stack:
            cap = None if args.disk is None else args.disk * MB
            files = stack.enter_context(closing(HeldFiles(path, cap)))
            model = Model.open(path)
            base = resident_bytes()
            promised = promised_bytes(args.ram, base, ram())
            listeners = [await self._open_listeners()]  # before the slow parts: a port in use is an error
            if args.both_ends is not None:
                listeners.append(await self._open_listeners(more=1))
            for listener in (one for some in listeners for one in some):
                stack.callback(listener.socket.close)
            enforcer = PolicyEnforcer(args.policy, PowerReader(args.power_files), _log)
            await enforcer.begin()
            parts = await self._parts(model, files, base, promised, enforcer)
            unserved = listeners[len(parts) :]  # where a second range would be, if there were one
            del listeners[len(parts) :]
            for listener in (one for some in unserved for one in some):
                await listener.aclose()
            signals = signals or stack.enter_context(_ending_signals())
            changed = False
            async with open_tasks() as tasks:
                nodes = Nodes([Node(one) for one in parts])
                for node, listening in zip(nodes.each, listeners, strict=True):
                    await tasks.start(node.serve, listening)
                if args.port_file is not None:
                    places = [named(some)[0] for some in listeners]
                    write_whole(args.port_file, "".join(f"{place}\n" for place in places))
                _say(parts[0], named(listeners[0]), own, _threads(args)[1])
                for second, listening in zip(parts[1:], listeners[1:], strict=True):
                    say_second(second, named(listening))

                async def stay(home: HouseNode, at: int) -> None:
                    nonlocal changed
                    port = listeners[at][0].socket.getsockname()[1]
                    await home.stay(parts[at].identity, port, nodes.each[at].connected, quiet=at > 0)
                    changed = True
                    tasks.cancel_scope.cancel()

                if self._home is not None:
                    for at in range(len(parts)):
                        tasks.start_soon(stay, self._home, at)
                self.again = await enforcer.until_left(nodes, signals)
                stack.callback(_insist(nodes, self.again).cancel)
                tasks.cancel_scope.cancel()
        return changed

    async def _parts(
        self, model: Model, files: HeldFiles, base: int, promised: int, enforcer: PolicyEnforcer
    ) -> list[NodeParts]:
        """What the node serves with, after this device was measured with the model; and what its second range
        serves with, if there is one."""
        args, own, slowness = self._args, self._own, self._slowness
        threads, _ = _threads(args)
        options = StageOptions(args.backend, args.isa, threads, resident=args.resident, keep_rows=True)
        hop = await _hop_seconds()
        turns: Turn = nullcontext if args.slow_turns is None else partial(turn, args.slow_turns)
        plays = args.slow_file is not None or slowness.factor() > 1
        watch = SlowWatch(slowness, turn=turns) if plays else stopwatch
        changes = args.slow_file is not None or args.slow_turns is not None
        clock = watch, None if changes else slowness.factor()
        offer = await trio.to_thread.run_sync(_offer, args, model, options, base, promised, hop, clock)
        costs, rows = planner_model(model, options), [offer.device]
        if args.both_ends is not None:
            scratch = scratch_bytes(model, threads)
            rows = two_rows(costs, offer.device, scratch, asked=args.both_ends == "always", log=_log)
        openers = [StageOpener(model, options, row) for row in rows]

        def parts_of(row: Device, opener: StageOpener) -> NodeParts:
            def slowed(first: int, last: int) -> StageLike:
                return slow_stage(opener(first, last), slowness, turns)

            name, second = args.name or _called(own), bool(row.beside)
            return NodeParts(
                identity=identity_of(model, end_of(name) if second else name, __version__, own),
                offer=replace(offer, device=row),
                units=model.n_units,
                open_stage=slowed if plays or args.slow_turns is not None else opener,
                kv_bytes=opener.kv_bytes,
                stateless=frozenset(u for u, unit in enumerate(model.program.units) if not unit.states),
                resident=lambda: resident_of(row, openers[1:]),
                log=_log,
                expect=stage_expectation(costs, row),
                enough=enough_bytes(options.max_rows, model.program.cut_cols),
                condition=enforcer.condition,
                open_stream=open_tcp if self._home is None else self._home.open_stream,
                tells=self._home is None,
                files=None if second else files,
            )

        return list(map(parts_of, rows, openers))


@contextmanager
def _ending_signals() -> Iterator[AsyncIterator[int]]:
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals, _interruptible():
        yield signals


async def _unless_told(signals: AsyncIterator[int], work: Callable[[], Awaitable[T]]) -> T | None:
    """The result of `work`; None: a signal came first."""
    result: T | None = None
    async with open_tasks() as tasks:

        async def heed() -> None:
            await anext(signals)
            tasks.cancel_scope.cancel()

        tasks.start_soon(heed)
        result = await work()
        tasks.cancel_scope.cancel()
    return result


def _threads(args: argparse.Namespace) -> tuple[int, str]:
    """The number of threads, as for `shoal run`, and why."""
    return chosen(args.threads, choose(args.backend)[0], args.isa)


def _say(parts: NodeParts, found: Sequence[str], own: Trust | None, why: str) -> None:
    """Tells the user that this node is ready, and what it offers."""
    offer = parts.offer
    plural, by = "s" if offer.threads > 1 else "", f" ({why})" if why else ""
    promised = offer.device.ram_bytes
    room = f"{promised / MB:.0f} MB" if promised > NOTHING_BYTES else "no layers"
    with suppress(OSError):  # a full disk: the line is lost, and the exit code says so
        print(
            f"listening on {', '.join(found)} as {parts.identity.name}: {offer.backend}, {offer.threads} "
            f"thread{plural}{by}, {room}{_of_house(own)}",
            flush=True,
        )


@contextmanager
def _interruptible() -> Iterator[None]:
    """SIGINT arrives although the parent process made this one ignore it, when it is blocked: see cli."""
    before = signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _called(own: Trust | None) -> str:
    """The name of this device."""
    return platform.node() if own is None else own.own.name


def _of_house(own: Trust | None) -> str:
    if own is None:
        return ""
    heads = [device.name for device in own.devices if device.role == "head"]
    return f", for the house of {', '.join(heads)}"


def _insist(node: Nodes, again: int | None) -> threading.Timer:
    """Starts the time after which this process ends in any case."""
    patience, code = (_LAST_SECONDS, 0) if again is None else (_AT_ONCE_SECONDS, 128 + again)
    insist = threading.Timer(patience, _leave_stage, (node, code))
    insist.daemon = True
    insist.start()
    return insist


def _leave_stage(node: Nodes, code: int) -> None:
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
        check_promise(asked_mb, ram)
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
    clock: tuple[Watch, float | None],
) -> Offer:
    """The offer of this device for a model. `hop` is the time to a worker thread and back, which a node that
    plays a slower device does not slow down; all else is measured with the `clock`: what measured.measured
    takes as `watch` and `slow`."""
    scratch = scratch_bytes(model, chosen(options.threads, choose(options.backend)[0], options.isa)[0])
    workspace = workspace_bytes(model, options, 0, model.n_units)
    room = promised - base - scratch - constant_bytes(model.program) - workspace
    watch, slow = clock
    found = measured(model, options, seconds=args.measure_seconds, room=room, watch=watch, slow=slow)
    rates = found.rates
    device = device_row(
        args.name or platform.node(),
        rates,
        ram_bytes=promised,
        # Plans assume one thread, so scratch memory of this node's threads counts as memory of its process.
        base_bytes=max(base, resident_bytes(), found.resident) + scratch,
        hop_s=hop,
    )
    return Offer(device, options.max_rows, rates.threads, rates.backend, rates.exact)


class StageOpener:
    """Opens stages within the promised RAM. Keys and values get what weights and workspace leave."""

    def __init__(self, model: Model, options: StageOptions, device: Device) -> None:
        self._model, self._options, self._device = model, options, device
        self._opened: Callable[[], Stage | None] = lambda: None

    @property
    def held_bytes(self) -> int:
        """What the device row promises, while a stage is open; else 0."""
        return 0 if self._opened() is None else self._device.ram_bytes

    def __call__(self, first: int, last: int) -> Stage:
        """The stage of units [first, last). NoPlanError: it does not fit."""
        options = replace(self._options, kv_bytes=self.kv_bytes(first, last))
        stage = Stage(self._model, first, last, options)
        self._opened = weakref.ref(stage)
        return stage

    def kv_bytes(self, first: int, last: int, beside: range = range(0)) -> int:
        """What a stage of units [first, last) leaves for keys and values, while a stage of units `beside` is
        ready as well, whose workspace takes no memory before it runs. NoPlanError: nothing."""
        model, device = self._model, self._device
        units = {*range(first, last), *beside}
        held = sum(unit_cost(model, u).bytes for u in units)
        if len(units) == model.n_units or device.beside:
            held -= tied_bytes(model)
        held += constant_bytes(model.program) + workspace_bytes(model, self._options, first, last)
        held += message_bytes(model, self._options)
        left = device.ram_bytes - device.base_bytes - held
        if left < 0 or (left == 0 and not device.beside):  # a second range has no keys and values
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
    with suppress(OSError):  # the log is on a disk that is full, and the node goes on
        print(line, file=sys.stderr, flush=True)
