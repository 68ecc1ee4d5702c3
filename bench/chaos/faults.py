"""The kinds of faults: what each does to a running chain, and how long an answer may stand still then."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial

import trio

from shoal.engine.layout import NUMERICS_VERSION
from shoal.engine.model_directory import Model
from shoal.net.liveness import RoundTrip, call_bound

from .trial import Trial

BOUND = RoundTrip().measured(0.01).bound(10.0)
"""The adaptive bound of silence on a quiet link, in seconds."""
HANG_BOUND = call_bound(0.02)


async def kill(trial: Trial) -> None:
    trial.bound = BOUND
    trial.victim().kill()


async def freeze(trial: Trial) -> None:
    node, seconds = trial.victim(), trial.seconds(0.5, 20)
    trial.bound = BOUND
    node.freeze()
    try:
        await trio.sleep(seconds)
    finally:
        node.thaw()


async def several(trial: Trial) -> None:
    """Kills and freezes of two nodes, one after the other."""
    for fault in trial.rng.choices((kill, freeze), k=2):
        trial.strikes.append(trio.current_time())
        trial.tasks.start_soon(fault, trial)
        await trio.sleep(trial.rng.uniform(0, 2))


async def restart(trial: Trial) -> None:
    """Kills a node and starts it again at the same address: it comes back."""
    node = trial.victim()
    trial.bound, trial.returns = BOUND, True
    node.kill()
    await trio.sleep(trial.rng.uniform(0, 1))
    await trial.fleet.apart(node.start)


async def black_step(trial: Trial) -> None:
    await _black(trial, "step")


async def black_control(trial: Trial) -> None:
    await _black(trial, "control")


async def _black(trial: Trial, purpose: str) -> None:
    """The connections to a node for one purpose carry nothing any more; new ones do."""
    node = trial.victim()
    trial.bound = BOUND
    for link in trial.network.links(node.name, purpose):
        link.black = True


async def cut(trial: Trial) -> None:
    """A node's network is away for a while: all of its connections lose what is sent."""
    node, seconds = trial.victim(), trial.seconds(0.3, 20)
    trial.bound = BOUND
    trial.network.cut[node.name] = trio.current_time() + seconds
    await trio.sleep(seconds)


async def hang(trial: Trial) -> None:
    """A call of a node's stage does not return."""
    node = trial.victim()
    trial.bound = HANG_BOUND
    await trial.fleet.apart(node.hang)


async def frozen_head(trial: Trial) -> None:
    """The coordinator is suspended, as by the lid of a laptop."""
    seconds = trial.seconds(1, 60)
    trial.bound, trial.own = BOUND, seconds
    trial.head.send_signal(signal.SIGSTOP)
    try:
        await trio.sleep(seconds)
    finally:
        trial.head.send_signal(signal.SIGCONT)


async def truncate(trial: Trial) -> None:
    """The files that a node has mapped lose their end. The node says so, and does not end."""
    node = trial.victim()
    trial.bound, trial.survivors = BOUND, {node.name}
    node.truncate(trial.rng.choice((0, 4096, 20000)))


async def squatters(trial: Trial) -> None:
    """Strangers use up what connections they get while a node is lost and the others must connect anew."""
    trial.bound, trial.only_victims = BOUND, True
    trial.victim().kill()


@asynccontextmanager
async def strangers(trial: Trial) -> AsyncIterator[None]:
    """The strangers, from before the coordinator connects."""
    digest = Model.open(trial.model).hash
    command = [sys.executable, "-m", "bench.chaos.strangers", digest, str(NUMERICS_VERSION)]
    for node in trial.fleet.nodes.values():
        assert node.running is not None
        command.append("{}:{}".format(*node.running.address))
    async with trio.open_nursery() as tasks:
        process = await tasks.start(
            partial(trio.run_process, command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        )
        await process.stdout.receive_some()
        yield
        await process.stdin.aclose()


KINDS: dict[str, Callable[[Trial], Awaitable[None]]] = {
    fault.__name__.replace("_", "-"): fault
    for fault in (
        kill, freeze, several, restart, black_step, black_control, cut, hang, frozen_head, truncate,
        squatters,
    )
}  # fmt: skip
AROUND = {"squatters": strangers}
