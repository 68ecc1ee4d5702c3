"""Which boundary should move: against every chain that one move reaches, and worked out by hand."""

import itertools
import random
from dataclasses import replace

import pytest

from shoal.planner import cost
from shoal.planner.evaluation import evaluate
from shoal.planner.moves import best_move, boundary_moves
from shoal.planner.rows import (
    Assignment,
    Cluster,
    Device,
    LinkSpeed,
    ModelCosts,
    Question,
    Unit,
    Workload,
)

LAYER = Unit("layer", 1_000_000, 1_000_000, 1_000_000, 100, 0, 1000)
EMBEDDING = Unit("embedding", 4_000_000, 1000, 0, 0, 0, 1000)
HEAD = Unit("head", 2_000_000, 2_000_000, 2_000_000, 0, 0, 4)
MODEL = ModelCosts((EMBEDDING, *[LAYER] * 9, HEAD), kv_page_tokens=16)
LINKS = {pair: LinkSpeed(0.001, 1e9) for pair in itertools.permutations("habc", 2)}
STAGES = (Assignment("a", 0, 4), Assignment("b", 4, 7), Assignment("c", 7, 11))


def question(streams: int = 1, **rates: float) -> Question:
    """Equal devices, but for those whose bytes/s are given; a depth of 20 positions is two pages."""
    devices = tuple(Device(n, 20_000_000, rates.get(n, 1e9), rates.get(n, 1e9)) for n in "abc")
    load = Workload(64, sequences=max(streams, 2), streams=streams, depth=20)
    objective = "latency" if streams == 1 else "throughput"
    return Question(MODEL, Cluster(devices, LINKS, "h"), load, objective)


def test_a_slow_device_gives_a_layer_to_the_quicker_neighbour() -> None:
    asked = question(b=2.5e8, c=5e8)
    move = best_move(asked, STAGES, most_units=1)
    assert move is not None
    assert (move.giver, move.taker, move.first, move.last) == ("b", "a", 4, 5)
    assert move.stages == (Assignment("a", 0, 5), Assignment("b", 5, 7), Assignment("c", 7, 11))
    # 4 ms a layer on b, 1 ms on a; of the state 20 positions of 100 bytes at the rates of either
    assert move.gain == pytest.approx(0.003 + 2000 / 2.5e8 - 2000 / 1e9)
    assert move.seconds == pytest.approx(evaluate(asked, move.stages).step_seconds)
    assert move.weight_bytes == 1_000_000
    assert move.state_bytes == 2 * 32 * 100  # two sequences, two pages of 16 positions
    two = best_move(asked, STAGES, most_units=2)
    assert two is not None
    assert (two.first, two.last, two.gain) == (4, 6, pytest.approx(2 * move.gain))


def test_nothing_moves_where_nothing_gains() -> None:
    assert best_move(question(), STAGES) is None  # for one sequence of equal devices any cut is as good


def test_one_move_after_another_comes_to_an_end_near_the_best() -> None:
    asked, stages = question(6, b=5e8), STAGES
    speeds = [evaluate(asked, stages).step_seconds]
    while (move := best_move(asked, stages, most_units=1)) is not None:
        stages = move.stages
        speeds.append(move.seconds)
    assert 1 < len(speeds) < 10
    assert all(after < before for before, after in itertools.pairwise(speeds))
    cuts = itertools.combinations(range(1, 11), 2)
    chains = [[Assignment("a", 0, x), Assignment("b", x, y), Assignment("c", y, 11)] for x, y in cuts]
    assert speeds[-1] <= 1.03 * min(evaluate(asked, chain).step_seconds for chain in chains)


@pytest.mark.parametrize("streams", [1, 5])
@pytest.mark.parametrize("seed", range(8))
def test_it_is_the_best_of_all_that_one_move_reaches(seed: int, streams: int) -> None:
    rng = random.Random(seed)
    asked = question(streams, **{name: 10 ** rng.uniform(8, 9.3) for name in "abc"})
    order = rng.sample("abc", 3)
    edges = [0, *sorted(rng.sample(range(1, 11), 2)), 11]
    stages = [Assignment(name, a, b) for name, a, b in zip(order, edges, edges[1:], strict=False)]
    now, reached = evaluate(asked, stages).step_seconds, []
    for at, by in itertools.product((1, 2), (-2, -1, 1, 2)):
        moved = list(edges)
        moved[at] += by
        if sorted(set(moved)) == moved:
            there = [Assignment(name, a, b) for name, a, b in zip(order, moved, moved[1:], strict=False)]
            reached.append(evaluate(asked, there).step_seconds)
    assert len(list(boundary_moves(asked, stages))) == len(reached)
    found = best_move(asked, stages)
    if min(reached) >= now * (1 - 1e-9):
        assert found is None
    else:
        assert found is not None
        assert found.seconds == pytest.approx(min(reached))
        assert found.gain == pytest.approx(now - min(reached))


def test_a_taker_without_room_takes_nothing() -> None:
    asked = question(b=2.5e8)
    needed = cost.range_ram_bytes(MODEL, asked.cluster.devices[0], asked.workload, 0, 5)
    full = tuple(replace(d, ram_bytes=needed - 1 if d.name == "a" else 10) for d in asked.cluster.devices)
    assert best_move(replace(asked, cluster=Cluster(full, LINKS, "h")), STAGES) is None
    roomy = (replace(full[0], ram_bytes=needed), *full[1:])
    found = best_move(replace(asked, cluster=Cluster(roomy, LINKS, "h")), STAGES)
    assert found is not None
    assert (found.taker, found.first, found.last) == ("a", 4, 5)


def test_how_deep_the_sequences_are_decides() -> None:
    """b reads and computes like a, and attends ten times as slowly: with a long context a layer leaves it."""
    unit = replace(LAYER, attend_macs=1000)
    model = ModelCosts((EMBEDDING, *[unit] * 9, HEAD))
    devices = tuple(
        Device(n, 20_000_000, 1e9, 1e9, attend_macs_per_s=1e8 if n == "b" else 1e9) for n in "abc"
    )

    def at(depth: int) -> Question:
        load = Workload(1000, sequences=1, depth=depth)
        return Question(model, Cluster(devices, LINKS, "h"), load)

    assert best_move(at(0), STAGES) is None
    found = best_move(at(900), STAGES, most_units=1)
    assert found is not None
    assert (found.giver, found.gain) == ("b", pytest.approx(900 * 1000 * (1e-8 - 1e-9)))


def test_stages_that_are_no_chain_are_refused() -> None:
    with pytest.raises(ValueError, match="must cover units 0 to 11"):
        best_move(question(), STAGES[:2])
