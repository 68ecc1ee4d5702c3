"""Whether the planner is right, and how long it takes: `python -m bench.planner`.

Agreement: DP, MILP and brute force on random small problems (the tests' own problems and oracle). Orders: the
local search against all orders on random problems of 8 devices. Times: MILP, a re-plan by DP, the simulator.
`--part` runs one of them; `--problems` sizes the first two, and the MILP's.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import random
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType

from bench.simulator import Request, simulate

from shoal.arguments import positive
from shoal.planner import (
    Cluster,
    Device,
    LinkSpeed,
    ModelCosts,
    Plan,
    Question,
    Unit,
    Workload,
    milp,
    plan,
    search,
)
from shoal.planner.rows import OBJECTIVES
from shoal.planner.tables import Goal, goals, tables_of

PARTS = ("agreement", "orders", "prediction", "milp", "dp", "simulator")
SAME = 1e-6
NEAR = 1.03


def problem(seed: int, devices: int, layers: int) -> Question:
    """Phones, boards and laptops on one network: speeds over a factor of 30, caps that hold a part each,
    links from Wi-Fi's worst to a cable."""
    rng = random.Random(seed)
    size = 40_000_000
    layer = Unit("layer", size, size, size, 4096, 0, 8192, 1_000_000, 8192)
    table, head = 4 * size, 4 * size
    units = (
        Unit("embedding", table, 4096, 0, 0, 0, 8192, 1_000_000),
        *[layer] * layers,
        Unit("head", head, head, head, 0, 0, 4, 1_000_000),
    )
    whole = sum(unit.bytes for unit in units)
    rows = []
    for index in range(devices):
        read = 10 ** rng.uniform(9.3, 10.6)
        rows.append(
            Device(
                f"d{index}",
                int(whole * rng.uniform(0.3, 4.0) / devices) + 60_000_000,
                read,
                read * rng.uniform(3, 20),
                60_000_000,
                step_overhead_s=1e-4,
                idle_overhead_s=rng.uniform(0, 1e-3),
                row_rates=((1, read), (8, 6 * read), (64, 10 * read)),
                attend_macs_per_s=read,
                prefill_attend_macs_per_s=2 * read,
            )
        )
    names = ["head", *(row.name for row in rows)]
    links = {}
    for a in names:
        for b in names:
            if a != b:
                links[a, b] = LinkSpeed(10 ** rng.uniform(-3.5, -2), 10 ** rng.uniform(6, 8))
    cluster = Cluster(tuple(rows), links, "head")
    return Question(ModelCosts(units, table, 64), cluster, Workload(512, 4, 128, 4, 64))


def oracle() -> ModuleType:
    """The tests' module with the problems and brute force: an arithmetic of its own."""
    path = Path(__file__).resolve().parents[1] / "tests" / "planner" / "test_optimal.py"
    spec = importlib.util.spec_from_file_location("optimal", path)
    if spec is None or spec.loader is None:
        raise SystemExit(f"{path} is missing: run this in a checkout")
    module = importlib.util.module_from_spec(spec)
    sys.modules["optimal"] = module
    spec.loader.exec_module(module)
    return module


def agreement(problems: int) -> str:
    """DP and MILP against brute force, all orders free; the objectives in turn."""
    brute, solver = oracle(), milp.load_solver()
    worst, agree, feasible = 0.0, 0, 0
    for seed in range(problems):
        question = replace(brute.random_problem(100_000 + seed), objective=OBJECTIVES[seed % len(OBJECTIVES)])
        truth = brute.brute(question, any_order=True)
        devices = question.devices
        by_dp = by_milp = math.inf
        for goal in goals(question):
            tables = tables_of(question, goal)
            chain, _ = search.search_orders(tables, devices)
            by_dp = min(by_dp, brute.value(chain, question))
            quick = search.first_guess(tables, devices)
            chain, proved = milp.best_chain(tables, devices, solver, known=quick)
            by_milp = min(by_milp, brute.value(chain, question) if proved else -math.inf)
        feasible += truth < math.inf
        off = max(_off(by_dp, truth), _off(by_milp, truth))
        worst, agree = max(worst, off), agree + (off <= SAME)
    return (
        f"agreement of DP, MILP ({solver.name}) and brute force: {agree} of {problems} within {SAME:g} "
        f"(worst {worst:.1e}; {feasible} have a plan)"
    )


def _off(found: float, truth: float) -> float:
    if found == truth:
        return 0.0
    return abs(found / truth - 1) if 0 < truth < math.inf and 0 < found < math.inf else math.inf


def order_gap(problems: int) -> str:
    """Local search over orders of 8 devices against all orders."""
    gaps = {objective: [] for objective in ("latency", "throughput")}
    for seed in range(problems):
        goal = (Goal("latency"), Goal("throughput", 4))[seed % 2]
        tables, devices = tables_of(problem(seed, 8, 24), goal), list(range(8))
        exact, _ = search.search_orders(tables, devices)
        if exact is None:
            continue
        found, _ = search.search_orders(tables, devices, exact_devices=1)
        gaps[goal.objective].append(
            math.inf if found is None else search.value(tables, found) / search.value(tables, exact)
        )
    every = [gap for found in gaps.values() for gap in found]
    lines = [
        f"{name} {sum(gap <= NEAR for gap in found)} of {len(found)}, worst {max(found):.3f}"
        for name, found in gaps.items()
    ]
    share = sum(gap <= NEAR for gap in every) / len(every)
    return f"searched orders of 8 devices within 3 % of the best: {share:.1%} ({'; '.join(lines)})"


def milp_time(problems: int) -> str:
    """8 devices and 32 layers: the solver's part of one plan, with the search that bounds it."""
    solver = milp.load_solver()
    lines = []
    for goal in (Goal("latency"), Goal("throughput", 4)):
        times = []
        for seed in range(problems):
            tables, devices = tables_of(problem(seed, 8, 32), goal), range(8)
            start = time.perf_counter()
            quick = search.first_guess(tables, devices)
            _, proved = milp.best_chain(tables, devices, solver, known=quick)
            assert proved
            times.append(time.perf_counter() - start)
        lines.append(
            f"{goal.objective} median {statistics.median(times) * 1e3:.0f} ms, max {max(times) * 1e3:.0f}"
        )
    return f"MILP of 8 devices x 32 layers ({solver.name}), {problems} problems: {'; '.join(lines)}"


def dp_time(problems: int = 20) -> str:
    """A re-plan of 32 devices and 80 layers in a given order, tables included."""
    lines = []
    for goal in (Goal("latency"), Goal("throughput", 4)):
        times, tabling = [], []
        for seed in range(problems):
            case = problem(seed, 32, 80)
            start = time.perf_counter()
            tables = tables_of(case, goal)
            tabling.append(time.perf_counter() - start)
            search.best_chain(tables, lambda t: search.cheapest(t, range(32)))
            times.append(time.perf_counter() - start)
        lines.append(
            f"{goal.objective} median {statistics.median(times) * 1e3:.1f} ms, max {max(times) * 1e3:.1f} "
            f"(tables {statistics.median(tabling) * 1e3:.1f})"
        )
    return f"re-plan by DP of 32 devices x 80 layers: {'; '.join(lines)}"


def prediction(problems: int = 60) -> str:
    """Plans' tokens/s against the simulator's, for one stream and several, on 4 devices."""
    lines = []
    for streams in (1, 2, 4, 8):
        off = []
        for seed in range(problems):
            question = problem(seed, 4, 24)
            load = replace(
                question.workload, streams=streams, sequences=max(streams, 4), prompt_tokens=1, depth=150
            )
            objective = "latency" if streams == 1 else "throughput"
            question = replace(question, workload=load, objective=objective)
            found = plan(question, explain=False)
            if isinstance(found, Plan):
                run = simulate(question, found.stages, [Request(0.0, 1, 300)] * streams)
                off.append(found.tokens_per_s / run.tokens_per_s - 1)
        median, worst = statistics.median(off), max(off, key=abs)
        lines.append(f"{streams}: median {median:+.1%}, worst {worst:+.1%}")
    return f"predicted against simulated tokens/s, by streams: {'; '.join(lines)}"


def main() -> None:
    """Prints a line for each part."""
    parser = argparse.ArgumentParser(prog="python -m bench.planner")
    parser.add_argument("--part", choices=PARTS, action="append")
    parser.add_argument(
        "--problems", type=positive, help="of a part (default: 2000, 200, and 40 of the MILP)"
    )
    args = parser.parse_args()
    problems = args.problems
    for part in args.part or PARTS:
        if part == "agreement":
            print(agreement(problems or 2000), flush=True)
        elif part == "orders":
            print(order_gap(problems or 200), flush=True)
        elif part == "prediction":
            print(prediction(), flush=True)
        elif part == "milp":
            print(milp_time(problems or 40), flush=True)
        elif part == "dp":
            print(dp_time(), flush=True)
        else:
            from bench.simulate import main as simulate_many

            sys.argv = sys.argv[:1]
            simulate_many()


if __name__ == "__main__":
    main()
