"""What the lab's studies enumerate, keep and say, without a lab."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from bench.lab import promise, rivals, validate
from bench.lab.exhaustive import every, shapes
from bench.lab.lab import LabNode
from bench.lab.results import Results
from bench.lab.runs import tokens_for
from bench.lab.spec import DeviceSpec, LabSpec, LinkSpec, read_spec

from shoal import planner
from shoal.engine.errors import ShoalError
from shoal.planner.cost import range_ram_bytes

LAYER = planner.Unit("layer", 10_000_000, 10_000_000, 10_000_000, 100, 0, 4000)
TABLE = planner.Unit("table", 20_000_000, 4000, 0, 0, 0, 4000)
HEAD = planner.Unit("head", 20_000_000, 20_000_000, 20_000_000, 0, 0, 4)
ROWS = planner.ModelCosts((TABLE, *[LAYER] * 5, HEAD))
DEVICES = tuple(
    planner.Device(
        name, cap * 1_000_000, rate * 1e9, 9e9, 2_000_000, 1e-4, row_rates=((1, rate * 1e9), (4, 4e9))
    )
    for name, cap, rate in (("a", 60, 3.0), ("b", 50, 1.0), ("c", 45, 0.5))
)
ENDS = ("head", "a", "b", "c")
LINKS = {(x, y): planner.LinkSpeed(0.002, 1e7) for x in ENDS for y in ENDS if x != y}
CLUSTER = planner.Cluster(DEVICES, LINKS, "head")


@pytest.mark.parametrize("streams", [1, 3])
def test_the_first_of_all_plans_is_the_planners(streams: int) -> None:
    question = validate.asked(ROWS, CLUSTER, streams)
    candidates, count = every(question)
    best = planner.plan(question)
    assert isinstance(best, planner.Plan)
    assert candidates[0].tokens_per_s == pytest.approx(best.tokens_per_s, rel=1e-6 if streams == 1 else 0.03)
    assert count > len(shapes(candidates)) == len({candidate.devices for candidate in candidates})
    for candidate in candidates:
        found = planner.evaluate(question, candidate.stages)
        assert candidate.tokens_per_s == pytest.approx(found.tokens_per_s, rel=1e-9)
        assert all(stage.ram_bytes <= stage.cap_bytes for stage in found.stages)


def test_random_plans_keep_to_all_caps() -> None:
    workload = validate.asked(ROWS, CLUSTER, 1).workload
    rng = random.Random(0)
    seen = set()
    for _ in range(30):
        stages = promise.feasible(rng, ROWS, CLUSTER, workload)
        seen.add(tuple(stages))
        for stage in stages:
            device = CLUSTER.device(stage.device)
            assert range_ram_bytes(ROWS, device, workload, stage.first, stage.last) <= device.ram_bytes
        assert [stage.first for stage in stages] == [0, *[stage.last for stage in stages[:-1]]]
        assert stages[-1].last == len(ROWS.units)
    assert len(seen) > 5


def test_random_devices_hold_the_model_together() -> None:
    workload = validate.asked(ROWS, CLUSTER, 1).workload
    for seed in range(20):
        spec = promise.devices(random.Random(seed), ROWS, 2_000_000, workload)
        room = sum(device.cap_mb * 1_000_000 - 4_000_000 for device in spec.devices if device.cap_mb)
        assert 90_000_000 * 1.15 <= room <= 90_000_000 * 1.6


def test_a_result_is_made_once_and_kept(tmp_path: Path) -> None:
    path, made = tmp_path / "results.json", list[int]()

    def make() -> int:
        made.append(7)
        return 7

    assert Results(path).once("key", make) == Results(path).once("key", make) == 7
    assert made == [7]
    assert json.loads(path.read_text()) == {"key": 7}
    for wrong in ("[]", "{", "\xff"):
        path.write_text(wrong, encoding="latin-1")
        with pytest.raises(ShoalError, match=r"results\.json holds no results"):
            Results(path)


def test_nothing_measured_is_said_and_not_raised() -> None:
    assert promise.render({}, 50) == "no plan has run"


def test_what_a_file_lacks_is_measured_and_the_rest_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    setup = validate.read_setups(validate.SETUPS)[0]
    done = list[int]()

    def steady(_: object, streams: int, *__: object) -> dict[str, Any]:
        done.append(streams)
        return {"streams": streams}

    monkeypatch.setattr(validate, "_steady", steady)
    one = validate.validate(setup, [1], 3)
    assert validate.validate(setup, [4, 1], 3, one)["streams"] == [{"streams": 1}, {"streams": 4}]
    assert done == [1, 4]


def test_results_of_an_older_version_are_named_and_left_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"old": {"model": "m", "streams": [{"streams": 1}]}}))
    before = path.read_text()
    with pytest.raises(ShoalError, match="old: measured by an older version"):
        validate.main([str(path), "--again"])
    assert path.read_text() == before


def test_all_that_was_asked_for_is_there_or_the_exit_code_says_that_it_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def steady(_: object, streams: int, *__: object) -> dict[str, Any]:
        return {"streams": streams, "stages": [], "measured": 1.0, "predicted": 1.0, "simulated": 1.0}

    monkeypatch.setattr(validate, "_steady", steady)
    one = ["--only", validate.read_setups(validate.SETUPS)[0].name]
    results = str(tmp_path / "results.json")
    assert validate.main([results, *one, "--streams", "1"]) == 0
    assert validate.main([results, *one, "--streams", "1,4", "--seconds", "-1"]) == 1
    assert validate.main([results, *one, "--streams", "1,4"]) == 0
    assert validate.main([results, *one, "--streams", "1,4", "--seconds", "-1"]) == 0
    assert validate.main([results, "--streams", "1,4", "--seconds", "-1"]) == 1
    assert "predicted, 4 streams" in capsys.readouterr().out
    with pytest.raises(ShoalError, match=r"no set-up in .*setups\.toml has 'nowhere' in its name"):
        validate.main([results, "--only", "nowhere"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("device = 3", r"\[\[device\]\]"),
        ("device = [3]", "must be a table"),
        ('[[device]]\nname = "a"\nspeed = "x"', "speed must be a number"),
    ],
)
def test_a_lab_file_of_the_wrong_shape_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "lab.toml"
    path.write_text(text)
    with pytest.raises(ShoalError, match=message):
        read_spec(path)


def test_a_link_that_was_changed_is_still_so_when_it_is_mended(monkeypatch: pytest.MonkeyPatch) -> None:
    told = list[Any]()

    class Open:
        class ground:
            namespaces = True

        def command(self, line: bytes) -> None:
            pass

    monkeypatch.setattr("bench.lab.ground.set_rate", lambda number, rate: told.append(rate))
    monkeypatch.setattr("bench.lab.ground.set_carrier", lambda number, up: None)
    device = DeviceSpec("a", 0.5, LinkSpec(bytes_per_s=1e7))
    node = LabNode(0, device, None, None, "", Open())  # type: ignore[arg-type]
    node.link(LinkSpec(bytes_per_s=1e5))
    node.cut()
    node.mend()
    assert told == [1e5, 1e5]


def test_there_are_twelve_set_ups_that_differ() -> None:
    setups = validate.read_setups(validate.SETUPS)
    assert len({setup.name for setup in setups}) >= 12
    assert all(setup.lab.turns for setup in setups)
    assert {setup.model for setup in setups} == {
        "smollm2-135m", "smollm2-135m-int4", "llama-1.1b-random/int8", "llama-1.1b-random/int4",
    }  # fmt: skip
    assert {len(setup.lab.devices) for setup in setups} >= {2, 3, 4, 5}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[[setup]]\nname = "a"\n', r"\[\[setup\]\] a: model must be a text"),
        ('[[setup]]\nname = 3\nmodel = "m"\n', r"\[\[setup\]\] 3: name must be a text"),
        ("", r"a table of its own for each set-up: \[\[setup\]\]"),
        ("setup = 5", r"\[\[setup\]\]"),
        ('setup = ["a"]', r"\[\[setup\]\]"),
    ],
)
def test_a_file_that_holds_no_set_ups_is_named_with_the_reason(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "setups.toml"
    path.write_text(text)
    with pytest.raises(ShoalError, match=rf"setups\.toml: .*{words}"):
        validate.read_setups(path)


@pytest.mark.parametrize("streams", [1, 3])
def test_a_record_is_predicted_again_from_its_own_measurements(streams: int) -> None:
    stages = [planner.Assignment("a", 0, 4), planner.Assignment("b", 4, 7)]
    again = validate.cluster_of_json(json.loads(json.dumps(validate.cluster_json(CLUSTER))))
    assert again == CLUSTER
    found = validate.predictions(ROWS, again, stages, streams)
    question = validate.asked(ROWS, CLUSTER, streams)
    assert found["predicted"] == planner.evaluate(question, stages).tokens_per_s
    assert found["simulated"] == pytest.approx(found["predicted"], rel=0.1)


def test_the_table_says_how_far_predictions_are_off() -> None:
    row = {"streams": 1, "stages": [["a", 0, 7]], "predicted": 11.0, "simulated": 9.5, "measured": 10.0}
    other = {**row, "predicted": 7.0}
    text = validate.render(
        {"one": {"model": "m", "streams": [row]}, "two": {"model": "m", "streams": [other]}}
    )
    assert "| one | m | 1 | a 7 | 10.00 | 11.00 | +10% | 9.50 | -5% |" in text
    assert "predicted, 1 stream, 2 set-ups: off by 20.0% (median), 30.0% (worst), 1 within 15%" in text
    assert "simulated, 1 stream, 2 set-ups: off by 5.0% (median), 5.0% (worst), 2 within 15%" in text


def test_rivals_are_named_or_it_is_said_why_there_are_none() -> None:
    spec = LabSpec(tuple(DeviceSpec(d.name, 0.3, LinkSpec()) for d in DEVICES), "a")
    found, said = rivals.plans(ROWS, CLUSTER, spec, 1)
    assert {"ours", "equal", "best 1"} <= found.keys()
    assert found["ours"] == found["best 1"]
    assert "lingualinked" in found or "lingualinked" in said
    assert said["alone"].startswith("no device holds the model; missing: a 32 MB")
    runs = {
        "ours": [{"tokens_per_s": 6.0, "predicted": 5.0}],
        "equal": [{"tokens_per_s": 2.0, "predicted": 3.0}],
    }
    edges = {name: [[s.device, s.first, s.last] for s in found[name]] for name in runs}
    text = rivals.render({"lab model 1": {"plans": edges, "said": said, "runs": runs}})
    assert "ours is 3.00x of one stream on the equal split" in text
    assert "ours is 1.00 of the best measured, ours" in text
    runs["best 1"], edges["best 1"] = [{"tokens_per_s": 8.0, "predicted": 5.0}], edges["ours"]
    text = rivals.render({"lab model 1": {"plans": edges, "said": said, "runs": runs}})
    assert "5.00 | 7.00 | 6.00 to 8.00, 2 |" in text


@pytest.mark.parametrize("coordinator", [None, "b"])
def test_lingualinkeds_coordinator_is_a_device_whether_or_not_the_lab_names_one(
    coordinator: str | None,
) -> None:
    roomy = planner.Cluster(tuple(replace(d, ram_bytes=10**9) for d in DEVICES), LINKS, "head")
    spec = LabSpec(tuple(DeviceSpec(d.name, 0.3, LinkSpec()) for d in DEVICES), coordinator)
    found, said = rivals.plans(ROWS, roomy, spec, 1)
    assert "lingualinked" not in said
    assert found["lingualinked"][0].device == (coordinator or "a")


def test_several_streams_alone_are_not_compared_with_one() -> None:
    runs = {
        name: [{"tokens_per_s": speed, "predicted": 5.0}] for name, speed in (("ours", 6.0), ("equal", 3.0))
    }
    four = {"plans": {name: [["a", 0, 7]] for name in runs}, "said": {}, "runs": runs}
    four["plans"]["equal"] = [["b", 0, 7]]
    one = {**four, "runs": {"ours": runs["ours"], "equal": []}}
    for rows in ({"lab model 4": four}, {"lab model 1": one, "lab model 4": four}):
        text = rivals.render(rows)
        assert "of one stream" not in text
        assert text.rstrip().endswith("ours is 1.00 of the best measured, ours")


def test_what_was_promised_and_taken_is_summed_up() -> None:
    stage = {"promised": 100, "resident": 95, "cgroup": 80, "failcnt": 0, "faults": 0, "alive": True}
    over = {**stage, "resident": 115, "failcnt": 2, "faults": 1, "alive": False}
    text = promise.render({"0": {"plans": [[stage, over], [stage]]}}, 2)
    assert "2 plans, 3 stages, 1 nodes killed" in text
    assert "times at the cap: 2, in 1 stages" in text
    assert "-5.0% to +15.0%, within 10% in 2 of 3" in text


def test_a_run_stays_within_the_context() -> None:
    assert tokens_for(1000.0, 1, 128) == 112
    assert tokens_for(1.0, 1, 128) == 12
    assert tokens_for(20.0, 2, 128, seconds=4) == 40


def test_what_this_machine_did_not_do_steadily_is_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    setup = validate.read_setups(validate.SETUPS)[0]
    speeds = iter([(2.0, 3.0), (2.0, 2.6), (2.0, 2.1), (2.0, 2.0)])

    def record(*_: object) -> tuple[float, dict[str, Any]]:
        return 0.0, {"runs": [{"tokens_per_s": speed} for speed in next(speeds)]}

    monkeypatch.setattr(validate, "_record", record)
    (row,) = validate.validate(setup, [1], 2)["streams"]
    assert [run["tokens_per_s"] for run in row["runs"]] == [2.0, 2.1]
    speeds = iter([(2.0, 3.0), (2.0, 2.6), (2.0, 2.7), (2.0, 2.8)])
    (row,) = validate.validate(setup, [1], 2)["streams"]
    assert [run["tokens_per_s"] for run in row["runs"]] == [2.0, 2.6]
