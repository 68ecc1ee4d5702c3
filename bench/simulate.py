"""How long the simulator takes for a cluster that no desk holds: `python -m bench.simulate`.

A chain of many devices, one layer each, answers many requests that come faster than it can serve them.
"""

from __future__ import annotations

import argparse
import random
import time
from itertools import pairwise

from bench.simulator import Event, Rules, random_requests, simulate

from shoal.arguments import positive
from shoal.engine.layout import PAGE
from shoal.planner import Assignment, Cluster, Device, LinkSpeed, ModelCosts, Question, Unit, Workload


def chain(devices: int, seed: int) -> tuple[Question, list[Assignment]]:
    """A model with layers of a 70B one (int4), a device per unit, all of their own speed, on Wi-Fi."""
    rng = random.Random(seed)
    layer = Unit("layer", 480_000_000, 480_000_000, 855_000_000, 4096, 0, 32768, attend_macs=16384)
    table = Unit("embedding", 590_000_000, 4608, 0, 0, 0, 32768)
    head = Unit("head", 590_000_000, 590_000_000, 1_050_000_000, 0, 0, 4)
    model = ModelCosts((table, *[layer] * (devices - 2), head), kv_page_tokens=PAGE)
    rows = tuple(
        Device(
            f"d{i}",
            2_000_000_000,
            10 ** rng.uniform(9.7, 10.4),
            10 ** rng.uniform(10.5, 11.5),
            step_overhead_s=1e-4,
            idle_overhead_s=5e-4,
            attend_macs_per_s=2e9,
            prefill_attend_macs_per_s=5e9,
        )
        for i in range(devices)
    )
    names = ["head", *(row.name for row in rows)]
    links = {}
    for a, b in [*pairwise(names), (names[-1], names[0])]:
        links[a, b] = LinkSpeed(rng.uniform(0.001, 0.008), rng.uniform(5e6, 40e6))
    question = Question(model, Cluster(rows, links, "head"), Workload(512))
    return question, [Assignment(row.name, i, i + 1) for i, row in enumerate(rows)]


def main() -> None:
    """Prints one line of figures."""
    parser = argparse.ArgumentParser(prog="python -m bench.simulate")
    parser.add_argument("--devices", type=positive, default=256)
    parser.add_argument("--requests", type=positive, default=1000)
    parser.add_argument("--prompt", type=positive, default=128)
    parser.add_argument("--answer", type=positive, default=64)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.devices < 2:
        parser.error("--devices: two at least, for the embedding and for the head")
    question, stages = chain(args.devices, args.seed)
    lengths = [(max(1, mean // 2), mean * 3 // 2) for mean in (args.prompt, args.answer)]
    requests = random_requests(args.seed, args.requests, 5.0, *lengths)
    hot = [Event(30.0, question.cluster.devices[args.devices // 2].name, "slow", 2.5)]
    start = time.perf_counter()
    found = simulate(question, stages, requests, hot, Rules())
    seconds = time.perf_counter() - start
    print(
        f"{args.devices} devices x {args.requests} requests: {seconds:.1f} s for {found.seconds:.0f} s "
        f"of the cluster's; {found.tokens} tokens, {found.tokens_per_s:.1f} tokens/s, {found.calls} calls"
    )


if __name__ == "__main__":
    main()
