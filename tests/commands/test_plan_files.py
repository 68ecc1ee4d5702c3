"""What `shoal plan` says where nodes do not hold the files of all units."""

import itertools
from pathlib import Path

import pytest

from shoal.cli import main
from shoal.engine.model_directory import Model
from shoal.engine.stage import StageOptions
from shoal.held_files import fetched_directory, make_skeleton
from shoal.plan_files import plan_by_files
from shoal.planner import Cluster, Device, LinkSpeed, Question, Workload
from shoal.planning import plan_that_fits, planner_model
from shoal.private import Planned
from shoal.processes import NodeSpec, nodes


def plan(question: Question) -> Planned:
    return plan_that_fits(question, shrink=False)


def test_a_plan_keeps_to_the_files_that_are_there_and_says_what_others_would_bring(tiny_llama: Model) -> None:
    slow, fast = Device("slow", 10**9, 1e6, 1e6), Device("fast", 10**9, 1e9, 1e9)
    links = {ends: LinkSpeed(0.001, 1e7) for ends in itertools.permutations(["slow", "fast"], 2)}
    asked = Question(
        planner_model(tiny_llama, StageOptions()), Cluster((slow, fast), links, "slow"), Workload(32)
    )
    (best, _), said = plan_by_files(tiny_llama, asked, {}, plan)
    assert ([stage.device for stage in best.stages], said) == (["fast"], "")
    (found, _), said = plan_by_files(tiny_llama, asked, {"fast": frozenset()}, plan)
    assert [stage.device for stage in found.stages] == ["slow"]
    assert said.startswith(f"this plan keeps to the files that the nodes hold; for {best.tokens_per_s:.3g} ")
    (found, _), said = plan_by_files(tiny_llama, asked, {"slow": frozenset()}, plan)
    assert (found, said) == (best, ""), "what the slow one lacks, nobody needs"


def test_nodes_that_have_nothing_yet_are_planned_for_and_it_is_said(
    tiny_llama: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    small = {
        name: (tiny_llama.path / name).read_bytes() for name in ("config.json", *tiny_llama.index.common)
    }
    fetched_directory().mkdir(parents=True)
    path = make_skeleton(tiny_llama.hash, (tiny_llama.path / "index.json").read_bytes(), small)
    spec = NodeSpec("phone", 500, options=("--measure-seconds", "0.1"))
    with nodes(path, [spec], tmp_path) as (phone,):
        host, port = phone.address
        assert main(["plan", str(tiny_llama.path), "--nodes", f"{host}:{port}"]) == 0
    out, err = capsys.readouterr()
    assert "phone" in out and "before the nodes answer by this plan, they fetch 0.3 MB" in err
