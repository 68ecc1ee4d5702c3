"""bench/lap.py, streams.py, press.py, first.py and opening.py: what they compute from logs and times, by
literals, and that each measures real nodes and notices an answer that differs."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from bench import chain, first, lap, opening, press, streams
from bench.chain import Checkout, even_layers, in_turns, same
from bench.rounds import Samples

from shoal.engine.costs import unit_cost
from shoal.engine.model_directory import Model


def test_layers_are_cut_where_the_longest_stage_is_shortest(
    tiny_llama: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = [0, 10, 10, 10, 10, 10, 10, 30]  # an embedding, six layers, and an LM head as large as three

    class Cost:
        def __init__(self, unit: int) -> None:
            self.read_bytes = reads[unit]

    monkeypatch.setattr(chain, "unit_cost", lambda model, unit: Cost(unit))
    monkeypatch.setattr(Model, "n_units", property(lambda model: len(reads)))
    assert even_layers(tiny_llama, 1, head=True) == [6]
    assert even_layers(tiny_llama, 2, head=True) == [4, 2]  # 40 and 50; 50 and 40 is as good
    assert even_layers(tiny_llama, 2, head=False) == [3, 3]
    assert even_layers(tiny_llama, 3, head=True) == [2, 3, 1]
    assert even_layers(tiny_llama, 3, head=False) == [2, 2, 2]
    assert even_layers(tiny_llama, 6, head=True) == [1] * 6
    with pytest.raises(ValueError, match="6 layers, too few for a chain of 7 nodes"):
        even_layers(tiny_llama, 7, head=True)


def test_the_layers_of_a_real_model_cover_it(tiny_llama: Model) -> None:
    assert unit_cost(tiny_llama, 4).read_bytes > 0
    for count in (1, 2, 3):
        found = even_layers(tiny_llama, count, head=True)
        assert len(found) == count and sum(found) == 3 and min(found) > 0


def test_a_lap_is_split_call_by_call() -> None:
    position = lap.WARM + 5
    stages = [
        [(10.0 + i, 10.25 + i, 1, position - lap.WARM + i) for i in range(lap.WARM + 2)],
        [(10.5 + i, 10.75 + i, 1, position - lap.WARM + i) for i in range(lap.WARM + 2)],
    ]
    prompt = [(1.0, 2.0, 8, 0)]
    (found,) = lap.laps([prompt + stages[0], prompt + stages[1]])
    assert (found.compute, found.ways, found.back, found.beside) == (0.5, (0.25,), 0.25, 0.5)
    with pytest.raises(ValueError, match="no lap"):
        lap.laps([prompt, prompt])


def test_percentiles() -> None:
    values = [float(i) for i in range(100, 0, -1)]
    assert lap.percentile(values, 0.5) == 51.0
    assert lap.percentile(values, 0.95) == 96.0
    assert lap.percentile([3.0], 0.95) == 3.0


def test_the_best_grouping() -> None:
    step_s = {1: 1.0, 2: 1.0, 3: 1.2, 4: 1.5, 8: 4.0}
    assert streams.groups(8, 3) == [3, 3, 2]
    assert streams.batches([8, 1]) == [1, 2, 3, 4, 8]
    assert streams.best(8, 1, step_s) == 8 / 3.0  # two groups of 4, one after the other: 8 rows cost more
    assert streams.best(8, 2, step_s) == 8 / 1.5  # two groups of 4; three need (1.2 + 1.2 + 1) / 2 = 1.7
    assert streams.best(8, 4, step_s) == 8 / 1.0  # four groups of 2
    assert streams.best(1, 4, step_s) == 1.0
    assert streams.best(4, 1, step_s) == 4 / 1.5
    assert streams.step_seconds([0.0, 1.0, 1.5, 2.0]) == 0.5


def test_gaps_are_those_that_touch_the_time_of_the_prompt() -> None:
    times = [[0.0, 1.0, 2.0, 6.0, 7.0], [0.5, 5.5]]
    assert press.gaps(times, 1.5, 5.0) == [1.0, 4.0, 5.0]
    assert press.gaps(times, 7.5, 9.0) == []


def test_ratios_are_within_a_round() -> None:
    samples = Samples()
    for number, (ours, theirs) in enumerate([(2.0, 1.0), (6.0, 2.0), (40.0, 10.0)]):
        samples.add("speed", "this", number, ours)
        samples.add("speed", "other", number, theirs)
    samples.add("speed", "this", 3, 1e9)
    assert samples.ratio("speed", "this", "other") == (3.0, 2.0, 4.0)
    assert samples.median("speed", "other") == 2.0
    assert samples.ratio("speed", "this", "nobody") is None
    first, second = samples.report("this").splitlines()[2:]
    assert first.split() == ["speed", "this", "23.000", "4"]
    assert second.split() == ["speed", "other", "2.000", "3", "3.00", "2.00", "to", "4.00"]


def test_turns_begin_with_another_one_each_round() -> None:
    seen: list[tuple[str, int]] = []

    def turn(name: str) -> Callable[[int], None]:
        return lambda number: seen.append((name, number))

    in_turns(2, [turn("a"), turn("b")])
    assert seen == [("a", 0), ("b", 0), ("b", 1), ("a", 1)]


def test_another_answer_is_an_error() -> None:
    same([[1, 2]], [[1, 2]])
    for found in ([1, 3], [1], [1, 2, 3]):
        with pytest.raises(RuntimeError, match="stream 1: the nodes and one process differ"):
            same([[5], [1, 2]], [[5], found])


def test_a_directory_without_shoal_is_no_checkout(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="there is no src/shoal"):
        lap.main(["smollm2-135m", "--against", str(tmp_path)])


def test_a_checkout_is_what_is_imported(tmp_path: Path) -> None:
    assert Checkout("this", tmp_path).environ()["PYTHONPATH"] == str(tmp_path / "src")


Main = Callable[[Sequence[str] | None], int]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("main", "flags", "figures"),
    [
        (lap.main, "--tokens 32", {"beside computing, ms, p95", "the way back, ms, p50", "tokens/s"}),
        (
            streams.main,
            "--nodes 1,2 --streams 1,3 --tokens 16",
            {"over 2 nodes: tokens/s, 3 streams", "over 1 node: rows a call, 1 stream"},
        ),
        (
            press.main,
            "--nodes 2 --streams 2 --prompt 96",
            {"over 2 nodes, 2 streams: prompt beside, of alone"},
        ),
        (first.main, "--nodes 2 --lengths 24,100", {"over 2 nodes: a prompt of 100, tokens/s"}),
        (opening.main, "--nodes 2", {"over 2 nodes: opens, s"}),
    ],
    ids=["lap", "streams", "press", "first", "opening"],
)
def test_each_measures_real_nodes(
    main: Main,
    flags: str,
    figures: set[str],
    tiny_llama: Model,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first one beside this checkout itself, as another."""
    monkeypatch.setattr(chain, "_MEASURE_SECONDS", 0.01)
    monkeypatch.setattr(lap, "_REST_SECONDS", 0.2)
    monkeypatch.setattr(lap, "_AT_START_SECONDS", 0.0)
    output = tmp_path / "out.json"
    against = ["--against", str(Path(__file__).resolve().parents[2])] if main is lap.main else []
    arguments = [str(tiny_llama.path), "--rounds", "1", "-o", str(output)]
    assert main([*arguments, *against, *flags.split()]) == 0
    document: dict[str, Any] = json.loads(output.read_text())
    assert document["model_hash"] == tiny_llama.hash
    for figure in figures:
        found = {s["program"]: s["value"] for s in document["samples"] if s["figure"] == figure}
        assert found.keys() >= ({"this", "other"} if against else {"this"})
        assert min(found.values()) > 0, figure


@pytest.mark.slow
def test_answers_that_differ_end_the_measurement(tiny_llama: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chain, "_MEASURE_SECONDS", 0.01)
    monkeypatch.setattr(chain, "even_layers", lambda model, count, head: [3])

    def another(*asked: Any, **job: Any) -> chain.Answer:
        found = chain.alone(*asked, **job)
        return {**found, "tokens": [[token[0] + 1] for token in found["tokens"]]}

    monkeypatch.setattr(first, "alone", another)
    with pytest.raises(RuntimeError, match="differ from token 0 on"):
        first.main([str(tiny_llama.path), "--rounds", "1", "--nodes", "1", "--lengths", "8"])
