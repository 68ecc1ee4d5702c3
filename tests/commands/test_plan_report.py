"""What people read of a plan, word for word, and what programs read."""

import itertools
import json
import math
from dataclasses import replace

import pytest

from shoal.plan_report import RunMeasurements, render, render_infeasible, to_json
from shoal.planner import (
    Assignment,
    Cluster,
    Device,
    Infeasible,
    LinkSpeed,
    ModelCosts,
    Objective,
    Plan,
    Question,
    Unit,
    Workload,
    evaluate,
    plan,
    units_text,
)

LAYER = Unit("layer", 1_000_000, 1_000_000, 1_000_000, 0, 0, 1000)
EMBEDDING = Unit("embedding", 4_000_000, 1000, 0, 0, 0, 1000)
HEAD = Unit("head", 4_000_000, 4_000_000, 4_000_000, 0, 0, 4)
MODEL = ModelCosts((EMBEDDING, *[LAYER] * 6, HEAD), tied_bytes=4_000_000)
LOAD = Workload(context=64, sequences=4)
LAPTOP = Device("laptop", 8_000_000, 1e9, 1e12, base_bytes=500_000)
PHONE = Device("phone", 12_000_000, 5e8, 1e12, step_overhead_s=0.0005)
WATCH = Device("watch", 1_500_000, 1e8, 1e12, base_bytes=700_000)
LINKS = {pair: LinkSpeed(0.002, 1e6) for pair in itertools.permutations(("laptop", "phone", "watch"), 2)}


def found(laptop: Device = LAPTOP, load: Workload = LOAD, objective: Objective = "latency") -> Plan:
    question = Question(MODEL, Cluster((laptop, PHONE, WATCH), LINKS, "laptop"), load, objective)
    answer = plan(question)
    assert isinstance(answer, Plan)
    return answer


# phone: 2 us for a row of the table, three layers of 2 ms, 0.5 ms a step; laptop: three layers of 1 ms and a
# head of 4 ms. Hops: 2 ms and 4 bytes, 2 ms and 1000 bytes, nothing.
EXPECTED = """\
device            units                   layers  RAM MB  cap MB    ms
  -> phone        4 bytes a token                                 2.00
phone             embedding + layers 1-3       3     7.0    12.0  6.50
  -> laptop       1,000 bytes a token                             3.00
laptop            layers 4-6 + LM head         3     7.5     8.0  7.00
  -> coordinator  4 bytes a token                                 0.00

Predicted 54.04 tokens/s (one sequence). First token of the prompt after 19 ms.
Found by exact DP over all orders, proved best.

One device alone: phone 40.80 tokens/s, slower than this plan (54.04).
  laptop  99.99 tokens/s, but it needs 10.5 MB, 2.5 MB over its cap
  phone   40.80 tokens/s
  watch   9.61 tokens/s, but it needs 10.7 MB, 9.2 MB over its cap

in   laptop  without it: 40.80 tokens/s instead of 54.04
in   phone   needed: without it the model does not fit
out  watch   its cap of 1.5 MB has no room for any unit
"""


def test_a_plan_as_text() -> None:
    assert render(found()) == EXPECTED


def test_measured_is_beside_predicted() -> None:
    run = RunMeasurements(
        tokens_per_s=50.0,
        stage_seconds={"laptop": 0.0075},
        alone_tokens_per_s={"laptop": 80.0, "phone": 40.0},
    )
    lines = render(found(), run).splitlines()
    assert lines[:6] == [
        "device            units                   layers  RAM MB  cap MB    ms  measured",
        "  -> phone        4 bytes a token                                 2.00         -",
        "phone             embedding + layers 1-3       3     7.0    12.0  6.50         -",
        "  -> laptop       1,000 bytes a token                             3.00         -",
        "laptop            layers 4-6 + LM head         3     7.5     8.0  7.00      7.50",
        "  -> coordinator  4 bytes a token                                 0.00         -",
    ]
    assert lines[7].startswith("Predicted 54.04 tokens/s (one sequence), measured 50.00 (prediction +8 %).")
    assert "  laptop  99.99 tokens/s, measured 80.00, but it needs 10.5 MB, 2.5 MB over its cap" in lines
    assert "  phone   40.80 tokens/s, measured 40.00" in lines


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (RunMeasurements(stage_seconds={"watch": 1.0}), "a stage was measured on watch, which has none"),
        (
            RunMeasurements(alone_tokens_per_s={"desk": 1.0}),
            "desk was measured alone, and the plan does not know it",
        ),
    ],
)
def test_a_measurement_of_something_else_is_refused(run: RunMeasurements, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        render(found(), run)


def test_several_sequences_are_named() -> None:
    streams = replace(LOAD, streams=4)
    assert "tokens/s (4 sequences together)." in render(found(load=streams, objective="throughput"))


def test_one_device_that_suffices_is_said() -> None:
    text = render(found(replace(LAPTOP, ram_bytes=20_000_000)))
    assert "One device alone: this plan is laptop alone." in text


def test_a_split_by_hand_hears_that_one_device_is_faster_and_what_does_not_fit() -> None:
    cluster = Cluster((replace(LAPTOP, ram_bytes=11_000_000), PHONE, WATCH), LINKS, "laptop")
    question = Question(MODEL, cluster, LOAD)
    text = render(evaluate(question, [Assignment("laptop", 0, 7), Assignment("watch", 7, 8)]))
    assert "One device alone: laptop 99.99 tokens/s, faster than this plan (19.61)." in text
    assert "watch is 3.2 MB over its cap." in text
    assert "Found by given stages." in text


def test_no_device_that_holds_all_is_said() -> None:
    short = Cluster((LAPTOP, replace(PHONE, ram_bytes=9_000_000)), LINKS_OF_TWO, "laptop")
    answer = plan(Question(MODEL, short, LOAD))
    assert isinstance(answer, Plan)
    assert "One device alone: none can hold the whole model under its cap." in render(answer)


LINKS_OF_TWO = {pair: link for pair, link in LINKS.items() if "watch" not in pair}


def test_an_answer_without_a_plan() -> None:
    tiny = Cluster((replace(PHONE, ram_bytes=6_250_001), WATCH), LINKS, "laptop")
    answer = plan(Question(MODEL, tiny, LOAD))
    assert isinstance(answer, Infeasible)
    # The phone would need 10 MB: 3,749,999 bytes more, rounded up.
    assert render_infeasible(answer) == (
        "No plan: the RAM caps are 3.8 MB short in total: phone promises 6.3 MB and would need 10.0 MB for"
        " embedding + layers 1-6 + LM head. Raise a cap, add a device, or shorten the context.\n"
    )
    assert render_infeasible(Infeasible(0, "no way")) == "No plan: no way. Add a link.\n"
    assert render_infeasible(Infeasible(0, "no files", files=True)) == "No plan: no files.\n"


def test_json_has_every_field() -> None:
    body = json.loads(to_json(found()))
    assert body["feasible"] is True
    assert body["stages"][0] == {
        "device": "phone",
        "first": 0,
        "last": 4,
        "seconds": pytest.approx(0.006502),
        "ram_bytes": 7_000_000,
        "cap_bytes": 12_000_000,
        "hop": {"seconds": pytest.approx(0.002004), "busy_seconds": pytest.approx(4e-6), "bytes": 4},
    }
    assert body["back"]["seconds"] == 0.0
    assert body["tokens_per_s"] == pytest.approx(54.04, abs=0.01)
    assert body["alone"][2]["missing_bytes"] == 9_200_000
    assert json.loads(to_json(Infeasible(5, "why"))) == {
        "feasible": False,
        "missing_bytes": 5,
        "reason": "why",
        "exact": True,
        "files": False,
    }


def test_json_holds_no_infinity() -> None:
    assert json.loads(to_json(replace(found(), tokens_per_s=math.inf)))["tokens_per_s"] is None


@pytest.mark.parametrize(
    ("first", "last", "text"),
    [
        (0, 1, "embedding"),
        (0, 2, "embedding + layer 1"),
        (0, 8, "embedding + layers 1-6 + LM head"),
        (3, 4, "layer 3"),
        (3, 6, "layers 3-5"),
        (7, 8, "LM head"),
        (6, 8, "layer 6 + LM head"),
    ],
)
def test_units_in_words(first: int, last: int, text: str) -> None:
    assert units_text(first, last, 8) == text
