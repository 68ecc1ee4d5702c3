"""How prompts are cut into chunks: by hand, and followed along a chain for chunks of all sizes."""

import itertools
import math
from dataclasses import replace

import pytest

from shoal.planner.chunks import (
    LENGTHS,
    SIZES,
    Chunking,
    best_chunking,
    chunkings,
    of_length,
    window,
)
from shoal.planner.groups import Way
from shoal.planner.rows import Assignment, Cluster, Device, LinkSpeed, ModelCosts, Question, Unit, Workload
from shoal.planner.streams import Follower, first_token_seconds

LAYER = Unit("layer", 3_500_000, 3_500_000, 3_500_000, 400, 0, 2304, attend_macs=1152)
MODEL = ModelCosts(
    (
        Unit("embedding", 28_000_000, 576, 0, 0, 0, 2304),
        *[LAYER] * 30,
        Unit("head", 28_000_000, 28_000_000, 28_000_000, 0, 0, 4),
    )
)
RATES = ((1, 2.4e10), (8, 1e11), (64, 1.7e11), (256, 1.9e11))
"""Like a small model in int8 on one core: a token takes 5.6 ms, a row of a long prompt 0.7 ms."""


def way(stages: int, latency: float = 0.0002, rates: tuple[tuple[int, float], ...] = RATES) -> Way:
    devices = [
        Device(f"d{at}", 10**9, 2.5e10, 1.9e11, step_overhead_s=1e-4, idle_overhead_s=2e-4, row_rates=rates,
               attend_macs_per_s=3e10, prefill_attend_macs_per_s=6e10)
        for at in range(stages)
    ]  # fmt: skip
    names = ["head", *(device.name for device in devices)]
    links = {ends: LinkSpeed(latency, 1e9) for ends in itertools.permutations(names, 2)}
    edges = [0, *(1 + 30 * at // stages for at in range(1, stages)), 32]
    question = Question(MODEL, Cluster(tuple(devices), links, "head"), Workload(8192))
    ranges = zip(names[1:], edges, edges[1:], strict=False)
    return Follower(question).way([Assignment(*each) for each in ranges])


def test_chunks_of_equal_rows_and_chunks_that_shrink() -> None:
    assert Chunking(16).cut(0, 40) == [(0, 16), (16, 16), (32, 8)]
    assert Chunking(16).cut(35, 36) == [(35, 1)]
    assert Chunking(64, 0.001).cut(0, 200) == [(0, 64), (64, 64), (128, 56), (184, 16)]
    assert Chunking(62, 0.001).at(1) == 62
    assert Chunking(64, 0.001).at(100_000) == 8
    assert Chunking(5, 0.001).at(100_000) == 5
    for wrong in ((0, 0.0), (8, -1.0), (8, math.nan)):
        with pytest.raises(ValueError, match="chunk"):
            Chunking(*wrong)


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
@pytest.mark.parametrize("tokens", [20, 64, 128, 300, 512, 1500, 2000])
@pytest.mark.parametrize("latency", [0.0002, 0.003])
def test_the_first_token_is_as_soon_as_with_the_best_of_all_sizes(
    stages: int, tokens: int, latency: float
) -> None:
    chain = way(stages, latency)
    found = first_token_seconds(chain, best_chunking(chain, tokens, 256).cut(0, tokens))
    best = min(first_token_seconds(chain, Chunking(size).cut(0, tokens)) for size in SIZES)
    assert found <= 1.02 * best


def test_one_stage_takes_few_chunks_and_more_stages_more() -> None:
    rows = [best_chunking(way(stages), 512, 256).rows for stages in (1, 2, 4)]
    assert rows[0] == 256
    assert rows == sorted(rows, reverse=True)
    assert rows[0] > rows[1]


def test_chunks_that_shrink_win_where_attention_counts() -> None:
    chain = way(3)
    best = best_chunking(chain, 2000, 256)
    assert best.slope > 0
    uniform = min(first_token_seconds(chain, Chunking(size).cut(0, 2000)) for size in SIZES)
    assert first_token_seconds(chain, best.cut(0, 2000)) < uniform
    no_attention = replace(LAYER, attend_macs=0, kv_bytes_per_token=0)
    flat = ModelCosts((MODEL.units[0], *[no_attention] * 30, MODEL.units[-1]))
    cluster = Cluster((Device("a", 10**9, 2.5e10, 1.9e11), Device("b", 10**9, 2.5e10, 1.9e11)), {
        ends: LinkSpeed(0.001, 1e9) for ends in itertools.permutations(["head", "a", "b"], 2)
    }, "head")  # fmt: skip
    both = [Assignment("a", 0, 16), Assignment("b", 16, 32)]
    assert best_chunking(Follower(Question(flat, cluster, Workload(8192))).way(both), 2000, 256).slope == 0


def test_no_chunk_has_more_rows_than_allowed() -> None:
    assert best_chunking(way(1), 512, 100).rows <= 100
    assert best_chunking(way(2), 512, 5) == Chunking(5)
    assert best_chunking(way(2), 3, 256).cut(0, 3) == [(0, 3)]


def test_a_profile_with_an_error_does_not_make_a_prompt_creep() -> None:
    """A device that was disturbed while it was measured: its rate at 8 rows is above all others."""
    chain = way(2, rates=((1, 2.4e10), (8, 3e11), (64, 1.7e11), (256, 1.9e11)))
    assert best_chunking(chain, 512, 256).rows >= 32
    assert best_chunking(chain, 2000, 256).rows >= 64


def test_a_table_for_prompts_up_to_the_context() -> None:
    chain = way(2)
    table = chunkings(chain, 256, 1000)
    assert [length for length, _ in table] == [32, 64, 128, 256, 512, 1024]
    assert [length for length, _ in chunkings(chain, 256, 100_000)] == list(LENGTHS)
    assert of_length(table, 512) == table[4][1] == best_chunking(chain, 512, 256)
    assert of_length(table, 513) == of_length(table, 5000) == table[-1][1]


def test_the_window_keeps_stages_busy_while_results_are_on_their_way() -> None:
    assert window(way(1)) == 3
    assert window(way(3)) == 5
    assert window(way(2, latency=0.1)) > 30
    assert window(way(2, latency=100.0)) == 64
