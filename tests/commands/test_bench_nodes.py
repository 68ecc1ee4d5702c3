"""`shoal bench --nodes`: which options go together, what a repetition computes, and how a lap is split."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shoal.benchmark import Case
from shoal.chain_benchmark import check_chain
from shoal.cli import main
from shoal.engine.convert import convert
from shoal.engine.errors import ContextError, NoPlanError, ShoalError
from shoal.engine.model_directory import Model
from shoal.net.errors import NetError
from shoal.net.messages import MOST_SESSIONS
from shoal.processes import NodeSpec, RunningNode, nodes

CHECKPOINT = Path(__file__).resolve().parents[1] / "fixtures/tiny-llama"
NOBODY = "127.0.0.1:1,127.0.0.1:2"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Model:
    target = tmp_path_factory.mktemp("models") / "tiny"
    convert(CHECKPOINT, target)
    return Model.open(target)


@pytest.fixture(scope="module")
def running(tiny: Model, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[RunningNode]]:
    options = ("--measure-seconds", "0.01")
    specs = [NodeSpec(name, ram_mb=300, options=options) for name in ("left", "right")]
    with nodes(tiny.path, specs, tmp_path_factory.mktemp("nodes")) as started:
        yield started


def bench(model: Model, flags: str) -> int:
    return main(["--traceback", "bench", str(model.path), *flags.split()])


def at(running: list[RunningNode]) -> str:
    return ",".join(f"{host}:{port}" for host, port in (node.address for node in running))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--nodes {} -t 1", "--threads does not go with --nodes"),
        ("--nodes {} --backend numpy", "--backend does not go with --nodes"),
        ("--nodes {} --isa scalar", "--isa does not go with --nodes"),
        ("--nodes {} --resident", "--resident does not go with --nodes"),
        ("--nodes {} --no-resident", "--resident does not go with --nodes"),
        ("--layers 1,2", "it needs --nodes"),
        ("--nodes 127.0.0.1:1,127.0.0.1:1", "an address twice"),
        ("--nodes {} -p 0 -n 0", "nothing to measure"),
        (f"--nodes {{}} -p 0 -n 4 --batch {MOST_SESSIONS + 1}", f"at most {MOST_SESSIONS} sequences"),
    ],
)
def test_options_that_contradict_each_other(tiny: Model, flags: str, words: str) -> None:
    with pytest.raises(ShoalError, match=words):
        bench(tiny, flags.format(NOBODY))


def test_an_answer_needs_room_in_the_context(tiny: Model) -> None:
    context = tiny.config.context
    check_chain([Case(1, 2, context - 3, 0, 1), Case(1, 2, 0, context - 2, 8)], tiny)
    for case in (Case(1, 2, context - 2, 0, 1), Case(1, 2, 0, context - 1, 1), Case(1, context - 1, 0, 1, 1)):
        with pytest.raises(ContextError, match=f"over nodes needs a context of {context + 1} tokens"):
            check_chain([case], tiny)


@pytest.mark.slow
def test_nobody_there_is_an_error_of_the_network(tiny: Model) -> None:
    with pytest.raises(NetError):
        bench(tiny, f"--nodes {NOBODY} -p 4 -n 0")


@pytest.mark.slow
def test_json_says_what_each_stage_computed(
    tiny: Model, running: list[RunningNode], capsys: pytest.CaptureFixture[str]
) -> None:
    """Repetitions start from their depth: no row before it is computed again."""
    flags = f"--nodes {at(running)} --layers 1,2 -p 40 -n 5 -d 0,33 -r 3 --batch 1,3 -o json"
    assert bench(tiny, flags) == 0
    output = capsys.readouterr()
    rows: list[dict[str, Any]] = json.loads(output.out)
    assert [(row["test"], row["n_sequences"]) for row in rows] == [
        ("pp40", 1), ("tg5", 1), ("pp40 @ d33", 1), ("tg5 @ d33", 1), ("tg5", 3), ("tg5 @ d33", 3)
    ]  # fmt: skip
    for row in rows:
        tokens = (row["n_prompt"] or row["n_gen"]) * row["n_sequences"]
        assert row["samples_ts"] == pytest.approx([tokens * 1e9 / ns for ns in row["samples_ns"]])
        assert len(row["samples_ns"]) == 3
        stages = row["nodes"]
        assert [(s["node"], s["first"], s["last"]) for s in stages] == [("left", 0, 2), ("right", 2, 5)]
        for stage in stages:
            assert stage["calls"] * stage["rows_per_call"] == pytest.approx(3 * tokens)
            assert stage["ram_bytes"] > 1e7
        lap = statistics.mean(row["samples_ns"]) / (1 if row["n_prompt"] else row["n_gen"])
        assert row["lap_ns"] == pytest.approx(lap)
        assert row["lap_ns"] == pytest.approx(row["compute_ns"] + row["wire_ns"] + row["waiting_ns"])
        assert 0 < row["compute_ns"] < row["lap_ns"] and row["wire_ns"] > 0
        if row["n_prompt"]:
            spent = max(stage["calls"] * stage["call_ns"] for stage in stages) / 3
        else:
            spent = sum(stage["call_ns"] for stage in stages)
        assert row["compute_ns"] == pytest.approx(spent)
        assert (row["predicted_ts"] is None) == (row["test"] == "pp40 @ d33")
        assert row["model_hash"] == tiny.hash and row["open_ns"] > 0
    assert all(stage["calls"] == 15 for stage in rows[1]["nodes"])
    assert output.err.count("layers are given") == 4  # two plans of two nodes


@pytest.mark.slow
def test_table_and_csv_have_a_line_a_row(
    tiny: Model, running: list[RunningNode], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = f"--nodes {at(running)} -p 8 -n 4 -r 1"
    assert bench(tiny, f"{flags} -o csv") == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["test"] for row in rows] == ["pp8", "tg4"]
    assert all(float(row["lap_ns"]) > 0 and "nodes" not in row for row in rows)
    assert bench(tiny, f"{flags} --layers 2,1") == 0
    output = capsys.readouterr()
    header, rule, *lines = output.out.splitlines()
    assert [header.split("|")[i].strip() for i in (4, 6, 7)] == ["layers", "test", "t/s"]
    assert [[line.split("|")[i].strip() for i in (4, 6)] for line in lines] == [
        ["2+1", "pp8"],
        ["2+1", "tg4"],
    ]
    assert {len(text.split("|")) for text in (header, rule, *lines)} == {17}
    assert "one sequence" in output.err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layers", "error", "words"),
    [("3", ShoalError, "1 numbers for 2 devices"), ("1,1", (ShoalError, NoPlanError), "layers")],
)
def test_layers_that_are_not_the_models(
    tiny: Model, running: list[RunningNode], layers: str, error: type[ShoalError], words: str
) -> None:
    with pytest.raises(error, match=words):
        bench(tiny, f"--nodes {at(running)} --layers {layers} -p 8 -n 0")
