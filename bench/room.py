"""More prompts than keys and values have room for: `python -m bench.room [smollm2-135m]`.

Two nodes on this machine, of which the second is slower. Each promises RAM for its layers and for the keys
and values of `--sequences` prompts; then `--prompts` prompts arrive at once. All answers are compared with
those of one process, and the resident peak of each node with what it promised.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import trio
from bench.models import model_path

from shoal import planner
from shoal.cluster_view import coordinator_identity
from shoal.engine.errors import ShoalError
from shoal.engine.generate import generate
from shoal.engine.model_directory import Model
from shoal.engine.stage import Stage, StageOptions
from shoal.net.coordinator import Coordinator, CoordinatorOptions
from shoal.net.identity import shape_of
from shoal.net.placement import plan_at
from shoal.planner.cost import range_ram_bytes
from shoal.planning import MB, planner_model, scratch_bytes
from shoal.processes import NodeSpec, RunningNode, bare_node_bytes, nodes


def promises(model: Model, cuts: Sequence[int], workload: planner.Workload) -> list[int]:
    """The MB that the nodes of a chain need for a workload, one thread each."""
    base = bare_node_bytes(model.path) + scratch_bytes(model, 1)
    rows = planner_model(model, StageOptions())
    device = planner.Device("any", 1, 1.0, 1.0, base)
    stages = pairwise(cuts)
    return [-(-range_ram_bytes(rows, device, workload, *stage) // MB) + 1 for stage in stages]


async def ask(
    model: Model,
    started: Sequence[RunningNode],
    cuts: Sequence[int],
    prompts: Sequence[list[int]],
    count: int,
) -> tuple[list[list[int] | ShoalError], float]:
    """The answers of a chain, or why there is none, and the seconds that all took."""
    answers: list[list[int] | ShoalError] = [[] for _ in prompts]
    options = CoordinatorOptions(measure_links=False, share_prefixes=False)
    addresses = [node.address for node in started]
    async with Coordinator.open(
        addresses, coordinator_identity(model), shape_of(model), plan_at(cuts, 256), options
    ) as coordinator:

        async def one(i: int) -> None:
            try:
                async with coordinator.generate(prompts[i], max_tokens=count) as tokens:
                    answers[i] = [token async for token in tokens]
            except ShoalError as error:
                answers[i] = error

        start = time.monotonic()
        async with trio.open_nursery() as tasks:
            for i in range(len(prompts)):
                tasks.start_soon(one, i)
        return answers, time.monotonic() - start


def peak(node: RunningNode) -> int:
    """The most bytes that a node has held."""
    status = Path(f"/proc/{node.process.pid}/status").read_text()
    found = re.search(r"VmHWM:\s*(\d+) kB", status)
    assert found is not None
    return int(found[1]) * 1024


def main(arguments: Sequence[str]) -> int:
    """Exit code 0 when every answer is that of one process, and no node held more than it promised."""
    parser = argparse.ArgumentParser(prog="python -m bench.room", description=__doc__)
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=1200, help="tokens of a prompt (default 1200)")
    parser.add_argument("--answer", type=int, default=16, help="tokens of an answer (default 16)")
    parser.add_argument(
        "--sequences", type=int, default=4, help="prompts for which there is room (default 4)"
    )
    parser.add_argument("--slow", type=float, default=1.5, help="how slow the second node is (default 1.5)")
    args = parser.parse_args(arguments)
    model = Model.open(model_path(args.model))
    cuts = [0, model.n_units // 2, model.n_units]
    mb = promises(model, cuts, planner.Workload(args.tokens, sequences=args.sequences))
    specs = [NodeSpec("a", mb[0]), NodeSpec("b", mb[1], slow=args.slow)]
    rng = random.Random(1)
    prompts = [
        [rng.randrange(3, model.program.vocab) for _ in range(args.tokens)] for _ in range(args.prompts)
    ]
    with tempfile.TemporaryDirectory() as directory, nodes(model.path, specs, Path(directory)) as started:
        answers, seconds = trio.run(ask, model, started, cuts, prompts, args.answer)
        held = [peak(node) for node in started]
    with Stage(model, 0, model.n_units) as stage:
        expected = [list(generate(stage, prompt, max_tokens=args.answer, end=())) for prompt in prompts]
    equal = sum(answer == right for answer, right in zip(answers, expected, strict=True))
    print(f"{equal} of {args.prompts} answers equal those of one process, in {seconds:.1f} s")
    for error in sorted({str(answer) for answer in answers if isinstance(answer, ShoalError)}):
        print(f"failed: {error}")
    for spec, most in zip(specs, held, strict=True):
        print(f"{spec.name}: promised {spec.ram_mb} MB, held {most / MB:.1f} MB at most")
    kept = all(most <= spec.ram_mb * MB for spec, most in zip(specs, held, strict=True))
    return 0 if kept and equal == args.prompts else 1


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ShoalError as error:
        sys.exit(f"bench.room: {error}")
