"""plan(): what it is asked, what it says when there is no plan or no solver, and the reasons it gives."""

import importlib
import itertools
import math
import random
import re
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from shoal.planner import milp, search, solve
from shoal.planner.evaluation import Infeasible, Plan, evaluate
from shoal.planner.rows import (
    Assignment,
    Cluster,
    Constraints,
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
from shoal.planner.tables import Goal, layers_alike, tables_of

LAYER = Unit("layer", 1_000_000, 1_000_000, 1_000_000, 0, 0, 1000)
EMBEDDING = Unit("embedding", 4_000_000, 1000, 0, 0, 0, 1000)
HEAD = Unit("head", 4_000_000, 4_000_000, 4_000_000, 0, 0, 4)
MODEL = ModelCosts((EMBEDDING, *[LAYER] * 6, HEAD), tied_bytes=4_000_000)
LOAD = Workload(context=64, sequences=4, streams=4)


def device(name: str, cap: int, rate: float = 1e9) -> Device:
    """One that computes no faster than it reads: streams gain nothing from sharing a call."""
    return Device(name, cap, rate, rate)


def cluster(*devices: Device, latency: float = 0.001) -> Cluster:
    names = ["head", *(d.name for d in devices)]
    links = {pair: LinkSpeed(latency, 1e9) for pair in itertools.permutations(names, 2)}
    return Cluster(devices, links, "head")


FAST, SLOW = device("fast", 20_000_000), device("slow", 20_000_000, 1e8)


def asked(
    model: ModelCosts, where: Cluster, objective: Objective = "latency", load: Workload = LOAD, **keep: Any
) -> Question:
    return Question(model, where, load, objective, Constraints(**keep))


def planned(question: Question, **options: Any) -> Plan:
    answer = plan(question, **options)
    assert isinstance(answer, Plan)
    return answer


def test_a_slow_device_gets_nothing_when_the_fast_one_has_room() -> None:
    found = planned(asked(MODEL, cluster(FAST, SLOW)))
    assert found.assignments == (Assignment("fast", 0, 8),)
    # embedding 1 us, six layers of 1 ms, the head 4 ms; two hops of 1 ms and 4 ns
    assert found.step_seconds == pytest.approx(0.010001 + 0.002, abs=1e-7)
    assert found.tokens_per_s == pytest.approx(1 / 0.012001, rel=1e-5)
    assert [stage.ram_bytes for stage in found.stages] == [10_000_000]
    assert found.optimal


def test_reasons_say_what_each_device_changes() -> None:
    found = planned(asked(MODEL, cluster(FAST, SLOW, device("tiny", 1000))))
    assert [(r.device, r.used) for r in found.reasons] == [("fast", True), ("slow", False), ("tiny", False)]
    # slow alone: 100.01 ms + 2 ms of hops
    assert found.reasons[0].text == "without it: 9.80 tokens/s instead of 83.33"
    # with it, at best: the embedding on slow (0.01 ms), and a third hop of 1.001 ms: 13.011 ms
    assert found.reasons[1].text == "with it: 76.86 tokens/s instead of 83.33"
    assert found.reasons[2].text == "its cap of 0.0 MB has no room for any unit"


def test_reasons_of_a_device_that_is_needed_alone_or_not_asked() -> None:
    two = cluster(device("a", 9_000_000), device("b", 9_000_000))
    assert [r.text for r in planned(asked(MODEL, two)).reasons] == [
        "needed: without it the model does not fit"
    ] * 2
    assert planned(asked(MODEL, cluster(FAST))).reasons[0].text == "the only device"
    ordered = planned(asked(MODEL, cluster(FAST, SLOW), order=("slow",)))
    assert [r.text for r in ordered.reasons] == [
        "left out by the order or the constraints given",
        "the only device",
    ]


def test_an_unreachable_device_is_left_out_and_said_so() -> None:
    links = {pair: LinkSpeed(0.001, 1e9) for pair in (("head", "fast"), ("fast", "head"))}
    found = planned(asked(MODEL, Cluster((FAST, SLOW), links, "head")))
    assert found.reasons[1].text == "no chain with room leads through it"
    assert found.alone[1].tokens_per_s is None
    assert not found.alone[1].possible


def test_what_is_needed_says_whether_for_its_ram_or_for_the_rest() -> None:
    pairs = [("head", "a"), ("a", "b"), ("b", "c"), ("c", "head")]
    three = tuple(device(name, 12_000_000) for name in "abc")
    found = planned(asked(MODEL, Cluster(three, {pair: LinkSpeed(0.001, 1e9) for pair in pairs}, "head")))
    assert [reason.text for reason in found.reasons] == ["needed: without it there is no plan"] * 3


def test_with_it_a_device_may_take_another_ones_place_and_order() -> None:
    """`late` comes in only where `first` is not."""
    ways = ["head first end head", "head late other end"]
    pairs = {pair for way in ways for pair in itertools.pairwise(way.split())}
    devices = [device(name, 9_000_000, 1e8 if name == "late" else 1e9) for name in ("first", "late", "other")]
    devices.append(device("end", 9_000_000))
    links = {pair: LinkSpeed(0.001, 1e9) for pair in pairs}
    found = planned(asked(MODEL, Cluster(tuple(devices), links, "head")))
    assert [stage.device for stage in found.stages] == ["first", "end"]
    assert found.reasons[1].text.startswith("with it: ")


def test_reasons_of_a_given_order_keep_to_it() -> None:
    """In any other order `mid` would be quicker at an end."""
    links = {pair: LinkSpeed(0.001, 1e9) for pair in itertools.permutations(("head", "a", "mid", "z"), 2)}
    links |= {("a", "mid"): LinkSpeed(0.5, 1e9), ("mid", "z"): LinkSpeed(0.5, 1e9)}
    devices = (device("a", 9_000_000, 1e8), device("mid", 9_000_000), device("z", 9_000_000, 1e8))
    found = planned(asked(MODEL, Cluster(devices, links, "head"), order=("a", "mid", "z")))
    assert [stage.device for stage in found.stages] == ["a", "z"]
    assert found.reasons[1].text.startswith("with it: ")
    assert float(found.reasons[1].text.split()[2]) <= found.tokens_per_s


def test_ends_that_are_given_do_not_hide_a_plan_of_many_devices() -> None:
    odd = [replace(LAYER, macs=1_000_000 + i) for i in range(14)]
    model = ModelCosts((EMBEDDING, *odd, HEAD))
    devices = [device(f"d{i}", 2_000_000) for i in range(10)]
    devices += [device("table", 5_000_000), device("top", 5_000_000)]
    wishes = {"first": "table", "last": "top"}
    found = planned(asked(model, cluster(*devices), **wishes))
    assert (found.stages[0].device, found.stages[-1].device) == ("table", "top")


@pytest.mark.parametrize("seed", range(6))
def test_a_prompt_in_chunks_is_judged_by_its_chunks(seed: int) -> None:
    rng = random.Random(seed)
    devices = [replace(device(n, 7_000_000, 10 ** rng.uniform(8, 10)), idle_overhead_s=1e-3) for n in "abc"]
    spread = cluster(*devices, latency=rng.uniform(1e-4, 1e-2))
    load = replace(LOAD, prompt_tokens=60, chunk_tokens=16, context=128)
    found = planned(asked(MODEL, spread, "first_token", load=load))
    assert not found.optimal
    best = math.inf
    for count in (1, 2, 3):
        for order in itertools.permutations("abc", count):
            for cuts in itertools.combinations(range(1, 8), count - 1):
                edges = (0, *cuts, 8)
                stages = [Assignment(*cut) for cut in zip(order, edges, edges[1:], strict=False)]
                given = evaluate(asked(MODEL, spread, load=load), stages)
                if all(stage.ram_bytes <= stage.cap_bytes for stage in given.stages):
                    best = min(best, given.first_token_seconds)
    assert best <= found.first_token_seconds <= 1.03 * best
    for reason in found.reasons:
        numbers = re.search(r"after (\d+) ms instead of (\d+)", reason.text)
        assert numbers is None or int(numbers[1]) >= int(numbers[2])


def test_each_device_alone_is_told_whether_or_not_it_fits() -> None:
    small = device("small", 7_000_000, 2e9)
    found = planned(asked(MODEL, cluster(FAST, small), "throughput"))
    assert [(alone.device, alone.missing_bytes, alone.possible) for alone in found.alone] == [
        ("fast", 0, True),
        ("small", 3_000_000, False),
    ]
    # A token takes fast 10.001 ms and small half of that. Four sequences take fast 40.004 ms and 2 ms on the
    # ways in one group; more groups would hide the ways, but gain less than 5 %. On small they gain more.
    assert found.alone[0].tokens_per_s == pytest.approx(4 / (4 * 0.010001 + 0.002))
    assert found.alone[1].tokens_per_s == pytest.approx(2 / 0.010001)
    assert found.best_alone == found.alone[0]


def test_many_streams_use_devices_that_one_stream_leaves_out() -> None:
    # The head unit takes 4 ms, so 6 + 4 ms split best as 5 + 5.
    twins = cluster(FAST, device("twin", 20_000_000))
    assert len(planned(asked(MODEL, twins, "latency")).stages) == 1
    found = planned(asked(MODEL, twins, "throughput"))
    assert [stage.last - stage.first for stage in found.stages] == [6, 2]
    assert found.step_seconds == pytest.approx(0.005001, rel=1e-3)


@pytest.mark.parametrize("method", ["milp", "dp"])
def test_a_link_of_low_rate_paces_many_streams_and_one_of_high_latency_does_not(method: Any) -> None:
    halves = cluster(device("a", 9_000_000), device("b", 9_000_000))
    links = {**halves.links, ("a", "b"): LinkSpeed(0.0, 1e5), ("b", "a"): LinkSpeed(0.012, 1e9)}
    uneven = Cluster(halves.devices, links, "head")
    one = planned(asked(MODEL, uneven, "latency"), method=method)
    # 1000 bytes take 10 ms from a to b; 12 ms from b to a, but the link only 1 us of them.
    assert [stage.device for stage in one.stages] == ["a", "b"]
    many = planned(asked(MODEL, uneven, "throughput"), method=method)
    assert [stage.device for stage in many.stages] == ["b", "a"]
    assert many.step_seconds == pytest.approx((0.012 + 0.002 + 0.010) / 4, rel=1e-3)


@pytest.mark.parametrize("objective", ["latency", "throughput"])
def test_no_ring_of_quick_devices_computes_beside_the_chain(objective: Any) -> None:
    """Two slow ones near the head, two quick ones near each other: layers must lie on the token's way."""
    near = [device("a", 12_000_000, 2e7), device("b", 12_000_000, 2e7)]
    quick = [device("c", 5_000_000, 1e10), device("d", 5_000_000, 1e10)]
    links = {
        (x, y): LinkSpeed(10.0 if (x in "cd") != (y in "cd") else 0.0, 1e9)
        for x, y in itertools.permutations(["head", "a", "b", "c", "d"], 2)
    }
    model = ModelCosts((EMBEDDING, *[LAYER] * 6, replace(HEAD, bytes=9_000_000)))  # too much for one device
    tables = tables_of(asked(model, Cluster((*near, *quick), links, "head")), Goal(objective, 4))
    chain, proved = milp.best_chain(tables, range(4), milp.load_solver())
    assert proved
    assert chain is not None
    assert sorted(j for j, _, _ in chain.stages) == [0, 1]
    assert chain.total == pytest.approx(0.5, abs=1e-3)  # 10 MB at 20 MB/s


def test_what_the_dp_finds_along_the_milps_order_may_be_worse(monkeypatch: pytest.MonkeyPatch) -> None:
    """The DP is not exact along an order for a prompt in chunks, where it gives up."""
    tables = tables_of(asked(MODEL, cluster(FAST, SLOW)), Goal("throughput", 4))
    fast, slow = (Chain(((j, 0, 8),), 0.0) for j in range(2))
    monkeypatch.setattr(solve.milp, "best_chain", lambda *args, **options: (fast, True))
    monkeypatch.setattr(solve.search, "best_chain", lambda *args: (slow, True))
    found = solve._by_milp(tables, range(2), milp.load_solver(), 10.0)
    assert found == (fast, True)


@pytest.mark.parametrize("method", ["milp", "dp"])
def test_missing_megabytes_are_counted(method: Any) -> None:
    answer = plan(asked(MODEL, cluster(device("a", 6_500_000), device("b", 6_500_000))), method=method)
    assert isinstance(answer, Infeasible)
    # 4 + 6 + 4 MB over two devices of 6.5 MB lack 1 MB; one device would lack 3.5 MB.
    assert (answer.missing_bytes, answer.exact) == (1_000_000, True)
    assert answer.reason.startswith("the RAM caps are 1.0 MB short in total: ")
    assert "promises 6.5 MB and would need 7.0 MB" in answer.reason


def test_adding_what_is_missing_makes_a_plan() -> None:
    tight = cluster(device("a", 3_000_000), device("b", 6_100_000))
    answer = plan(asked(MODEL, tight))
    assert isinstance(answer, Infeasible)
    by_name = {"a": 3_000_000, "b": 6_100_000 + answer.missing_bytes}
    assert isinstance(plan(asked(MODEL, cluster(*(device(n, c) for n, c in by_name.items())))), Plan)
    by_name["b"] -= 1
    assert isinstance(plan(asked(MODEL, cluster(*(device(n, c) for n, c in by_name.items())))), Infeasible)


def test_an_order_is_planned_and_its_lack_told() -> None:
    a, b = device("a", 9_000_000), device("b", 9_000_000, 2e9)
    free = planned(asked(MODEL, cluster(a, b)))
    assert [stage.device for stage in free.stages] == ["a", "b"]  # the head unit is read faster on b
    fixed = planned(asked(MODEL, cluster(a, b), order=("b", "a")))
    assert [stage.device for stage in fixed.stages] == ["b", "a"]
    assert fixed.method == "exact DP for the given order"
    assert fixed.step_seconds > free.step_seconds
    alone = plan(asked(MODEL, cluster(a, b), order=("b",)))
    assert isinstance(alone, Infeasible)
    assert alone.missing_bytes == 1_000_000


def test_without_a_way_round_links_are_what_is_missing() -> None:
    links = {("head", "fast"): LinkSpeed(0.001, 1e9)}
    answer = plan(asked(MODEL, Cluster((FAST, SLOW), links, "head")))
    assert isinstance(answer, Infeasible)
    assert answer.missing_bytes == 0
    assert answer.reason == "no chain of links leads from the coordinator head through the devices and back"


def test_layers_that_differ_are_planned_all_the_same() -> None:
    odd = ModelCosts((EMBEDDING, LAYER, replace(LAYER, macs=2_000_000), HEAD))
    found = planned(asked(odd, cluster(FAST, SLOW)))
    assert found.method == "exact DP over all orders"
    by_milp = planned(asked(odd, cluster(FAST, SLOW)), method="milp")
    assert by_milp.method == "MILP (HiGHS, gap 0)"
    assert found.optimal and by_milp.optimal
    assert found.stages == by_milp.stages


def test_layers_are_alike_whatever_their_names() -> None:
    assert layers_alike(MODEL)
    assert layers_alike(ModelCosts((EMBEDDING, LAYER, replace(LAYER, name="layer 2"), HEAD)))
    assert not layers_alike(ModelCosts((EMBEDDING, LAYER, replace(LAYER, workspace_bytes=1), HEAD)))
    assert not layers_alike(ModelCosts((replace(EMBEDDING, cut_bytes=8), LAYER, HEAD)))


SIX = [device(f"s{i}", 20_000_000, 1e8 * (1 + i)) for i in range(6)]  # one more than the DP tries by itself


def test_without_pulp_the_dp_plans_and_the_milp_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pulp", None)
    found = planned(asked(MODEL, cluster(*SIX)))
    assert (
        found.method
        == "exact DP over all orders (the MILP needs PuLP and a solver: pip install 'shoal[plan]')"
    )
    with pytest.raises(milp.SolverMissing, match="pip install 'shoal"):
        plan(asked(MODEL, cluster(*SIX)), method="milp")


def test_a_solver_that_does_not_run_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    pulp = importlib.import_module("pulp")

    class Broken:
        """A program for another libc: there, and not to be started."""

        def __init__(self, **options: object) -> None:
            pass

        def available(self) -> bool:
            return True

        def actualSolve(self, problem: object) -> int:
            raise FileNotFoundError("no such interpreter")

    monkeypatch.setattr(pulp, "HiGHS", Broken)
    monkeypatch.setattr(pulp, "COIN_CMD", Broken)
    with pytest.raises(milp.SolverMissing, match="pkg install coinor-cbc"):
        milp.load_solver()
    assert planned(asked(MODEL, cluster(*SIX))).method.startswith("exact DP over all orders (PuLP finds no")


def test_a_highs_that_prints_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda package: milp.TALKATIVE[0])
    with pytest.raises(milp.SolverMissing, match=r"no highs that runs here: pip install 'highspy!="):
        milp.load_solver("highs")


def test_a_milp_without_an_answer_leaves_the_dp_plan_unproved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(milp, "best_chain", lambda *args, **options: (None, True))
    found = planned(asked(MODEL, cluster(FAST, SLOW)), method="milp")
    assert found.assignments == (Assignment("fast", 0, 8),)
    assert not found.optimal


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "speed"}, "unknown objective 'speed'; there are latency, throughput"),
        ({"order": ("fast", "who")}, "there is no device who; there are fast, slow"),
        ({"order": ("fast", "fast")}, "names a device twice"),
        ({"order": ()}, "names no device"),
    ],
)
def test_a_bad_question_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        asked(MODEL, cluster(FAST, SLOW), **options)


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown method 'guess'"):
        plan(asked(MODEL, cluster(FAST, SLOW)), method="guess")  # type: ignore[arg-type]


def test_given_stages_are_evaluated_even_over_their_caps() -> None:
    small = cluster(FAST, device("small", 5_000_000))
    found = evaluate(asked(MODEL, small), [Assignment("small", 0, 4), Assignment("fast", 4, 8)])
    assert [stage.ram_bytes for stage in found.stages] == [7_000_000, 7_000_000]
    assert [stage.cap_bytes for stage in found.stages] == [5_000_000, 20_000_000]
    assert found.step_seconds == pytest.approx(0.003001 + 0.007 + 0.003, abs=1e-5)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([], "must cover units 0 to 8"),
        ([Assignment("fast", 0, 7)], "must cover units 0 to 8"),
        ([Assignment("fast", 0, 3), Assignment("slow", 4, 8)], "without gap or overlap"),
        ([Assignment("fast", 0, 3), Assignment("fast", 3, 8)], "one stage only"),
        ([Assignment("who", 0, 8)], "no device who"),
    ],
)
def test_stages_that_are_no_plan_are_refused(stages: list[Assignment], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(asked(MODEL, cluster(FAST, SLOW)), stages)


@pytest.mark.parametrize("objective", ["latency", "throughput"])
def test_local_search_over_many_orders_finds_a_plan_near_the_best(objective: Any) -> None:
    devices = [device(f"d{i}", 2_500_000 + 400_000 * i, 1e9 / (1 + i % 3)) for i in range(8)]
    spread = cluster(*devices, latency=0.0002)
    tables = tables_of(asked(MODEL, spread), Goal(objective, 4))
    exact, proved = search.search_orders(tables, range(8))
    found, unproved = search.search_orders(tables, range(8), exact_devices=1)
    assert (proved, unproved) == (True, False)
    assert exact is not None
    assert found is not None
    assert exact.total <= found.total <= 1.2 * exact.total


def test_planning_imports_no_solver_until_it_solves() -> None:
    code = "import sys, shoal.planner; print(sorted({'pulp', 'highspy', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
