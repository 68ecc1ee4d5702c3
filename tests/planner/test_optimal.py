"""The searches find the optimum: DP, MILP and brute force agree on random small problems.

Brute force is the oracle: every order of every subset of devices, every cut, with its own arithmetic from the
rows (nothing of planner.cost or planner.tables), so a wrong formula cannot hide in both.
"""

import itertools
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest

from shoal.planner import milp, search
from shoal.planner.evaluation import Infeasible, Plan
from shoal.planner.rows import (
    OBJECTIVES,
    Assignment,
    Cluster,
    Device,
    LinkSpeed,
    ModelCosts,
    Objective,
    Question,
    Unit,
    Workload,
)
from shoal.planner.search import Chain
from shoal.planner.solve import plan
from shoal.planner.tables import Goal, TimeTables, goals, tables_of

SAME = 1e-6
EVERYTHING = frozenset(range(100))


def brute_matmuls(device: Device, rows: int, macs: int) -> float:
    if not device.row_rates:
        return rows * macs / device.macs_per_s
    counts = [count for count, _ in device.row_rates]
    times = [count / rate for count, rate in device.row_rates]
    if rows <= counts[0]:
        return macs * times[0] * rows / counts[0]
    if rows >= counts[-1]:
        return macs * times[-1] * rows / counts[-1]
    return macs * float(np.interp(rows, counts, times))


def brute_decode_seconds(question: Question, device: Device, first: int, last: int, batch: int) -> float:
    model, load = question.model, question.workload
    depth = (load.prompt_tokens + load.context) // 2 if load.depth is None else load.depth
    total = device.step_overhead_s
    for unit in model.units[first:last]:
        weights = min(batch * unit.read_bytes, unit.bytes) / device.read_bytes_per_s
        total += max(weights, brute_matmuls(device, batch, unit.macs))
        total += batch * brute_row_attends(unit, device, depth)
    return total


def brute_row_attends(unit: Unit, device: Device, depth: int) -> float:
    """State of a fixed size is read beside what attention takes."""
    grown = depth * unit.kv_bytes_per_token / device.read_bytes_per_s
    fixed = unit.fixed_state_bytes / device.read_bytes_per_s
    return fixed + max(grown, depth * unit.attend_macs / device.attend_macs_per_s)


def brute_chunk_seconds(question: Question, device: Device, first: int, last: int) -> float:
    """The mean chunk of the prompt, the LM head apart."""
    model, load = question.model, question.workload
    total, count = 0.0, 0
    for position in range(0, load.prompt_tokens, load.chunk_tokens):
        count += 1
        rows = min(load.chunk_tokens, load.prompt_tokens - position)
        for unit in model.units[first : min(last, len(model.units) - 1)]:
            total += brute_rows_seconds(unit, device, rows, position)
    return device.step_overhead_s + total / count


def brute_rows_seconds(unit: Unit, device: Device, rows: int, position: int) -> float:
    """A chunk; of one row, it is a row like a decoded one."""
    weights = min(rows * unit.read_bytes, unit.bytes) / device.read_bytes_per_s
    matmuls = max(weights, brute_matmuls(device, rows, unit.macs))
    if rows == 1:
        return matmuls + brute_row_attends(unit, device, position)
    grown = (position + rows) * unit.kv_bytes_per_token / device.read_bytes_per_s
    attended = sum(position + row + 1 for row in range(rows)) * unit.attend_macs
    fixed = unit.fixed_state_bytes / device.read_bytes_per_s
    return matmuls + fixed + max(grown, attended / device.prefill_attend_macs_per_s)


def brute_ram(question: Question, device: Device, first: int, last: int) -> int:
    model, load = question.model, question.workload
    positions = math.ceil(load.context / model.kv_page_tokens) * model.kv_page_tokens
    total = device.base_bytes + max(unit.workspace_bytes for unit in model.units[first:last])
    for unit in model.units[first:last]:
        total += unit.bytes
        total += load.sequences * (positions * unit.kv_bytes_per_token + unit.fixed_state_bytes)
    return total - (model.tied_bytes if last - first == len(model.units) else 0)


def brute_resources(
    question: Question,
    stages: list[Assignment],
    rows: float,
    back: float,
    seconds: Callable[[Device, Assignment], float],
) -> tuple[float, list[float]]:
    """Seconds of a lap, and of every resource in it, with so many rows on every link; infinite without a
    link."""
    model, cluster = question.model, question.cluster
    places, total, at, size = [], 0.0, cluster.coordinator, 4 * rows
    for stage in [*stages, None]:
        to = cluster.coordinator if stage is None else stage.device
        link = cluster.links.get((at, to))
        if link is None and at != to:
            return math.inf, [math.inf]
        if link is not None:
            places.append((4 * back if stage is None else size) / link.bytes_per_s)
            total += link.latency_s + places[-1]
        if stage is not None:
            device = next(d for d in cluster.devices if d.name == to)
            places.append(seconds(device, stage))
            total += places[-1]
            at, size = to, model.units[stage.last - 1].cut_bytes * rows
    return total, places


def brute_value(question: Question, stages: list[Assignment]) -> float:
    """Seconds a token of given stages, or until the first; infinite without a link."""
    model, cluster, load = question.model, question.cluster, question.workload
    objective = question.objective
    by_name = {device.name: device for device in cluster.devices}
    pauses = sum(by_name[stage.device].idle_overhead_s for stage in stages)
    if objective == "first_token":
        chunks = math.ceil(load.prompt_tokens / load.chunk_tokens)
        total, places = brute_resources(
            question,
            stages,
            load.prompt_tokens / chunks,
            1,
            lambda device, stage: brute_chunk_seconds(question, device, stage.first, stage.last),
        )
        head = brute_rows_seconds(model.units[-1], by_name[stages[-1].device], 1, load.prompt_tokens - 1)
        return total + head + pauses + (chunks - 1) * max(places)
    values = []
    for batch in sorted({1, min(2, load.streams), load.streams}):
        total, places = brute_resources(
            question,
            stages,
            batch,
            batch,
            lambda device, stage, batch=batch: brute_decode_seconds(  # type: ignore[misc]
                question, device, stage.first, stage.last, batch
            ),
        )
        own = len(stages) == 1 and cluster.coordinator == stages[0].device
        if (objective == "latency" or load.streams == 1) and not own:
            total += pauses
        values.append(total if objective == "latency" else max(total / load.streams, max(places) / batch))
    return values[0] if objective == "latency" else min(values)


def brute_chains(question: Question, order: tuple[Device, ...]) -> Iterator[list[Assignment]]:
    """Every cut of the model over exactly these devices in this order."""
    units = len(question.model.units)
    for inner in itertools.combinations(range(1, units), len(order) - 1):
        edges = [0, *inner, units]
        yield [
            Assignment(device.name, a, b)
            for device, (a, b) in zip(order, itertools.pairwise(edges), strict=True)
        ]


def subsets(devices: tuple[Device, ...], any_order: bool) -> Iterator[tuple[Device, ...]]:
    choose = itertools.permutations if any_order else itertools.combinations
    for count in range(1, len(devices) + 1):
        yield from choose(devices, count)


def brute(question: Question, *, any_order: bool, must: str | None = None) -> float:
    """The least value of any feasible plan (that uses `must`), infinite if there is none; in the cluster's
    order or in any."""
    by_name = {device.name: device for device in question.cluster.devices}
    best = math.inf
    for order in subsets(question.cluster.devices, any_order):
        if must is not None and must not in (device.name for device in order):
            continue
        for stages in brute_chains(question, order):
            fits = all(
                brute_ram(question, by_name[s.device], s.first, s.last) <= by_name[s.device].ram_bytes
                and set(range(s.first, s.last)) <= question.constraints.held.get(s.device, EVERYTHING)
                for s in stages
            )
            if fits:
                best = min(best, brute_value(question, stages))
    return best


def brute_lack(question: Question) -> float:
    """The least total of bytes over the caps, infinite when links are what is missing."""
    by_name = {device.name: device for device in question.cluster.devices}
    latency = replace(question, objective="latency")
    best = math.inf
    for order in subsets(question.cluster.devices, True):
        for stages in brute_chains(question, order):
            if brute_value(latency, stages) < math.inf:
                rams = [
                    (by_name[s.device], brute_ram(question, by_name[s.device], s.first, s.last))
                    for s in stages
                ]
                best = min(best, sum(max(0, ram - device.ram_bytes) for device, ram in rams))
    return best


def random_problem(
    seed: int, objective: Objective = "latency", *, alike: bool = True, runs: bool = False
) -> Question:
    """A small problem with every feature now and then: tied tables, tight caps, missing links, equal devices,
    a coordinator that computes, workspace, paged and fixed state, and times from microseconds to seconds.
    Layers are `alike`, or in `runs` of two kinds, or all different."""
    rng = random.Random(seed)
    cut = rng.choice([4, 256, 2048, 60_000])

    def unit(name: str, size: int) -> Unit:
        return Unit(
            name,
            bytes=size,
            read_bytes=rng.randint(size // 2, size),
            macs=rng.randint(0, 2 * size),
            kv_bytes_per_token=rng.choice([0, 64, 256]),
            fixed_state_bytes=rng.choice([0, 0, 1000]),
            cut_bytes=cut if alike else rng.choice([4, 256, 2048, 60_000]),
            workspace_bytes=rng.choice([0, 5_000, 40_000]),
            attend_macs=rng.choice([0, 300]),
        )

    count = rng.choice([0, 1, 2, 3, 4, 5, 5, 6])
    layer = unit("layer", rng.randint(10_000, 200_000))
    layers = [layer if alike else unit(f"layer {i}", rng.randint(10_000, 200_000)) for i in range(count)]
    if runs and count:
        layers = [layers[0] if i % 3 else layers[-1] for i in range(count)]
    table = rng.randint(5_000, 300_000)
    units = (unit("embedding", table), *layers, unit("head", table + rng.randint(0, 1000)))
    model = ModelCosts(units, rng.choice([0, table]), rng.choice([1, 16, 64]))
    load = Workload(
        context=rng.randint(8, 300),
        sequences=4,
        prompt_tokens=rng.randint(1, 8),
        streams=rng.randint(1, 4),
        chunk_tokens=rng.randint(1, 8),
        depth=rng.choice([None, 0, 8]),
    )
    whole = sum(u.bytes + 4 * (u.kv_bytes_per_token * load.context + u.fixed_state_bytes) for u in units)
    roomy = rng.choice([0.35, 0.8, 0.9, 1.5])

    def device(name: str) -> Device:
        rate = 10 ** rng.uniform(6, 9)
        rates = ((1, rate), (2, rate * rng.uniform(1.2, 2.0)), (4, rate * rng.uniform(2.0, 4.0)))
        return Device(
            name,
            ram_bytes=int(whole * roomy * rng.uniform(0.3, 1.1)),
            read_bytes_per_s=10 ** rng.uniform(6, 9),
            macs_per_s=10 ** rng.uniform(6, 9),
            base_bytes=rng.choice([0, 20_000]),
            step_overhead_s=rng.choice([0.0, 1e-5, 1e-3]),
            idle_overhead_s=rng.choice([0.0, 1e-3]),
            row_rates=rng.choice([(), rates]),
            attend_macs_per_s=10 ** rng.uniform(6, 9),
            prefill_attend_macs_per_s=10 ** rng.uniform(6, 9),
        )

    devices = [device(f"d{i}") for i in range(rng.choice([1, 2, 3, 3, 4, 4]))]
    if len(devices) > 1 and rng.random() < 0.2:
        twin = devices[0]
        devices[1] = Device("d1", twin.ram_bytes, twin.read_bytes_per_s, twin.macs_per_s)
    head = rng.choice(["head", "d0"])
    names = [head, *(d.name for d in devices if d.name != head)]
    links = {
        (a, b): LinkSpeed(rng.choice([0.0, 10 ** rng.uniform(-5, -3)]), 10 ** rng.uniform(5, 9))
        for a, b in itertools.permutations(names, 2)
        if rng.random() < 0.95
    }
    return Question(model, Cluster(tuple(devices), links, head), load, objective)


def value(chain: Chain | None, question: Question) -> float:
    """What brute force's arithmetic says of a chain that a search found."""
    if chain is None:
        return math.inf
    devices = question.cluster.devices
    return brute_value(question, [Assignment(devices[j].name, a, b) for j, a, b in chain.stages])


def agree(question: Question, solver: milp.Solver | None) -> None:
    """DP = brute force for the cluster's order, and DP = MILP = brute force for any order."""
    devices = question.devices
    cases = [tables_of(question, goal) for goal in goals(question)]
    for any_order in (False, True):
        truth = pytest.approx(brute(question, any_order=any_order), rel=SAME)

        def cheapest(t: TimeTables, any_order: bool = any_order) -> Chain | None:
            return search.cheapest_any_order(t, devices) if any_order else search.cheapest(t, devices)

        by_dp = [(search.best_chain(tables, cheapest), tables) for tables in cases]
        assert all(proved for (_, proved), _ in by_dp)
        assert min(value(chain, question) for (chain, _), _ in by_dp) == truth
        assert min(search.value(t, chain) if chain else math.inf for (chain, _), t in by_dp) == truth
        if solver is not None and any_order:
            by_milp = [milp.best_chain(tables, devices, solver) for tables in cases]
            assert all(proved for _, proved in by_milp)
            assert min(value(chain, question) for chain, _ in by_milp) == truth


@pytest.mark.parametrize("objective", ["latency", "throughput", "first_token"])
@pytest.mark.parametrize("seed", range(40))
def test_dp_and_milp_equal_brute_force(seed: int, objective: Objective, highs: milp.Solver) -> None:
    agree(random_problem(seed, objective), highs)


@pytest.mark.parametrize("objective", ["latency", "throughput", "first_token"])
@pytest.mark.parametrize("seed", range(1000, 1030))
def test_they_do_when_layers_differ(seed: int, objective: Objective, highs: milp.Solver) -> None:
    agree(random_problem(seed, objective, alike=False), highs)


@pytest.mark.parametrize("objective", ["latency", "throughput", "first_token"])
@pytest.mark.parametrize("seed", range(1100, 1110))
def test_they_do_when_layers_are_of_two_kinds(seed: int, objective: Objective, highs: milp.Solver) -> None:
    agree(random_problem(seed, objective, alike=False, runs=True), highs)


def with_some_held(question: Question, seed: int) -> Question:
    """Most devices hold a random part of the units, often with gaps."""
    rng, units = random.Random(seed), range(len(question.model.units))
    held = {
        device.name: frozenset(u for u in units if rng.random() < share)
        for device in question.cluster.devices
        if (share := rng.choice([0.0, 0.6, 0.8, 0.9, 1.1])) <= 1
    }
    return replace(question, constraints=replace(question.constraints, held=held))


@pytest.mark.parametrize("objective", ["latency", "throughput", "first_token"])
def test_they_do_when_devices_hold_some_of_the_units(objective: Objective, highs: milp.Solver) -> None:
    """Then layers that cost the same are not alike."""
    asked = [
        with_some_held(random_problem(seed, objective, alike=seed % 3 > 0), seed)
        for seed in range(3000, 3030)
    ]
    for question in asked:
        agree(question, highs)
    chains = [one.assignments for one in map(plan, asked) if isinstance(one, Plan)]
    assert len(chains) >= 8 and len([stages for stages in chains if len(stages) > 1]) >= 3


@pytest.mark.parametrize("seed", range(30))
def test_a_device_that_must_be_used_costs_the_least_it_can(seed: int) -> None:
    question = random_problem(seed)
    tables, names = (
        tables_of(question, Goal("latency")),
        [device.name for device in question.cluster.devices],
    )
    for must, name in enumerate(names):
        chain = search.cheapest(tables, range(len(names)), must)
        truth = brute(question, any_order=False, must=name)
        assert value(chain, question) == pytest.approx(truth, rel=SAME)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["latency", "throughput", "first_token"])
def test_dp_and_milp_equal_brute_force_on_many(objective: Objective, highs: milp.Solver) -> None:
    for seed in range(2000, 2120):
        agree(random_problem(seed, objective, alike=seed % 4 > 0, runs=seed % 8 == 0), highs)


@pytest.mark.parametrize("method", ["auto", "dp", "milp"])
@pytest.mark.parametrize("seed", range(30))
def test_plan_equals_brute_force_and_keeps_the_caps(seed: int, method: str) -> None:
    objective = OBJECTIVES[seed % 3]
    question = random_problem(seed, objective, alike=seed % 5 > 0)
    if objective == "throughput":  # of several sequences: test_streams.py
        question = replace(question, workload=replace(question.workload, streams=1))
    answer = plan(question, method=method)  # type: ignore[arg-type]
    truth = brute(question, any_order=True)
    if isinstance(answer, Infeasible):
        lack = brute_lack(question)
        assert truth == math.inf
        assert answer.missing_bytes == (0 if lack == math.inf else lack)
        return
    if objective == "first_token" and question.workload.in_chunks:
        assert not answer.optimal  # the formula takes the mean chunk: test_solve.py
        return
    assert answer.optimal
    if objective != "first_token":
        assert answer.step_seconds == pytest.approx(truth, rel=SAME)
    assert brute_value(question, list(answer.assignments)) == pytest.approx(truth, rel=SAME)
    for stage in answer.stages:
        device = question.cluster.device(stage.device)
        assert stage.cap_bytes == device.ram_bytes
        assert stage.ram_bytes == brute_ram(question, device, stage.first, stage.last) <= stage.cap_bytes


def test_the_random_problems_have_every_kind() -> None:
    """So that agreement above means something."""
    answers = [plan(random_problem(seed), method="dp", explain=False) for seed in range(40)]
    plans = [answer for answer in answers if isinstance(answer, Plan)]
    lacks = [answer for answer in answers if isinstance(answer, Infeasible)]
    assert len([lack for lack in lacks if lack.missing_bytes]) >= 3
    assert len([found for found in plans if len(found.stages) == 1]) >= 3
    assert len([found for found in plans if len(found.stages) > 1]) >= 10
    assert len([found for found in plans if 1 < len(found.stages) < len(found.alone)]) >= 3
