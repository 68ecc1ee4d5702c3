"""The picture of a plan: as long as its token takes, nothing at two places at once, well-formed."""

import itertools
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from shoal import planner
from shoal.plan_svg import Bar, draw, schedule

LAYER = planner.Unit("layer", 1_000_000, 1_000_000, 1_000_000, 0, 0, 100_000)
MODEL = planner.ModelCosts((LAYER,) * 6)
DEVICES = tuple(planner.Device(name, 10**9, rate, rate) for name, rate in (("a<b", 1e9), ("c", 2e9)))
LINKS = {pair: planner.LinkSpeed(0.001, 1e8) for pair in itertools.permutations(("h", "a<b", "c"), 2)}
QUESTION = planner.Question(
    MODEL, planner.Cluster(DEVICES, LINKS, "h"), planner.Workload(64, sequences=6, streams=6)
)
PLAN = planner.evaluate(QUESTION, [planner.Assignment("a<b", 0, 3), planner.Assignment("c", 3, 6)])


def test_one_token_takes_what_the_plan_predicts() -> None:
    assert max(item.end for item in schedule(PLAN, 1)) == pytest.approx(PLAN.step_seconds)


def test_calls_follow_each_other_at_the_pace_of_the_slowest_stage() -> None:
    ends = sorted(item.end for item in schedule(PLAN, 5) if isinstance(item, Bar) and item.lane == 2)
    slowest = max(stage.seconds for stage in PLAN.stages)
    assert [b - a for a, b in itertools.pairwise(ends)] == pytest.approx([slowest] * 4)
    for lane in (1, 2):
        bars = [item for item in schedule(PLAN, 5) if isinstance(item, Bar) and item.lane == lane]
        assert all(a.end <= b.start for a, b in itertools.pairwise(sorted(bars, key=lambda bar: bar.start)))


def test_the_file_is_well_formed_and_has_a_bar_per_stage_and_a_line_per_hop() -> None:
    root = ElementTree.fromstring(draw(PLAN))
    tag = "{http://www.w3.org/2000/svg}"
    titles = [title.text or "" for title in root.iter(f"{tag}title")]
    calls = 1 + 6  # one call, and then six
    assert len([text for text in titles if text.startswith("hop")]) == 3 * calls
    assert len([text for text in titles if text.startswith("a<b: units 0 to 2, 3.00 ms")]) == calls
    texts = [text.text or "" for text in root.iter(f"{tag}text")]
    assert texts[0] == f"one token: {PLAN.step_seconds * 1e3:.2f} ms"
    assert [text for text in texts if text == "a<b"] == ["a<b"] * 2


def test_a_call_among_several_sequences_is_not_called_a_token_alone() -> None:
    """Stages that are kept busy pay no pause, and a token by itself does."""
    load = planner.Workload(64, sequences=6, streams=2)
    question = replace(QUESTION, workload=load, objective="throughput")
    found = planner.evaluate(question, PLAN.stages)
    assert "one call" in draw(found)
    assert "one token" not in draw(found)
