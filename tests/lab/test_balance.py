"""Figures of bench.balance, and what its runs rest on: literals in, literals out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from bench.balance import __main__ as balance
from bench.balance import audit, figures
from bench.balance.changes import shifted
from bench.balance.company import company
from bench.balance.play import Cast, Trace
from bench.lab.air import _Purpose
from bench.lab.hello import frame_bytes, said
from tests.models import smollm2_dir, tiny_chat_model

from shoal import house
from shoal.engine.model_directory import Model
from shoal.net.identity import Identity
from shoal.net.wire import WireProtocol
from shoal.planner import Assignment
from shoal.processes import NodeSpec

EVEN = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
HOLE = [0.5, 1.5, 4.5, 5.5]


@pytest.mark.parametrize(
    ("times", "start", "end", "tokens"),
    [
        ([EVEN], 0.0, 6.0, 6),
        ([EVEN, HOLE], 0.0, 6.0, 10),
        ([EVEN, HOLE], 1.5, 4.5, 4),  # after the start, and not after the end
        ([[], HOLE], 1.6, 4.4, 0),
    ],
)
def test_tokens_between_two_times(times: list[list[float]], start: float, end: float, tokens: int) -> None:
    assert figures.count(times, start, end) == tokens
    assert figures.speed(times, start, end) == pytest.approx(tokens / (end - start))
    assert figures.lost(times, start, end, 2.0) == pytest.approx(2 * (end - start) - tokens)


@pytest.mark.parametrize(
    ("own", "start", "end", "longest"),
    [
        (EVEN, 0.0, 6.0, 1.0),
        (HOLE, 0.0, 6.0, 3.0),
        (HOLE, 2.0, 3.0, 3.0),  # a gap around both
        (HOLE, 0.5, 1.5, 1.0),
        (HOLE, 4.5, 9.0, 3.5),  # one that has not ended
        (HOLE, 7.0, 9.0, 2.0),
        ([], 1.0, 3.0, 2.0),
    ],
)
def test_the_longest_gap_is_of_all_that_the_span_touches(
    own: list[float], start: float, end: float, longest: float
) -> None:
    assert figures.gap(own, start, end) == longest
    assert figures.longest_gap([EVEN, own] if end <= 6 else [own], start, end) == max(longest, end <= 6)


def test_the_usual_gap_is_the_median_within_the_spans() -> None:
    own = [0.0, 1.0, 2.0, 9.0, 9.5, 10.0]
    assert figures.usual_gap(own, [(0.0, 2.0)]) == 1.0
    assert figures.usual_gap(own, [(8.0, 10.0), (0.0, 1.0)]) == 0.5
    with pytest.raises(ValueError, match="no two tokens"):
        figures.usual_gap(own, [(2.5, 8.0)])


@pytest.mark.parametrize(
    ("least", "after"),
    [(1.0, 0.0), (2.0, 3.0), (2.5, None)],
)
def test_a_speed_is_settled_when_it_stays(least: float, after: float | None) -> None:
    slow_then_quick = [*EVEN[1:4], *(3 + i / 2 for i in range(1, 15))]
    assert figures.settled([slow_then_quick], 0.0, 10.0, least, 2.0) == after


def test_a_speed_that_does_not_stay_is_not_settled() -> None:
    quick_then_slow = [*(i / 2 for i in range(1, 9)), 5.0, 6.0, 7.0, 8.0]
    assert figures.settled([quick_then_slow], 0.0, 8.0, 1.8, 2.0) is None


def test_changes_of_the_placement_are_counted_between_marks() -> None:
    trace = Trace([[1]], [[1.0]], [[7]], 0.0, {"start": 0.0, "drop": 4.0, "back": 9.0})
    trace.chains = [(-1.0, [["a", 0, 9]]), (5.0, [["a", 0, 5], ["b", 5, 9]]), (9.5, [["a", 0, 9]])]
    assert (trace.changes("start", "drop"), trace.changes("drop", "back")) == (0, 1)


@pytest.mark.parametrize(
    ("boundary", "units", "edges"),
    [(0, 1, [0, 4, 6, 9]), (0, -2, [0, 1, 6, 9]), (1, 2, [0, 3, 8, 9]), (1, 3, None), (0, -3, None)],
)
def test_units_move_over_one_boundary(boundary: int, units: int, edges: list[int] | None) -> None:
    stages = [Assignment("a", 0, 3), Assignment("b", 3, 6), Assignment("c", 6, 9)]
    if edges is None:
        with pytest.raises(ValueError, match=f"cannot move over the boundary {boundary}"):
            shifted(stages, boundary, units)
        return
    found = shifted(stages, boundary, units)
    assert [found[0].first, *(stage.last for stage in found)] == edges
    assert [stage.device for stage in found] == ["a", "b", "c"]


@pytest.mark.parametrize("cut", [1, 11, 12, 40])
def test_a_connection_is_for_what_its_hello_says_however_it_is_cut(cut: int) -> None:
    me = Identity("n1", 5, "0", 1, "aa")
    hello = b"".join(WireProtocol(True).send(me.hello("bulk")))
    assert (frame_bytes(hello), said(hello)) == (len(hello), ("bulk", "n1"))
    purpose = _Purpose()
    assert purpose.read(hello[:cut]) == ""
    assert purpose.read(hello[cut:] + b"more") == "bulk"
    assert purpose.read(b"and more") == "bulk"


@pytest.mark.parametrize("first", [b"GET / HTTP/1.1\r\n\r\n" * 4, b"SHOL\x04\x00\x01\x00\x02\x00\x00\x00{}"])
def test_a_connection_without_a_hello_is_for_something_else(first: bytes) -> None:
    purpose, seen = _Purpose(), ""
    for _ in range(2):
        seen = purpose.read(first)
    assert seen in ("", "other")  # an endless frame never ends
    assert seen == "other" or frame_bytes(first) > 2 * len(first)


def test_answers_that_differ_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs: list[Any] = []

    def alone(checkout: object, model: object, job: str, **more: Any) -> Any:
        jobs.append(more)
        return {"runs": [{"tokens": [[5, 6, 7, 8], [1, 2, 3, 4]]}]}

    monkeypatch.setattr(audit, "alone", alone)
    found = audit.Audit(None)  # type: ignore[arg-type]
    found.add("one", 16, [[5, 6, 7], [1, 2, 3, 4]])
    found.add("two", 16, [[5, 9, 7]])
    assert found.problems() == ["two: stream 0 is not what one process answers from token 1 on"]
    assert jobs == [{"prompt": 16, "tokens": 4, "batches": [2]}]


@pytest.mark.lab
@pytest.mark.whole_lab
@pytest.mark.slow
def test_a_move_in_the_lab_sends_the_keys_and_values_of_its_layer_and_changes_no_answer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = tmp_path / "found.json"
    scene = ["standstill", str(smollm2_dir()), "--modes", "move", "--rounds", "1", "-o", str(found)]
    assert balance.main([*scene, "--moves", "4", "--beside", "0", "--streams", "2"]) == 0
    assert capsys.readouterr().out.endswith("every answer is that of one process\n")
    samples = {sample["figure"]: sample["value"] for sample in json.loads(found.read_text())["samples"]}
    assert 1.0 <= samples["a layer moves, 2 streams: bytes sent, of the keys and values of the layers"] < 1.05


@pytest.mark.slow
def test_the_house_of_who_runs_it_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    (tmp_path / "config" / "shoal").mkdir(parents=True)
    (tmp_path / "config" / "shoal" / house.HOUSE).touch(0o600)  # damaged: whoever uses it fails
    tiny_chat_model(tmp_path)
    specs = [NodeSpec("n1", 300, options=("--measure-seconds", "0.01"))]
    with company(tmp_path / "tiny", specs, tmp_path) as nodes:
        nodes.members[0].start()
        cast = Cast(Model.open(tmp_path / "tiny"), [nodes.members[0].address], 64)
        assert [stage.device for stage in cast.chain(1)] == ["n1"]


def test_an_unknown_mode_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"--modes fly: the modes are move, reload, off"):
        balance.main(["steady", "--modes", "move,fly"])
