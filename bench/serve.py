"""What the HTTP server costs over `shoal.LLM`: one stream, and many at once, in turns with and without it.

    python -m bench.serve [MODEL] [--clients 1,8,32] [--nodes 3] [--turns 5] [--tokens 96]

One stream is compared with a stream of the library, and many with a list of prompts, which is the most that
the engine gives: in this process, or with --nodes over node processes on this machine. The clients are one
process beside the server's. Printed are medians over the turns: wall seconds of both, and CPU seconds of the
server's process, which say more on a machine that does other work; and what clients waited for their first
token."""

from __future__ import annotations

import argparse
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import trio
from bench.asking import Asker, Timing, asker
from bench.models import model_path

import shoal
from shoal import planner
from shoal.engine.model_directory import Model
from shoal.nodes import open_nodes
from shoal.portal import open_portal
from shoal.processes import NodeSpec, nodes
from shoal.server.app import Options, serve_app
from shoal.server.http import Server
from shoal.server.opening import open_listeners

_CONTEXT = 256
_NODE_MB = 220
"""What a node may use: two could not hold SmolLM2-135M and 32 answers."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.serve", description=__doc__)
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--clients", default="1,8,32", metavar="N,...", help="(default 1,8,32)")
    parser.add_argument("--nodes", type=int, default=0, metavar="N", help="over N nodes (default: none)")
    parser.add_argument("--node-mb", type=int, default=_NODE_MB, help=f"RAM of a node (default {_NODE_MB})")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=96)
    args = parser.parse_args()
    counts = [int(part) for part in args.clients.split(",")]
    with opened(args, max(counts)) as llm:
        (listener,) = listeners = open_listeners("127.0.0.1", 0)
        app = serve_app(llm._engine, llm.model, llm.context, Options(slots=max(counts)))
        port = listener.socket.getsockname()[1]
        with open_portal(lambda: serving(app, listeners)), asker(port, "/v1/completions") as ask:
            for count in counts:
                compare(llm, ask, count, args.turns, args.tokens)


@contextmanager
def opened(args: argparse.Namespace, most: int) -> Iterator[shoal.LLM]:
    """The model with room for `most` answers, here or on nodes. Prompts are not shared, so that each
    turn computes as much."""
    if not args.nodes:
        with shoal.LLM(args.model, context=_CONTEXT, share_prefixes=False) as llm:
            yield llm
        return
    model = Model.open(model_path(args.model))
    specs = [NodeSpec(f"n{i}", ram_mb=args.node_mb) for i in range(args.nodes)]
    with TemporaryDirectory() as directory, nodes(model.path, specs, Path(directory)) as running:
        load = planner.Workload(_CONTEXT, most, streams=most)
        addresses = [node.address for node in running]
        with open_nodes(model, addresses, load, moves="off", share_prefixes=False) as engine:
            held = ", ".join(f"{one.device} {one.first}-{one.last - 1}" for one in engine.plan.stages)
            print(f"units on nodes: {held}", flush=True)
            yield shoal.LLM.over(model, engine, engine.context)


@asynccontextmanager
async def serving(app: Any, listeners: Any) -> AsyncIterator[None]:
    """A server that runs within the block."""
    server = Server(app)
    async with trio.open_nursery() as nursery:
        await nursery.start(server.serve, listeners)
        yield
        server.drain()


def compare(llm: shoal.LLM, ask: Asker, count: int, turns: int, tokens: int) -> None:
    """Prints what `count` answers at once take, by the library and over HTTP."""
    prompts = [f"Tell me story number {i} about the sea." for i in range(count)]
    options: Any = {"max_tokens": tokens, "logit_bias": dict.fromkeys(llm.model.config.eos, -100.0)}
    more = {"temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
    bodies = [{"prompt": prompt, **more, **options} for prompt in prompts]
    waits: list[float] = []

    def library() -> None:
        made = (
            llm.generate(prompts, **options)
            if count > 1
            else list(llm.generate(*prompts, stream=True, **options))
        )
        assert len(made) == count or count == 1

    def server() -> None:
        waits.append(_worst(ask(bodies), tokens))

    taken: dict[str, list[tuple[float, float]]] = {"library": [], "server": []}
    for turn in range(turns + 1):
        for name, work in (("library", library), ("server", server)):
            wall, cpu = time.perf_counter(), time.process_time()
            work()
            if turn:  # the first one warms up
                taken[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    for i, kind in enumerate(("wall", "CPU")):
        one, other = (median(pair[i] for pair in taken[name]) for name in taken)
        ratios = sorted(b[i] / a[i] for a, b in zip(taken["library"], taken["server"], strict=True))
        spread = f"ratio {median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})"
        each = f"{1e6 * (other - one) / (count * tokens):.0f} us a token"
        print(f"{count:3} at once, {kind:4}: {one:.3f} s, {other:.3f} s, {spread}, {each}", flush=True)
    if count > 1:
        print(
            f"{count:3} at once, first token: the last client's over the median {median(waits[1:]):.2f}",
            flush=True,
        )


def _worst(found: Sequence[Timing], tokens: int) -> float:
    """The longest wait for a first token over the median one."""
    assert all(one.tokens == tokens for one in found)
    firsts = [one.first for one in found]
    return max(firsts) / median(firsts)


if __name__ == "__main__":
    main()
