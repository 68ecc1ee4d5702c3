"""The simulator against closed forms, and that what happens to devices has the effect it must."""

import itertools
import random
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from bench.simulate import main
from bench.simulator import Event, Outcome, Request, Rules, random_requests, simulate

from shoal.planner import cost
from shoal.planner.cost import StageCost
from shoal.planner.evaluation import Plan, evaluate
from shoal.planner.rows import (
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
from shoal.planner.streams import Follower

LAYER = Unit("layer", 1_000_000, 1_000_000, 1_000_000, 0, 0, 1000)
EMBEDDING = Unit("embedding", 4_000_000, 1000, 0, 0, 0, 1000)
HEAD = Unit("head", 2_000_000, 2_000_000, 2_000_000, 0, 0, 4)
MODEL = ModelCosts((EMBEDDING, *[LAYER] * 6, HEAD))
LOAD = Workload(context=400, prompt_tokens=100, chunk_tokens=32, sequences=8)
# Reads and computes alike: sharing a call gains nothing.
DEVICES = tuple(Device(name, 10**9, 1e9, 1e9, step_overhead_s=1e-4) for name in "abc")
LINKS = {pair: LinkSpeed(0.002, 1e7) for pair in itertools.permutations("habc", 2)}
CLUSTER = Cluster(DEVICES, LINKS, "h")
STAGES = [Assignment("a", 0, 3), Assignment("b", 3, 6), Assignment("c", 6, 8)]
RULES = Rules(chunk_rows=32, window=10)


def run(requests: list[Request], **options: Any) -> Outcome:
    model, cluster = options.pop("model", MODEL), options.pop("cluster", CLUSTER)
    stages, events = options.pop("stages", STAGES), options.pop("events", ())
    question = Question(model, cluster, LOAD)
    return simulate(question, stages, requests, events, replace(RULES, **options))


def figures(
    cluster: Cluster,
    stages: Sequence[Assignment],
    load: Workload = LOAD,
    objective: Objective = "latency",
) -> Plan:
    return evaluate(Question(MODEL, cluster, load, objective), stages)


def first(found: Outcome, index: int = 0) -> float:
    at = found.first_token_at[index]
    assert at is not None
    return at


def test_one_stream_is_the_sum_of_stages_and_hops() -> None:
    step = figures(CLUSTER, STAGES).step_seconds
    found = run([Request(0.0, 1, 50)])
    assert found.tokens == 50
    assert found.seconds == pytest.approx(50 * step)


def test_stages_that_pause_pay_for_it_and_one_alone_at_the_head_does_not() -> None:
    sleepy = tuple(replace(device, idle_overhead_s=0.004) for device in DEVICES)
    cluster = Cluster(sleepy, LINKS, "h")
    step = figures(cluster, STAGES).step_seconds
    assert run([Request(1.0, 1, 50)], cluster=cluster).seconds - 1 == pytest.approx(50 * step)
    alone, stages = Cluster(sleepy[:1], {}, "a"), [Assignment("a", 0, 8)]
    step = figures(alone, stages).step_seconds
    found = run([Request(1.0, 1, 50)], cluster=alone, stages=stages)
    assert found.seconds - 1 == pytest.approx(50 * step + 0.004)  # the first step alone comes after a pause


def test_the_first_token_of_a_pipelined_prompt() -> None:
    deep = replace(LAYER, kv_bytes_per_token=2000, attend_macs=5000)
    model = ModelCosts((EMBEDDING, *[deep] * 6, HEAD))
    devices = tuple(replace(d, attend_macs_per_s=3e8, prefill_attend_macs_per_s=5e8) for d in DEVICES)
    cluster = Cluster(devices, LINKS, "h")
    exact = Follower(Question(model, cluster, LOAD)).first_token(STAGES)
    assert first(run([Request(0.0, 100, 1)], model=model, cluster=cluster)) == pytest.approx(exact)
    # with a window of one the next chunk waits until the answer to the one before is back
    assert first(run([Request(0.0, 100, 1)], model=model, cluster=cluster, window=1)) > 1.5 * exact


@pytest.mark.parametrize("streams", [2, 6])
def test_streams_share_a_round_until_the_slowest_stage_is_always_taken(streams: int) -> None:
    load = replace(LOAD, streams=streams)
    predicted = figures(CLUSTER, STAGES, load, "throughput").tokens_per_s
    found = run([Request(0.0, 1, 400)] * streams)
    assert found.tokens_per_s == pytest.approx(predicted, rel=0.02)
    slowest = max(stage.seconds for stage in figures(CLUSTER, STAGES).stages)
    if streams == 6:
        assert 1 / predicted == pytest.approx(slowest, rel=0.04)  # a call's overhead is shared by two


def test_streams_that_wait_share_a_call() -> None:
    quick = tuple(replace(device, macs_per_s=1e12) for device in DEVICES)
    load = replace(LOAD, streams=8)
    cluster, stages = Cluster(quick, LINKS, "h"), [Assignment("a", 0, 8)]
    together = figures(cluster, stages, load, "throughput")
    found = run([Request(0.0, 1, 300)] * 8, cluster=cluster, stages=stages)
    # One group forms, and its rows wait for each other: a round is a call and two hops.
    (call,) = (stage.seconds for stage in together.stages)
    assert found.tokens_per_s == pytest.approx(8 / (call + 0.004), rel=0.02)
    assert together.tokens_per_s == pytest.approx(found.tokens_per_s, rel=0.01)
    assert found.tokens_per_s > 5 * figures(cluster, stages).tokens_per_s


@pytest.mark.parametrize("count", [2, 3])
def test_streams_that_share_a_call_beside_a_prompt_leave_it_most_of_the_time(count: int) -> None:
    """Weights take 1 ms a layer and call, a row 0.2 ms."""
    devices = tuple(replace(device, macs_per_s=5e9, step_overhead_s=2e-4) for device in DEVICES)
    cluster = Cluster(devices, {pair: LinkSpeed(1e-4, 1e8) for pair in LINKS}, "h")
    model = ModelCosts((EMBEDDING, *[LAYER] * 6, replace(HEAD, bytes=500_000, read_bytes=500_000)))
    stages = [[Assignment("a", 0, 4), Assignment("b", 4, 8)], STAGES][count - 2]
    prompt, options = Request(2.0, 2000, 1), {"model": model, "cluster": cluster, "stages": stages}
    alone = first(run([prompt], **options)) - 2.0
    found = run([*[Request(0.0, 1, 1500)] * 3, prompt], **options)
    assert first(found, 3) - 2.0 < 1.3 * alone
    gaps = [pair for own in found.tokens_at[:3] for pair in itertools.pairwise(own)]
    quiet = statistics.median(b - a for a, b in gaps if 1.0 < b < 2.0)
    beside = [(b - a) / quiet for a, b in gaps if b > 2.0 and a < first(found, 3)]
    assert statistics.median(beside) < 2.2 and max(beside) < 3.0


def test_a_stage_costs_what_its_units_do() -> None:
    """A call as a whole, against sums over units and steps."""
    deep = replace(LAYER, kv_bytes_per_token=2000, attend_macs=5000)
    mixed = replace(deep, macs=7_000_000, fixed_state_bytes=30_000)
    model = ModelCosts((EMBEDDING, deep, LAYER, mixed, HEAD))
    device = replace(
        DEVICES[0], row_rates=((1, 1e9), (8, 3e9)), attend_macs_per_s=3e8, prefill_attend_macs_per_s=5e8
    )
    for a, b in itertools.combinations(range(6), 2):
        found, units = StageCost(model, device, a, b), model.units[a:b]
        for batch, depth in ((1, 0), (1, 70), (3, 50)):
            exact = 1e-4 + sum(cost.decode_seconds(unit, device, batch, depth) for unit in units)
            assert found.call_seconds([(1, depth, True)] * batch) == pytest.approx(exact)
            assert found.decode_seconds(batch, depth) == pytest.approx(exact)
        body = units[:-1] if b == 5 else units
        for rows, position, wants in ((32, 0, False), (20, 64, True)):
            exact = 1e-4 + sum(cost.chunk_seconds(unit, device, rows, position) for unit in body)
            if b == 5 and wants:
                exact += cost.decode_seconds(HEAD, device, 1, position + rows - 1)
            assert found.call_seconds([(rows, position, wants)]) == pytest.approx(exact)


def equal_split(cluster: Cluster) -> list[Assignment]:
    names = [device.name for device in cluster.devices]
    edges = [round(8 * at / len(names)) for at in range(len(names) + 1)]
    return [Assignment(name, a, b) for name, a, b in zip(names, edges, edges[1:], strict=False)]


def test_a_death_is_a_wait_and_a_replay() -> None:
    request = [Request(0.0, 100, 40)]
    calm = run(request)
    step = figures(CLUSTER, STAGES).step_seconds
    died = first(calm) + 9.5 * step  # ten tokens are there
    found = run(request, events=[Event(died, "b", "die")], recover_s=0.7, replan=equal_split)
    assert found.tokens == 40
    assert found.recoveries == 1
    assert found.stages == (Assignment("a", 0, 4), Assignment("c", 4, 8))
    left = Cluster((DEVICES[0], DEVICES[2]), {e: link for e, link in LINKS.items() if "b" not in e}, "h")
    known = replace(LOAD, prompt_tokens=110)
    replay = Follower(Question(MODEL, left, known)).first_token(found.stages)
    after = figures(left, found.stages).step_seconds
    assert found.seconds == pytest.approx(died + 0.7 + replay + 29 * after)


def test_a_death_in_the_middle_of_anything_loses_nothing() -> None:
    rng = random.Random(5)
    for _ in range(150):
        requests = [Request(rng.uniform(0, 0.2), rng.randint(1, 300), 5) for _ in range(3)]
        deaths = [Event(rng.uniform(0, 0.5), name, "die") for name in rng.sample("abc", 2)]
        found = run(requests, events=deaths[: rng.randint(1, 2)], recover_s=0.3, replan=equal_split)
        assert found.tokens == 15


def test_two_deaths_at_once_make_one_recovery() -> None:
    deaths = [Event(0.1, "a", "die"), Event(0.2, "c", "die")]
    found = run([Request(0.0, 1, 50)], events=deaths, recover_s=0.5, replan=equal_split)
    assert (found.recoveries, [stage.device for stage in found.stages]) == (1, ["b"])


def test_what_is_no_request_and_no_plan_is_refused() -> None:
    for wrong in ((0.0, 0, 5), (0.0, 5, 0), (-1.0, 5, 5)):
        with pytest.raises(ValueError, match="a request's"):
            Request(*wrong)
    for stages in ([Assignment("a", 0, 7)], [Assignment("a", 0, 5), Assignment("b", 4, 8)]):
        with pytest.raises(ValueError, match="must cover units 0 to 8"):
            run([Request(0.0, 1, 1)], stages=stages)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda: Event(-1.0, "b", "die"), "an event's time"),
        (lambda: Event(0.0, "", "die"), "an event's device"),
        (lambda: Event(0.0, "b", "freeze"), "kind slow or die"),
        (lambda: Event(0.0, "b", "slow", 0.0), "an event's factor"),
        (lambda: Rules(chunk_rows=0), "chunk_rows"),
        (lambda: Rules(window=0), "window"),
        (lambda: Rules(recover_s=-1.0), "recover_s"),
        (lambda: Rules(look_every_s=float("nan")), "look_every_s"),
    ],
)
def test_events_and_rules_that_are_none_are_refused(wrong: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        wrong()


def test_a_plan_after_a_death_that_leaves_units_out_is_refused() -> None:
    def replan(cluster: Cluster) -> list[Assignment]:
        return equal_split(cluster)[:1]

    with pytest.raises(ValueError, match="must cover units 0 to 8"):
        run([Request(0.0, 1, 50)], events=[Event(0.05, "b", "die")], replan=replan)


@pytest.mark.parametrize("length", ["--prompt", "--answer"])
def test_the_benchmark_takes_requests_of_one_token(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], length: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["simulate", "--devices", "4", "--requests", "30", length, "1"])
    main()
    assert capsys.readouterr().out.startswith("4 devices x 30 requests")
    monkeypatch.setattr(sys, "argv", ["simulate", length, "0"])
    with pytest.raises(SystemExit):
        main()
    assert f"argument {length}: '0' is not a whole number above 0" in capsys.readouterr().err


def test_the_benchmark_needs_two_devices(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["simulate", "--devices", "1"])
    with pytest.raises(SystemExit):
        main()
    assert "--devices: two at least" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_nothing_is_lost_whichever_dies_and_whenever(name: str) -> None:
    requests = random_requests(1, 12, 4.0, (1, 90), (5, 30))
    for at in (0.01, 1.234, 3.0):
        found = run(requests, events=[Event(at, name, "die")], recover_s=0.3, replan=equal_split)
        assert found.tokens == sum(request.answer for request in requests)
        assert None not in found.done_at
        assert name not in [stage.device for stage in found.stages]


def test_a_death_without_a_plan_is_an_error_unless_nobody_needs_the_device() -> None:
    with pytest.raises(ValueError, match="b dies, and there is nobody to take over"):
        run([Request(0.0, 1, 50)], events=[Event(0.05, "b", "die")])
    stages = [Assignment("a", 0, 4), Assignment("c", 4, 8)]
    calm = run([Request(0.0, 1, 50)], stages=stages)
    assert run([Request(0.0, 1, 50)], stages=stages, events=[Event(0.05, "b", "die")]) == calm


def test_a_device_that_gets_hot_paces_the_others_until_they_take_its_layers() -> None:
    requests = [Request(0.0, 1, 300)] * 6
    hot = [Event(0.5, "b", "slow", 4.0)]
    calm, slow = run(requests), run(requests, events=hot)
    helped = run(requests, events=hot, look_every_s=0.1)
    assert (calm.changes, slow.changes) == (0, 0)
    assert calm.stages == slow.stages
    # b's three layers at 4 ms each: one more call and hop for what is left of them would not pay
    assert helped.changes == 1
    assert helped.stages == (Assignment("a", 0, 5), Assignment("c", 5, 8))
    assert calm.seconds < helped.seconds < 0.6 * slow.seconds
    assert helped.tokens == slow.tokens == 1800
    # nothing moves where nothing is gained
    assert run(requests, look_every_s=0.1).changes == 0


def test_the_same_seed_is_the_same_run() -> None:
    requests = random_requests(7, 20, 5.0, (1, 60), (1, 20))
    assert requests == random_requests(7, 20, 5.0, (1, 60), (1, 20))
    assert requests != random_requests(8, 20, 5.0, (1, 60), (1, 20))
    assert run(requests, look_every_s=0.2) == run(requests, look_every_s=0.2)
