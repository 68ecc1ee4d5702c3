"""The cost formulas against numbers worked out by hand; the tables against the formulas."""

import math
from dataclasses import replace

import pytest

from shoal.planner import cost
from shoal.planner.cost import StageCost
from shoal.planner.rows import (
    LOOPBACK,
    Assignment,
    Cluster,
    Device,
    LinkSpeed,
    ModelCosts,
    Question,
    Unit,
    Workload,
)
from shoal.planner.streams import Follower
from shoal.planner.tables import Goal, goals, tables_of

EMBEDDING = Unit("embedding", 4000, 10, 0, 0, 0, 80, workspace_bytes=7)
LAYER = Unit("layer", 1000, 1000, 3000, 5, 60, 80, workspace_bytes=20)
HEAD = Unit("head", 4100, 4100, 8000, 0, 0, 4, workspace_bytes=90)
MODEL = ModelCosts((EMBEDDING, LAYER, LAYER, HEAD), tied_bytes=4000, kv_page_tokens=64)
DEVICE = Device(
    "a", 100_000, read_bytes_per_s=1000.0, macs_per_s=2000.0, base_bytes=500, step_overhead_s=0.25
)
LOAD = Workload(context=100, sequences=2, prompt_tokens=10, streams=2, chunk_tokens=4, depth=40)


def test_a_unit_takes_the_longer_of_reading_and_computing_and_then_attends() -> None:
    # weights: 1000 bytes, 1 s, or 3000 MACs, 1.5 s; then 40 * 5 + 60 = 260 bytes of state: 0.26 s
    assert cost.decode_seconds(LAYER, DEVICE, 1, 40) == 1.76
    # reads 4100 bytes: 4.1 s; computes 8000 MACs: 4 s
    assert cost.decode_seconds(HEAD, DEVICE, 1, 40) == 4.1
    assert cost.decode_seconds(EMBEDDING, DEVICE, 1, 40) == 0.01


def test_a_stage_is_its_units_and_an_overhead() -> None:
    assert StageCost(MODEL, DEVICE, 0, 4).decode_seconds(1, 40) == pytest.approx(0.25 + 0.01 + 3.52 + 4.1)
    assert StageCost(MODEL, DEVICE, 1, 2).decode_seconds(1, 40) == pytest.approx(0.25 + 1.76)


def test_a_step_after_a_pause_takes_more() -> None:
    assert StageCost(MODEL, replace(DEVICE, idle_overhead_s=0.5), 1, 2).pause == 0.5
    assert StageCost(MODEL, DEVICE, 1, 2).pause == 0.0


def test_a_chunk_of_one_row_is_a_decoded_row() -> None:
    """A node runs both alike, so they cost the same."""
    deep = replace(LAYER, attend_macs=7)
    device = replace(DEVICE, attend_macs_per_s=100.0, prefill_attend_macs_per_s=300.0)
    assert cost.chunk_seconds(deep, device, 1, 40) == cost.decode_seconds(deep, device, 1, 40)


def test_attention_takes_longer_at_a_depth_where_it_computes() -> None:
    unit, slow = replace(LAYER, attend_macs=7), replace(DEVICE, attend_macs_per_s=100.0)
    assert cost.decode_seconds(unit, slow, 1, 40) == pytest.approx(
        1.5 + 60 / 1000 + 40 * 7 / 100
    )  # fixed state beside
    # a prompt's rows 8 to 11 attend to 9, 10, 11 and 12 positions
    prompt = replace(DEVICE, prefill_attend_macs_per_s=100.0)
    assert cost.chunk_seconds(unit, prompt, 4, 8) == pytest.approx(6.0 + 60 / 1000 + 42 * 7 / 100)


def test_sequences_that_share_a_call_read_weights_once() -> None:
    # two rows: 1000 bytes still, 6000 MACs: 3 s; each has its own state: 2 * 0.26 s
    assert cost.decode_seconds(LAYER, DEVICE, 2, 40) == pytest.approx(3.52)
    # of a table a row each
    assert cost.decode_seconds(EMBEDDING, DEVICE, 2, 40) == pytest.approx(0.02)


@pytest.mark.parametrize(("rows", "seconds"), [(1, 1.0), (2, 1.0), (3, 1.5), (4, 2.0), (8, 4.0)])
def test_row_counts_between_those_measured_lie_on_a_line(rows: int, seconds: float) -> None:
    device = replace(DEVICE, row_rates=((1, 100.0), (2, 200.0), (4, 200.0)))
    assert cost.work_seconds(device, rows, 100) == pytest.approx(seconds)


def test_fewer_rows_than_were_measured_compute_at_the_least_count() -> None:
    assert cost.work_seconds(replace(DEVICE, row_rates=((4, 200.0),)), 2, 100) == 1.0


def test_the_depth_is_the_middle_of_the_answer_unless_given() -> None:
    assert Workload(context=100, prompt_tokens=10).decode_depth == 55
    assert LOAD.decode_depth == 40


def test_ram_is_base_weights_state_and_the_largest_workspace() -> None:
    # state: 100 positions are two pages of 64: 128 * 5 + 60 = 700 a sequence, 1400 a layer
    assert cost.range_ram_bytes(MODEL, DEVICE, LOAD, 1, 2) == 500 + 1000 + 1400 + 20
    assert cost.range_ram_bytes(MODEL, DEVICE, LOAD, 0, 2) == 500 + 4000 + 1000 + 1400 + 20
    assert cost.range_ram_bytes(MODEL, DEVICE, LOAD, 2, 4) == 500 + 1000 + 1400 + 4100 + 90


def test_a_tied_table_counts_once_where_both_ends_are() -> None:
    assert cost.range_ram_bytes(MODEL, DEVICE, LOAD, 0, 4) == 500 + 4000 + 2 * 2400 + 4100 + 90 - 4000
    assert cost.range_ram_bytes(MODEL, DEVICE, LOAD, 0, 3) == 500 + 4000 + 2 * 2400 + 20


def test_a_hop_is_latency_and_bytes_over_rate() -> None:
    assert cost.hop_seconds(LinkSpeed(0.5, 100.0), 80) == pytest.approx(1.3)
    assert cost.link_busy_seconds(LinkSpeed(0.5, 100.0), 80) == pytest.approx(0.8)
    assert cost.hop_seconds(LOOPBACK, 10**9) == 0.0


def chain() -> tuple[Cluster, list[Assignment]]:
    other = Device("b", 100_000, 2000.0, 4000.0)
    links = {
        ("h", "a"): LinkSpeed(1.0, 4.0),
        ("a", "b"): LinkSpeed(2.0, 40.0),
        ("b", "h"): LinkSpeed(3.0, 8.0),
    }
    return Cluster((DEVICE, other), links, "h"), [Assignment("a", 0, 2), Assignment("b", 2, 4)]


def test_tokens_cross_as_four_bytes_and_cuts_as_rows() -> None:
    cluster, stages = chain()
    assert [size for _, size in cost.chain_hops(MODEL, cluster, stages)] == [4, 80, 4]
    with pytest.raises(ValueError, match="no link h -> b"):
        cost.chain_hops(MODEL, cluster, [Assignment("b", 0, 2), Assignment("a", 2, 4)])


def test_latency_is_a_lap_and_throughput_its_share_or_the_busiest_resource() -> None:
    assert Goal("latency").value(10.0, 5.0) == 10.0
    assert Goal("throughput", 1).value(10.0, 5.0) == 10.0
    assert Goal("throughput", 2).value(10.0, 5.0) == 5.0
    assert Goal("throughput", 2).value(7.0, 2.0) == 3.5
    assert Goal("throughput", 100).value(10.0, 6.0) == 6.0
    assert Goal("throughput", 100, batch=4).value(10.0, 6.0) == 1.5
    assert Goal("first_token", chunks=4).value(10.0, 6.0) == 28.0


def test_a_goal_per_number_of_sequences_in_a_call() -> None:
    cluster, _ = chain()
    load = Workload(context=64, sequences=40, streams=5, prompt_tokens=33, chunk_tokens=16)
    many, more = (Question(MODEL, cluster, w, "throughput") for w in (load, replace(load, streams=40)))
    assert [goal.batch for goal in goals(many)] == [1, 2, 4, 5]
    assert [goal.batch for goal in goals(more)][-2:] == [16, 32]
    assert goals(replace(many, objective="first_token")) == [
        Goal("first_token", chunks=3, rows=16),
        Goal("first_token", chunks=5, rows=8),
    ]


def test_a_chunk_reads_weights_once_and_computes_every_row() -> None:
    # layer: computes 4 * 3000 MACs: 6 s; then (8 + 4) * 5 + 60 = 120 bytes of state: 0.12 s
    assert StageCost(MODEL, DEVICE, 1, 2).call_seconds([(4, 8, False)]) == pytest.approx(0.25 + 6.12)
    # embedding: 4 rows of 10 bytes
    assert StageCost(MODEL, DEVICE, 0, 1).call_seconds([(4, 0, False)]) == 0.25 + 0.04
    # the head runs for rows whose logits are wanted only
    assert StageCost(MODEL, DEVICE, 3, 4).call_seconds([(4, 0, False)]) == 0.25
    assert StageCost(MODEL, DEVICE, 3, 4).call_seconds([(4, 0, True)]) == 0.25 + 4.1


def test_a_table_is_never_read_more_than_whole() -> None:
    assert StageCost(MODEL, DEVICE, 0, 1).call_seconds([(1000, 0, False)]) == 0.25 + 4.0


def test_the_first_token_of_a_pipelined_prompt() -> None:
    cluster, stages = chain()
    # Chunks of 4, 4 and 2 rows. To a: 4 bytes a row at 4 bytes/s: the link is taken 4, 4, 2 s, latency 1 s.
    # a: 0.25 + 0.01 * rows + 1.5 * rows, and 60 + 5 * (4, 8, 10) bytes of state: 6.37, 6.39, 3.38.
    # a to b: 80 bytes a row at 40 bytes/s: 8, 8, 4 s + 2 s.
    # b: 0.75 * rows (its layer computes), half of a's state, and on the last chunk 2.05 for the head.
    a1 = 4 + 1 + 6.37
    a2 = a1 + 6.39  # its rows came at 9
    a3 = a2 + 3.38  # at 11
    l1, l2 = a1 + 8, a2 + 8
    l2 = max(a2, l1) + 8
    l3 = max(a3, l2) + 4
    b3 = max(l3 + 2, l2 + 2 + 3.05) + 1.5 + 0.055 + 2.05
    assert Follower(Question(MODEL, cluster, LOAD)).first_token(stages) == pytest.approx(b3 + 3.0 + 0.5)


def test_the_tables_say_what_the_formulas_say() -> None:
    cluster, _ = chain()
    small = Device("c", cost.range_ram_bytes(MODEL, DEVICE, LOAD, 1, 3), 900.0, 900.0, 500, 0.125)
    cluster = Cluster((*cluster.devices, small), cluster.links, "h")
    tables = tables_of(Question(MODEL, cluster, LOAD), Goal("latency"))
    for j, device in enumerate(cluster.devices):
        for first in range(4):
            for last in range(first + 1, 5):
                exact = StageCost(MODEL, device, first, last).decode_seconds(1, 40)
                assert tables.stage(j, first, last) == pytest.approx(exact, rel=1e-12)
                fits = cost.range_ram_bytes(MODEL, device, LOAD, first, last) <= device.ram_bytes
                assert (first >= tables.first_fit[j][last]) == fits
    assert list(tables.first_fit[2]) == [0, 0, 1, 1, 3]
    assert list(tables.lap.enter) == [2.0, math.inf, math.inf]
    assert list(tables.lap.leave) == [math.inf, 3.5, math.inf]
    hop = tables.lap.hop[0][1]
    assert hop is not None
    assert list(hop)[1:] == [4.0, 4.0, 4.0]
    assert tables.lap.hop[1][0] is None
