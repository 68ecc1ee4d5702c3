"""One trial: a coordinator with some answers under way, a fault, and what became of them."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import trio
import trio.lowlevel

from .fleet import Fleet, Node
from .head import Ask, Job
from .proxy import Network

STREAMS, TOKENS, PROMPT = 4, 60, 12
NEAR = (-8, 2)
"""Tokens from a fault to a move that it shall meet."""
PATIENCE_SECONDS = 60.0
"""After the fault a trial may take so long beside the time that the fault lasts."""
SETTLE_SECONDS = 4.0
"""For nodes to close what a coordinator has left."""
SLACK_SECONDS = 1.5
"""For a new plan, loading, and replaying on a busy machine, beside twice the bound of silence."""


@dataclass
class Trial:
    """What faults act on, and what they say of themselves."""

    kind: str
    rng: random.Random
    longest: float
    model: Path
    fleet: Fleet
    network: Network
    moves: int = 0
    """How often layers are moved by hand."""

    head: trio.Process = field(init=False)
    tasks: trio.Nursery = field(init=False)
    chain: list[str] = field(default_factory=list)
    victims: set[str] = field(default_factory=set)
    bound: float = 0.0
    """The adaptive bound of the silence that the fault causes."""
    own: float = 0.0
    """Seconds for which the fault itself stops the answers."""
    returns: bool = False
    """Whether the nodes should all be members again at the end."""
    only_victims: bool = False
    """Whether the loss of any other node is a failure."""

    strikes: list[float] = field(default_factory=list)
    """When further parts of the fault began: each causes a silence of its own."""
    survivors: set[str] = field(default_factory=set)
    """Victims whose process must not end."""

    def victim(self) -> Node:
        """A node that nothing was done to yet: of the chain, unless moves have left none there."""
        spared = [name for name in self.fleet.nodes if name not in self.victims]
        name = self.rng.choice([name for name in self.chain if name in spared] or spared)
        self.victims.add(name)
        return self.fleet.nodes[name]

    def seconds(self, least: float, most: float) -> float:
        """How long the fault lasts: short ones as often as long ones."""
        return min(self.longest, least * math.exp(self.rng.random() * math.log(most / least)))


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a trial. `still`: the longest time without a token of an answer after the fault, beyond
    what the fault itself took. `problems`: what should not be; empty if the trial has passed."""

    kind: str
    equal: int
    still: float
    bound: float
    recoveries: int
    lost: tuple[str, ...]
    seconds: float
    problems: tuple[str, ...]
    moved: int = 0
    """How many of the moves were carried out; others came when none could be."""
    log: str = ""
    """What the coordinator has said, with times, and when the fault struck."""


def asks(rng: random.Random, vocab: int) -> list[Ask]:
    """Answers of random prompts, half of them drawn with a seed."""
    return [
        Ask(
            [rng.randrange(vocab) for _ in range(PROMPT + 7 * i)],
            TOKENS,
            rng.randrange(1 << 32) if i % 2 else None,
        )
        for i in range(STREAMS)
    ]


def moves_about(rng: random.Random, count: int, strike: int) -> list[int]:
    """After how many tokens of all answers layers move: every other time so near a fault after `strike`
    tokens that it may meet the move at any stage, else at any time."""
    most = STREAMS * TOKENS - 1
    return [
        rng.randint(STREAMS, most) if i % 2 else min(most, max(STREAMS, strike + rng.randint(*NEAR)))
        for i in range(count)
    ]


class Heard:
    """What the coordinator's process prints, with times."""

    def __init__(self) -> None:
        self.tokens: list[list[int]] = [[] for _ in range(STREAMS)]
        self.times: list[list[float]] = [[] for _ in range(STREAMS)]
        self.done: dict[str, Any] | None = None
        self.changed = trio.Event()

    async def listen(self, trial: Trial) -> None:
        rest = b""
        assert trial.head.stdout is not None
        async for data in trial.head.stdout:
            now = trio.current_time()
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                body = json.loads(line)
                if "chain" in body:
                    trial.chain = body["chain"]
                elif "token" in body:
                    self.tokens[body["stream"]].append(body["token"])
                    self.times[body["stream"]].append(now)
                else:
                    self.done = body
            self.changed.set()
            self.changed = trio.Event()

    async def until(self, count: int) -> None:
        """Waits for so many tokens of all answers together."""
        while sum(len(tokens) for tokens in self.tokens) < count:
            await self.changed.wait()

    def still(self, *struck: float) -> float:
        """The longest time without a token of an answer after a part of the fault, which began at these
        times."""
        gaps = [0.0]
        for times in self.times:
            after = sorted([*struck, *(t for t in times if t > struck[0])])
            gaps += [b - a for a, b in pairwise(after)]
        return max(gaps)


async def run(
    trial: Trial, fault: Any, around: Any, expected: Sequence[list[int]], questions: list[Ask]
) -> Outcome:
    """Runs a trial. The nodes may be left in any state."""
    start, heard = time.monotonic(), Heard()
    addresses = [gate.address for gate in trial.network.gates]
    log = trial.fleet.nodes["n0"].directory / "head.log"
    problems: list[str] = []
    struck, clock = trio.current_time(), start
    async with AsyncExitStack() as stack:
        if around is not None:
            await stack.enter_async_context(around(trial))
        with log.open("wb") as errors, trio.CancelScope() as limit:
            strike = STREAMS * int(TOKENS * trial.rng.uniform(0.1, 0.5))
            job = Job(
                str(trial.model),
                addresses,
                questions,
                5.0 if trial.kind == "restart" else 0.0,
                moves_about(trial.rng, trial.moves, strike),
                trial.rng.randrange(1 << 32),
            )
            trial.head = await trio.lowlevel.open_process(
                [sys.executable, "-m", "bench.chaos.head", job.to_json()],
                stdout=subprocess.PIPE,
                stderr=errors,
            )
            try:
                limit.deadline = trio.current_time() + PATIENCE_SECONDS
                async with trio.open_nursery() as tasks:
                    trial.tasks = tasks
                    tasks.start_soon(heard.listen, trial)
                    await heard.until(strike)
                    struck, clock = trio.current_time(), time.monotonic()
                    tasks.start_soon(fault, trial)
                    await trio.lowlevel.checkpoint()
                    limit.deadline = trio.current_time() + PATIENCE_SECONDS + trial.own
                    await trial.head.wait()
                    while heard.done is None and trial.head.returncode == 0:
                        await heard.changed.wait()
                    tasks.cancel_scope.cancel()
            finally:
                if trial.head.returncode is None:
                    trial.head.kill()
                    with trio.CancelScope(shield=True):
                        await trial.head.wait()
        if limit.cancelled_caught:
            problems.append(f"nothing for {PATIENCE_SECONDS:g} s")
    words = log.read_text(errors="replace").strip()
    if heard.done is None and not limit.cancelled_caught:
        problems.append(f"the coordinator ended with code {trial.head.returncode}: {words[-300:]}")
    equal = sum(a == b for a, b in zip(heard.tokens, expected, strict=True))
    if equal < STREAMS and heard.done is not None:
        problems.append(f"{STREAMS - equal} answers differ")
    done = heard.done or {"recoveries": 0, "nodes": list(trial.fleet.nodes), "sessions": 0, "moves": []}
    still = max(0.0, heard.still(struck, *trial.strikes) - trial.own)
    if still > 2 * trial.bound + SLACK_SECONDS:
        problems.append(f"stood still for {still:.1f} s; the bound is {trial.bound:.1f} s")
    lost = tuple(name for name in trial.fleet.nodes if name not in done["nodes"])
    if trial.returns and lost:
        problems.append(f"{', '.join(lost)} did not come back")
    if trial.only_victims and not trial.victims.issuperset(lost):
        problems.append(
            f"{', '.join(sorted(set(lost) - trial.victims))} was lost, and nothing was done to it"
        )
    ended = [name for name in trial.survivors if not trial.fleet.nodes[name].alive]
    if ended:
        problems.append(f"the process of {', '.join(ended)} has ended")
    if done["sessions"]:
        problems.append(f"{done['sessions']} sessions left")
    return Outcome(
        trial.kind,
        equal,
        still,
        trial.bound,
        done["recoveries"],
        lost,
        time.monotonic() - start,
        tuple(problems),
        sum(not move["failure"] and not move["recovery"] for move in done["moves"]),
        f"{clock:.2f} {trial.kind} of {', '.join(sorted(trial.victims)) or 'the coordinator'}\n{words}",
    )


async def leaks(fleet: Fleet) -> list[str]:
    """What nodes that run have still after a trial: file descriptors and processes, and files of all."""
    with trio.move_on_after(SETTLE_SECONDS):
        while any(node.leaks() for node in fleet.nodes.values()):  # noqa: ASYNC110  of other processes
            await trio.sleep(0.05)
    found = []
    for node in fleet.nodes.values():
        if node.alive:
            node.rss.append(node.resident_bytes())
            if node.leaks():
                found.append(f"{node.name} has {node.open_files()} file descriptors, {node.fds} at first")
            if node.children():
                found.append(f"{node.name} has left the processes {node.children()}")
    found += [f"{path} was not there at first" for path in fleet.new_files()]
    return found
