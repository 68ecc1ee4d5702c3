"""The time of a token's lap beside the stages' computing, over two nodes and a coordinator on loopback, and
the share of a core that a node uses while it has nothing to do, and its memory:

    python -m bench.lap [MODEL] [--nodes 2] [--tokens 256] [--lab] [--tls] [--against DIRECTORY]

A lap lasts from the start of a call of the first stage to the start of its next call. The nodes log the start
and the end of each call by one clock, so the time beside computing is known for each lap: the ways from stage
to stage, and the way back through the coordinator."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from bench.chain import Chain, ChainNode, Expected, chains, in_turns, opened, parser, tokens_per_s
from bench.chain_worker import cpu_seconds
from bench.rounds import Samples

PROMPT, WARM = 16, 16
_REST_SECONDS = 10.0
_AT_START_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Lap:
    """Seconds of one lap: in the stages' calls, on the ways from a stage to the next, and from the last stage
    through the coordinator to the first."""

    compute: float
    ways: tuple[float, ...]
    back: float

    @property
    def beside(self) -> float:
        """All but computing."""
        return sum(self.ways) + self.back


Call = tuple[float, float, int, int]


def laps(calls: Sequence[Sequence[Call]]) -> list[Lap]:
    """The laps of one stream, from the calls of each stage: those with one row, at positions that every stage
    has seen, after the first WARM. ValueError: there are none."""
    decoded = [{first: (start, end) for start, end, rows, first in own if rows == 1} for own in calls]
    there = sorted(set.intersection(*(set(own) for own in decoded)))
    found = []
    for position in there[WARM:]:
        following = decoded[0].get(position + 1)
        if following is None:
            continue
        spans = [own[position] for own in decoded]
        ways = tuple(later[0] - sooner[1] for sooner, later in pairwise(spans))
        found.append(Lap(sum(end - start for start, end in spans), ways, following[0] - spans[-1][1]))
    if not found:
        raise ValueError("no lap was logged")
    return found


def percentile(values: Sequence[float], share: float) -> float:
    """The least value that is above this share of all values."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def at_rest(nodes: Sequence[ChainNode], seconds: float) -> float:
    """The share of a core that the busiest of the nodes uses during `seconds`."""
    before = [cpu_seconds(node.process.pid) for node in nodes]
    time.sleep(seconds)
    after = [cpu_seconds(node.process.pid) for node in nodes]
    return max(a - b for a, b in zip(after, before, strict=True)) / seconds


def own_mb(pid: int) -> float:
    """The memory of a process that is not of files, such as weights."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) * 1024 / 1e6


def main(arguments: Sequence[str] | None = None) -> int:
    made = parser("lap", __doc__ or "")
    made.add_argument("--nodes", type=int, default=2, metavar="N", help="(default 2)")
    made.add_argument(
        "--tokens", type=int, default=256, metavar="N", help="tokens of an answer (default 256)"
    )
    made.add_argument("--lab", action="store_true", help="in network namespaces of bench/lab, as root")
    args = made.parse_args(arguments)
    model, checkouts = opened(args)
    samples, expected = Samples(), Expected(checkouts[0], model, PROMPT)

    def measure(chain: Chain, number: int) -> None:
        name, nodes = chain.checkout.name, chain.nodes[: args.nodes]
        before = [len(node.calls()) for node in nodes]
        job = {"streams": 1, "prompt": PROMPT, "tokens": args.tokens, "context": PROMPT + args.tokens}
        found = chain.head(args.nodes, "decode", **job)
        expected.check(found["tokens"])
        seen = laps([node.calls()[skip:] for node, skip in zip(nodes, before, strict=True)])
        for share in (0.5, 0.95):
            beside = percentile([lap.beside for lap in seen], share)
            samples.add(f"beside computing, ms, p{share * 100:.0f}", name, number, beside * 1e3)
        parts = {
            "computing": [lap.compute for lap in seen],
            "a way from stage to stage": [way for lap in seen for way in lap.ways],
            "the way back": [lap.back for lap in seen],
        }
        for what, values in parts.items():
            if values:
                samples.add(f"{what}, ms, p50", name, number, statistics.median(values) * 1e3)
        samples.add("tokens/s", name, number, tokens_per_s(found["times"][0][WARM:]))

    with chains(checkouts, model, args.nodes, in_lab=args.lab) as running:
        in_turns(args.rounds, [lambda number, chain=chain: measure(chain, number) for chain in running])
        for chain in running:
            name = chain.checkout.name
            time.sleep(_AT_START_SECONDS)
            share = at_rest(chain.nodes, _REST_SECONDS)
            samples.add("a node without coordinator, % of a core", name, 0, share * 100)
            rest = chain.head(
                args.nodes, "rest", seconds=_REST_SECONDS, pids=chain.pids(args.nodes), context=64
            )
            samples.add("a node of an idle chain, % of a core", name, 0, max(rest["cpu"]) * 100)
            memory = [own_mb(node.process.pid) for node in chain.nodes[: args.nodes]]
            samples.add("a node's own memory, MB", name, 0, max(memory))
    print(f"\n{samples.report('this')}")
    samples.save(args.output, {"command": "bench.lap", "model_hash": model.hash, "nodes": args.nodes})
    return 0


if __name__ == "__main__":
    sys.exit(main())
