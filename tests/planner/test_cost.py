"""The cost formulas against numbers worked out by hand; the tables against the formulas."""

import math

import pytest

from shoal.planner import cost
from shoal.planner.rows import LOOPBACK, Cluster, Device, Link, Model, Stage, Unit, Workload
from shoal.planner.tables import time_tables

EMBEDDING = Unit("embedding", 4000, 10, 0, 0, 0, 80, workspace_bytes=7)
LAYER = Unit("layer", 1000, 1000, 3000, 5, 60, 80, workspace_bytes=20)
HEAD = Unit("head", 4100, 4100, 8000, 0, 0, 4, workspace_bytes=90)
MODEL = Model((EMBEDDING, LAYER, LAYER, HEAD), tied_bytes=4000, kv_page_tokens=64)
DEVICE = Device(
    "a", 100_000, read_bytes_per_s=1000.0, macs_per_s=2000.0, base_bytes=500, step_overhead_s=0.25
)
LOAD = Workload(context=100, sequences=2, prompt_tokens=10, streams=2, chunk_tokens=4, depth=40)


def test_a_unit_takes_the_longer_of_reading_and_computing() -> None:
    # reads 1000 + 40 * 5 + 60 = 1260 bytes: 1.26 s; computes 3000 MACs: 1.5 s
    assert cost.unit_decode_seconds(LAYER, DEVICE, LOAD) == 1.5
    # reads 4100 bytes: 4.1 s; computes 8000 MACs: 4 s
    assert cost.unit_decode_seconds(HEAD, DEVICE, LOAD) == 4.1
    assert cost.unit_decode_seconds(EMBEDDING, DEVICE, LOAD) == 0.01


def test_a_stage_is_its_units_and_an_overhead() -> None:
    assert cost.stage_decode_seconds(MODEL, DEVICE, LOAD, 0, 4) == pytest.approx(0.25 + 0.01 + 3.0 + 4.1)
    assert cost.stage_decode_seconds(MODEL, DEVICE, LOAD, 1, 2) == 1.75


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
    assert cost.hop_seconds(Link(0.5, 100.0), 80) == pytest.approx(1.3)
    assert cost.link_busy_seconds(Link(0.5, 100.0), 80) == pytest.approx(0.8)
    assert cost.hop_seconds(LOOPBACK, 10**9) == 0.0


def chain() -> tuple[Cluster, list[Stage]]:
    other = Device("b", 100_000, 2000.0, 4000.0)
    links = {("h", "a"): Link(1.0, 4.0), ("a", "b"): Link(2.0, 40.0), ("b", "h"): Link(3.0, 8.0)}
    return Cluster((DEVICE, other), links, "h"), [Stage("a", 0, 2), Stage("b", 2, 4)]


def test_tokens_cross_as_four_bytes_and_cuts_as_rows() -> None:
    cluster, stages = chain()
    assert [size for _, size in cost.chain_hops(MODEL, cluster, stages)] == [4, 80, 4]
    with pytest.raises(ValueError, match="no link h -> b"):
        cost.chain_hops(MODEL, cluster, [Stage("b", 0, 2), Stage("a", 2, 4)])


def test_latency_is_a_round_and_throughput_its_share_or_the_slowest_place() -> None:
    stages, hops, busy = [2.0, 5.0], [1.0, 1.0, 1.0], [0.0, 0.5, 0.0]
    assert cost.step_seconds(stages, hops, busy, "latency", 4) == 10.0
    assert cost.step_seconds(stages, hops, busy, "throughput", 1) == 10.0
    assert cost.step_seconds(stages, hops, busy, "throughput", 2) == 5.0
    assert cost.step_seconds([2.0, 2.0], hops, busy, "throughput", 2) == 3.5
    assert cost.step_seconds(stages, hops, busy, "throughput", 100) == 5.0
    assert cost.step_seconds(stages, hops, [0.0, 6.0, 0.0], "throughput", 100) == 6.0


def test_a_chunk_reads_weights_once_and_computes_every_row() -> None:
    # layer: reads 1000 + (8 + 4) * 5 + 60 = 1120 bytes: 1.12 s; computes 4 * 3000 MACs: 6 s
    assert cost.stage_prefill_seconds(MODEL, DEVICE, 1, 2, 4, 8, 0) == 0.25 + 6.0
    # embedding: 4 rows of 10 bytes
    assert cost.stage_prefill_seconds(MODEL, DEVICE, 0, 1, 4, 0, 0) == 0.25 + 0.04
    # the head runs for rows whose logits are wanted only
    assert cost.stage_prefill_seconds(MODEL, DEVICE, 3, 4, 4, 0, 0) == 0.25
    assert cost.stage_prefill_seconds(MODEL, DEVICE, 3, 4, 4, 0, 1) == 0.25 + 4.1


def test_a_table_is_never_read_more_than_whole() -> None:
    assert cost.stage_prefill_seconds(MODEL, DEVICE, 0, 1, 1000, 0, 0) == 0.25 + 4.0


def test_the_first_token_of_a_pipelined_prompt() -> None:
    cluster, stages = chain()
    # Chunks of 4, 4 and 2 rows. To a: 4 bytes a row at 4 bytes/s: the link is taken 4, 4, 2 s, latency 1 s.
    # a: 0.25 + 0.01 * rows + 1.5 * rows = 6.29, 6.29, 3.27.
    # a to b: 80 bytes a row at 40 bytes/s: 8, 8, 4 s + 2 s.
    # b: 0.75 * rows (its layer computes), and on the last chunk 2.05 for the head: 3, 3, 1.5 + 2.05.
    a1 = 4 + 1 + 6.29
    a2 = a1 + 6.29  # its rows came at 9
    a3 = a2 + 3.27  # at 11
    l1, l2 = a1 + 8, a2 + 8
    l2 = max(a2, l1) + 8
    l3 = max(a3, l2) + 4
    b3 = max(l3 + 2, l2 + 2 + 3) + 1.5 + 2.05
    assert cost.first_token_seconds(MODEL, cluster, LOAD, stages) == pytest.approx(b3 + 3.0 + 0.5)


def test_the_tables_say_what_the_formulas_say() -> None:
    cluster, _ = chain()
    small = Device("c", cost.range_ram_bytes(MODEL, DEVICE, LOAD, 1, 3), 900.0, 900.0, 500, 0.125)
    cluster = Cluster((*cluster.devices, small), cluster.links, "h")
    tables = time_tables(MODEL, cluster, LOAD)
    for j, device in enumerate(cluster.devices):
        for first in range(4):
            for last in range(first + 1, 5):
                exact = cost.stage_decode_seconds(MODEL, device, LOAD, first, last)
                assert tables.stage(j, first, last) == pytest.approx(exact, rel=1e-12)
                fits = cost.range_ram_bytes(MODEL, device, LOAD, first, last) <= device.ram_bytes
                assert (first >= tables.first_fit[j][last]) == fits
    assert list(tables.first_fit[2]) == [0, 0, 1, 1, 3]
    assert list(tables.enter) == [2.0, math.inf, math.inf]
    assert list(tables.leave) == [math.inf, 3.5, math.inf]
    assert tables.hop[0][1] == [0.0, 4.0, 4.0, 4.0]
    assert tables.hop[1][0] is None
