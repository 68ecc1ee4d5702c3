"""RAM promised and taken: `python -m bench.lab.promise RESULTS.json [--plans 50]`.

Random devices with random caps in a lab, and random plans that the planner's own sum (weights, state,
workspace, the process itself) finds feasible there. Before each plan runs, every node's cgroup is capped at
that sum; then all its sequences fill their contexts, twice. What stands in RESULTS.json is not done again;
with `--seconds` no lab is opened after so many. As root on Linux.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import trio
from bench.models import model_path

from shoal import planner
from shoal.cluster_view import coordinator_identity, survey_cluster
from shoal.engine.errors import ShoalError
from shoal.engine.model_directory import Model
from shoal.engine.stage import StageOptions
from shoal.net.coordinator import Coordinator, CoordinatorOptions
from shoal.net.identity import shape_of
from shoal.net.placement import Links, NodeInfo, Placement
from shoal.planner.cost import range_ram_bytes
from shoal.planning import MB, planner_model
from shoal.processes import bare_node_bytes

from .lab import Lab, LabNode
from .results import Results
from .spec import DeviceSpec, LabSpec, LinkSpec

MODELS = {
    "smollm2-135m": ((1, 4), (272, 768)),
    "smollm2-135m-int4": ((1, 4), (272, 768)),
    "llama-1.1b-random/int8": ((1, 2), (272, 400)),
    "llama-1.1b-random/int4": ((1, 2), (272, 400)),
}
"""Sequences and context, from and to. Each prompt has a chunk of the most rows, which fills the workspace."""
PLANS_PER_LAB = 5
NEAR = 0.10
SLACK = 8 * MB
"""What a node may hold beside its base once a stage has ended."""
_ANSWER = 8
_CHUNK_ROWS = 256


def devices(rng: random.Random, rows: planner.ModelCosts, bare: int, workload: planner.Workload) -> LabSpec:
    """2 to 4 devices whose caps hold the model together, with up to half as much room again."""
    count = rng.randint(2, 4)
    whole = sum(
        unit.bytes + unit.kv_bytes_per_token * workload.context * workload.sequences for unit in rows.units
    )
    shares = [rng.uniform(0.3, 1.0) for _ in range(count)]
    room = rng.uniform(1.15, 1.5) * whole
    fixed = bare + max(unit.workspace_bytes for unit in rows.units) + 2 * MB
    caps = [-(-int(fixed + room * share / sum(shares)) // MB) for share in shares]
    names = ("a", "b", "c", "d")
    return LabSpec(tuple(DeviceSpec(names[i], 0.4, LinkSpec(), cap_mb=cap) for i, cap in enumerate(caps)))


def feasible(
    rng: random.Random, rows: planner.ModelCosts, cluster: planner.Cluster, workload: planner.Workload
) -> list[planner.Assignment]:
    """A random plan: some of the devices in some order, cut anywhere, within all caps."""
    units = len(rows.units)
    while True:
        chosen = rng.sample(cluster.devices, rng.randint(1, len(cluster.devices)))
        cuts = [0, *sorted(rng.sample(range(1, units), len(chosen) - 1)), units]
        stages = [planner.Assignment(d.name, a, b) for d, a, b in zip(chosen, cuts, cuts[1:], strict=False)]
        if all(
            range_ram_bytes(rows, device, workload, stage.first, stage.last) <= device.ram_bytes
            for device, stage in zip(chosen, stages, strict=True)
        ):
            return stages


async def fill(
    lab: Lab, model: Model, stages: Sequence[planner.Assignment], workload: planner.Workload
) -> dict[str, int]:
    """All sequences at once to the end of their contexts, twice; major faults of each node in the second
    pass, by name."""

    def fixed(nodes: Sequence[NodeInfo], links: Links) -> Placement:
        return Placement(tuple(stages), _CHUNK_ROWS)

    options = CoordinatorOptions(measure_links=False, share_prefixes=False)
    async with Coordinator.open(
        lab.addresses, coordinator_identity(model, insecure=True), shape_of(model), fixed, options
    ) as coordinator:

        async def answer(seed: int) -> None:
            rng = random.Random(seed)
            prompt = [rng.randrange(3, model.program.vocab) for _ in range(workload.context - _ANSWER)]
            session = coordinator.generate(prompt, max_tokens=_ANSWER, context=workload.context)
            async with session as tokens:
                async for _ in tokens:
                    pass

        async def once() -> None:
            async with trio.open_nursery() as nursery:
                for i in range(workload.sequences):
                    nursery.start_soon(answer, i)

        await once()
        before = {node.spec.name: node.major_faults() for node in lab.nodes}
        await once()
        return {node.spec.name: node.major_faults() - before[node.spec.name] for node in lab.nodes}


def lab_of(seed: int) -> dict[str, Any]:
    """A random lab's plans: for each stage what was promised and what was taken."""
    rng = random.Random(seed)
    name = rng.choice(list(MODELS))
    model = Model.open(model_path(name))
    rows, bare = planner_model(model, StageOptions()), bare_node_bytes(model.path)
    sequences, contexts = MODELS[name]
    workload = planner.Workload(rng.randint(*contexts), sequences=rng.randint(*sequences))
    with Lab.open(devices(rng, rows, bare, workload), model.path) as lab:
        cluster = survey_cluster(model, lab.addresses, insecure=True)
        plans = [
            _taken(lab, model, rows, cluster, workload, feasible(rng, rows, cluster, workload))
            for _ in range(PLANS_PER_LAB)
        ]
    return {"model": name, "context": workload.context, "sequences": workload.sequences, "plans": plans}


def _taken(
    lab: Lab,
    model: Model,
    rows: planner.ModelCosts,
    cluster: planner.Cluster,
    workload: planner.Workload,
    stages: Sequence[planner.Assignment],
) -> list[dict[str, Any]]:
    promised = {}
    for stage in stages:
        device, node = cluster.device(stage.device), lab.node(stage.device)
        _settled(node, device)
        promised[stage.device] = range_ram_bytes(rows, device, workload, stage.first, stage.last)
        node.forget_peaks()
        node.cap(-(-promised[stage.device] // MB))
    faults = trio.run(fill, lab, model, stages, workload)
    taken = []
    for stage in stages:
        node = lab.node(stage.device)
        taken.append(
            {
                "device": stage.device,
                "units": [stage.first, stage.last],
                "base": cluster.device(stage.device).base_bytes,
                "promised": promised[stage.device],
                "resident": node.status("VmHWM"),
                "cgroup": node.peak_bytes(),
                "failcnt": node.failcnt(),
                "faults": faults[stage.device],
                "alive": node.process.poll() is None,
            }
        )
        assert node.cap_mb is not None
        node.cap(node.cap_mb)
    return taken


def _settled(node: LabNode, device: planner.Device) -> None:
    """Waits until a node has let go of the plan before."""
    until = time.monotonic() + 10
    while node.status("VmRSS") > device.base_bytes + SLACK:
        if time.monotonic() > until:
            raise ShoalError(f"{node.spec.name} holds {node.status('VmRSS') / MB:.0f} MB without any stage")
        time.sleep(0.05)


def render(labs: dict[str, Any], plans: int) -> str:
    """What the first so many plans say all together."""
    found = [plan for record in labs.values() for plan in record["plans"]][:plans]
    stages = [stage for plan in found for stage in plan]
    if not stages:
        return "no plan has run"
    off = sorted(stage["resident"] / stage["promised"] - 1 for stage in stages)
    near = sum(abs(value) <= NEAR for value in off)
    at_cap = [stage["failcnt"] for stage in stages]
    groups = [stage["cgroup"] / stage["promised"] - 1 for stage in stages]
    killed, faults = sum(not stage["alive"] for stage in stages), sum(stage["faults"] for stage in stages)
    return f"""{len(found)} plans, {len(stages)} stages, {killed} nodes killed
times at the cap: {sum(at_cap)}, in {sum(count > 0 for count in at_cap)} stages
major faults after the first pass: {faults}
resident peak against the promise: {off[0]:+.1%} to {off[-1]:+.1%}, within {NEAR:.0%} in {near} of {len(off)}
peak of the cgroup against the promise: {min(groups):+.1%} to {max(groups):+.1%}"""


def main(arguments: Sequence[str]) -> int:
    """Exit code 0 when all plans are there."""
    parser = argparse.ArgumentParser(prog="python -m bench.lab.promise", description=__doc__)
    parser.add_argument("results", type=Path, help="a JSON file, read and added to")
    parser.add_argument("--plans", type=int, default=50, help="random plans (default 50)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="open no lab after so many")
    args = parser.parse_args(arguments)
    results, start = Results(args.results), time.monotonic()
    needed = [str(seed) for seed in range(-(-args.plans // PLANS_PER_LAB))]
    for seed in needed:
        if time.monotonic() - start > args.seconds:
            break
        results.once(seed, partial(lab_of, int(seed)))
    print(render(results.rows, args.plans))
    return 0 if all(seed in results.rows for seed in needed) else 1


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ShoalError as error:
        sys.exit(f"bench.lab.promise: {error}")
