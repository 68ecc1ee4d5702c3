"""A coordinator in a process of its own, whose answers are printed as they arrive.

    python -m bench.chaos.head JOB

JOB is a JSON object (`Job`). Lines of JSON on standard output: {"chain": [NAME, ...]} when it changes,
{"stream": I, "token": ID} for each token, {"done": ...} at the end. The exit code is that of the error. When
as many tokens as `moves` says have come, layers are moved to random stages on random nodes.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import trio

from shoal.cluster_view import coordinator_identity
from shoal.engine.batch import Sampling
from shoal.engine.errors import NoPlanError, ShoalError
from shoal.engine.model_directory import Model
from shoal.net.coordinator import Coordinator, CoordinatorOptions
from shoal.net.identity import shape_of
from shoal.net.placement import Links, NodeInfo, Placement
from shoal.planner import Assignment

STAGES = 3
"""Nodes of a chain; the others are spare."""
LOOK_SECONDS = 0.01


@dataclass(frozen=True, slots=True)
class Ask:
    """One answer: its prompt, its length, and its seed (None: the most probable tokens)."""

    prompt: list[int]
    tokens: int
    seed: int | None

    @property
    def sampling(self) -> Sampling:
        return Sampling() if self.seed is None else Sampling(temperature=0.8, seed=self.seed)


@dataclass(frozen=True, slots=True)
class Job:
    """What the coordinator is to do. `linger`: after the answers it waits for so many seconds until all nodes
    are members again. `moves`: the numbers of tokens of all answers at which layers move, and `seed` chooses
    where they move to."""

    model: str
    addresses: list[tuple[str, int]]
    asks: list[Ask]
    linger: float = 0.0
    moves: list[int] = field(default_factory=list)
    seed: int = 0

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Job:
        body = json.loads(text)
        addresses = [(host, port) for host, port in body["addresses"]]
        asks = [Ask(**ask) for ask in body["asks"]]
        return cls(body["model"], addresses, asks, body["linger"], body["moves"], body["seed"])


def spread(units: int, nodes: Sequence[NodeInfo], links: Links) -> Placement:
    """Equal ranges on the first STAGES nodes. A planner would put a small model on one node."""
    if not nodes:
        raise NoPlanError("no node is left")
    count = min(STAGES, len(nodes))
    edges = [units * i // count for i in range(count + 1)]
    ranges = zip(nodes, edges, edges[1:], strict=False)
    return Placement(tuple(Assignment(node.label, first, last) for node, first, last in ranges), 8)


def anywhere(rng: random.Random, units: int, names: Sequence[str]) -> tuple[Assignment, ...]:
    """Stages on at most STAGES of these nodes, in any order, with any cuts."""
    chosen = rng.sample(names, rng.randint(1, min(STAGES, len(names), units)))
    edges = [0, *sorted(rng.sample(range(1, units), len(chosen) - 1)), units]
    ranges = zip(chosen, edges, edges[1:], strict=False)
    return tuple(Assignment(name, first, last) for name, first, last in ranges)


def say(**line: Any) -> None:
    print(json.dumps(line), flush=True)


async def serve(job: Job) -> None:
    model = Model.open(job.model)

    def log(text: str) -> None:
        print(f"{time.monotonic():.2f} {text}", file=sys.stderr, flush=True)

    options = CoordinatorOptions(measure_links=False, moves="move", log=log)
    async with Coordinator.open(
        job.addresses,
        coordinator_identity(model),
        shape_of(model),
        partial(spread, model.n_units),
        options,
    ) as coordinator:

        async def follow() -> None:
            told: list[str] = []
            while True:
                chain = [stage.device for stage in coordinator.placement.stages]
                if chain != told:
                    told = chain
                    say(chain=told)
                await trio.sleep(LOOK_SECONDS)

        rng, due, said = random.Random(job.seed), sorted(job.moves), 0

        async def answer(stream: int, ask: Ask) -> None:
            nonlocal said
            async with coordinator.generate(ask.prompt, ask.sampling, max_tokens=ask.tokens) as tokens:
                async for token in tokens:
                    say(stream=stream, token=token)
                    said += 1
                    while due and due[0] <= said:
                        del due[0]
                        names = [node.label for node in coordinator.nodes]
                        coordinator.move(anywhere(rng, model.n_units, names), "chaos asks for it")

        async with trio.open_nursery() as following:
            following.start_soon(follow)
            async with trio.open_nursery() as tasks:
                for stream, ask in enumerate(job.asks):
                    tasks.start_soon(answer, stream, ask)
            following.cancel_scope.cancel()
        with trio.move_on_after(job.linger):
            while len(coordinator.nodes) < len(job.addresses):  # noqa: ASYNC110  it has no event for this
                await trio.sleep(0.05)
        coordinator.free_idle()  # complete answers leave their state to others
        await trio.sleep(0.05)  # Close messages are on their way
        left = len((await coordinator.chain()).sessions)
        nodes = [node.label for node in coordinator.nodes]
        moves = [asdict(move.moved) for move in coordinator.moves]
        say(done=True, recoveries=coordinator.recoveries, nodes=nodes, sessions=left, moves=moves)


def main(job: str) -> int:
    """The exit code."""
    try:
        trio.run(serve, Job.from_json(job))
    except BaseException as error:
        found = error
        while isinstance(found, BaseExceptionGroup):
            found = found.exceptions[0]
        if not isinstance(found, ShoalError):
            raise
        print(f"{type(found).__name__}: {found}", file=sys.stderr)
        return found.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
