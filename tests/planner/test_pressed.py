"""What is predicted of a prompt beside sequences that decode, against simulations with the inbox of nodes."""

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
from bench.simulator import Request, Rules, simulate

from shoal.planner.cost import Step
from shoal.planner.pressed import GAP, pressed
from shoal.planner.rows import Assignment, Cluster, Device, LinkSpeed, ModelCosts, Question, Unit, Workload
from shoal.planner.streams import Follower, Way

LAYER = Unit("layer", 1_000_000, 1_000_000, 1_000_000, 100, 0, 1000, attend_macs=1000)
EMBEDDING, HEAD = Unit("embedding", 4_000_000, 1000, 0, 0, 0, 1000), replace(LAYER, name="head", cut_bytes=4)
MODEL = ModelCosts((EMBEDDING, *[LAYER] * 6, HEAD))
DEVICE = Device("a", 10**9, 1e9, 5e9, step_overhead_s=2e-4, prefill_attend_macs_per_s=1e10)
CUTS = {1: (0, 8), 2: (0, 4, 8), 3: (0, 3, 5, 8)}
PROMPT, BEGIN = 1000, 0.5


def question(count: int, latency: float, streams: int, slower: float = 1.0) -> Question:
    """Of `count` devices, of which the first takes `slower` times as long as the others."""
    names = "abc"[:count]
    first = replace(DEVICE, read_bytes_per_s=1e9 / slower, macs_per_s=5e9 / slower)
    devices = (first, *(replace(DEVICE, name=name) for name in names[1:]))
    links = {pair: LinkSpeed(latency, 1e8) for pair in itertools.permutations("h" + names, 2)}
    load = Workload(2000, prompt_tokens=PROMPT, sequences=8, streams=streams, depth=400)
    return Question(MODEL, Cluster(devices, links, "h"), load, "throughput")


@pytest.mark.slow
@pytest.mark.parametrize(("latency", "slower"), [(0.0001, 1.0), (0.002, 1.0), (0.0001, 1.5)])
@pytest.mark.parametrize("streams", [1, 3, 6])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_prompt_beside_streams_takes_what_is_predicted(
    count: int, streams: int, latency: float, slower: float
) -> None:
    asked = question(count, latency, streams, slower)
    stages = [Assignment("abc"[i], *pair) for i, pair in enumerate(itertools.pairwise(CUTS[count]))]
    requests = [*[Request(0.0, 1, 500)] * streams, Request(BEGIN, PROMPT, 1)]
    found = simulate(asked, stages, requests, rules=Rules(chunk_rows=64, window=6))
    end = found.first_token_at[streams]
    assert end is not None
    pairs = [pair for own in found.tokens_at[:streams] for pair in itertools.pairwise(own)]
    gap = statistics.median(b - a for a, b in pairs if b > BEGIN and a < end)
    predicted = pressed(Follower(asked).way(stages), streams, PROMPT, 400)
    assert predicted.gap == pytest.approx(gap, rel=0.2)
    assert predicted.prompt == pytest.approx(end - BEGIN, rel=0.2)


@dataclass(frozen=True)
class Plain:
    """A stage whose calls take 10 ms and 1 ms a row."""

    pause: float = 0.0
    position: float = 0.0

    def rows(self, count: int) -> float:
        return 0.010 + 0.001 * count

    def call_seconds(self, steps: Sequence[Step]) -> float:
        return self.rows(sum(rows for rows, _, _ in steps))


def test_the_prompt_has_what_the_sequences_leave_of_a_gap() -> None:
    one = pressed(Way([Plain()], [0.0, 0.0], [0.0, 0.0]), 1, 100)
    assert one.gap == pytest.approx(GAP * 0.011)
    assert one.prompt == pytest.approx(10 * one.gap)  # with 10 rows beside that of the sequence
    two = pressed(Way([Plain()] * 2, [0.0] * 3, [0.0] * 3), 1, 210)
    assert two.gap == pytest.approx(GAP * 0.022)
    assert two.prompt == pytest.approx(10.5 * two.gap)  # 10 rows beside it, and 11 in the other call
