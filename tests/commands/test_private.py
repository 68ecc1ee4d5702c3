"""Whether both ends of a model stay home: as asked, or as it costs; and what a plan says of it."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest

from shoal.cli import main
from shoal.engine.convert import convert
from shoal.engine.errors import NoPlanError
from shoal.planner import Cluster, Device, LinkSpeed, ModelCosts, Question, Unit, Workload
from shoal.planner.home import with_second_range
from shoal.private import plan_ends, private_of

MB = 1_000_000
LAYER = Unit("layer", MB, MB, MB, 0, 0, 1000)
EMBEDDING = Unit("embedding", 4 * MB, 1000, 0, 0, 0, 1000)
HEAD = Unit("head", 4 * MB, 4 * MB, 4 * MB, 0, 0, 4, 500_000)
MODEL = ModelCosts((EMBEDDING, *[LAYER] * 6, HEAD), tied_bytes=4 * MB)
LAPTOP, PHONE = Device("laptop", 10 * MB, 1e9, 1e9), Device("phone", 12 * MB, 1e9, 1e9)
TINY = Path(__file__).parent.parent / "fixtures" / "tiny-llama"


def asked(*devices: Device, second: bool = True) -> Question:
    links = {pair: LinkSpeed(0.0005, 1e7) for pair in itertools.permutations([d.name for d in devices], 2)}
    where = Cluster(devices, links, "laptop")
    return Question(MODEL, with_second_range(MODEL, where, "laptop") if second else where, Workload(64))


def stages(question: Question, private: bool | None, home: str = "laptop") -> tuple[list[str], str]:
    plan, _ = plan_ends(question, {home} - {""}, private_of(private), shrink=False)
    assert plan.reasons
    return [stage.device for stage in plan.stages], plan.ends


def test_by_default_the_ends_stay_home_where_that_costs_little() -> None:
    """Of two devices that are as fast and need each other, the second range only adds the bytes of rows on
    the way back: 11.20 ms instead of 11.10. A faster phone alone needs 5 ms and the ids' way: 6.00 ms."""
    near = asked(LAPTOP, replace(PHONE, ram_bytes=7 * MB))
    chain, said = stages(near, None)
    assert chain == ["laptop", "phone", "end of laptop"]
    assert said == "both ends stay home, on laptop; that costs 0.9%: 89.28 tokens/s instead of 90.08"
    alone = asked(LAPTOP, replace(PHONE, read_bytes_per_s=2e9, macs_per_s=2e9))
    chain, said = stages(alone, None)
    assert chain == ["phone"]
    assert (
        said == "the ends do not stay home: that costs 26.8%: 121.94 tokens/s instead of 166.63 (--private)"
    )
    chain, said = stages(alone, True)
    assert chain == ["laptop", "phone", "end of laptop"]
    assert said == "both ends stay home, on laptop; that costs 26.8%: 121.94 tokens/s instead of 166.63"
    chain, said = stages(near, False)
    assert chain == ["phone", "laptop"] and not said


def test_a_device_that_holds_all_is_both_ends() -> None:
    chain, said = stages(asked(replace(LAPTOP, ram_bytes=20 * MB), PHONE, second=False), None)
    assert (chain, said) == (["laptop"], "both ends stay home, on laptop; that costs nothing")


def test_what_cannot_be_is_said() -> None:
    alone = asked(LAPTOP, PHONE, second=False)
    chain, said = stages(alone, None)
    assert (chain, said) == (["phone"], "the ends do not stay home: laptop has no room for both")
    with pytest.raises(NoPlanError, match=r"to stay home \(--private\), and no plan has both on laptop"):
        stages(alone, True)
    with pytest.raises(NoPlanError, match="and no node runs on this device"):
        stages(alone, True, home="")
    assert stages(alone, None, home="") == (["phone"], "")


def test_a_second_range_may_be_what_makes_a_plan() -> None:
    """A tied table in one place leaves room for a layer that two tables do not."""
    small = asked(replace(LAPTOP, ram_bytes=8 * MB), replace(PHONE, ram_bytes=4 * MB))
    chain, said = stages(small, None)
    assert chain == ["laptop", "phone", "end of laptop"]
    assert said == "both ends stay home, on laptop; otherwise there is no plan"


def test_the_context_is_reduced_for_what_was_asked_only() -> None:
    page = replace(MODEL, units=(EMBEDDING, *[replace(LAYER, kv_bytes_per_token=1000)] * 6, HEAD))
    question = replace(asked(LAPTOP, PHONE), model=replace(page, kv_page_tokens=256), workload=Workload(512))
    phone = replace(question.cluster.devices[1], ram_bytes=30 * MB)
    here = (replace(question.cluster.devices[0], ram_bytes=5 * MB), phone, question.cluster.devices[2])
    less = replace(phone, ram_bytes=8 * MB)
    for devices, private, context in ((here, "always", 512), ((here[0], less, here[2]), "always", 256)):
        where = Cluster(devices, question.cluster.links, "laptop")
        plan, workload = plan_ends(replace(question, cluster=where), {"laptop"}, private, shrink=True)  # type: ignore[arg-type]
        assert workload.context == context
        assert plan.stages[-1].device == "end of laptop"


def test_shoal_plan_shows_the_cost_beside_the_free_plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, devices = tmp_path / "tiny", tmp_path / "devices.toml"
    convert(TINY, model, dtype="int8")
    row = '[[device]]\nname = "{}"\nread_gb_per_s = {}\ngmac_per_s = 20\nram_mb = {}\nbase_mb = 1\n'
    link = "default_link = { latency_ms = 1, mbit_per_s = 100 }\n"
    devices.write_text(link + row.format("laptop", 1, 20) + row.format("phone", 200, 100))
    command = ["plan", str(model), "--devices", str(devices), "--context", "128"]
    assert main([*command, "--private", "--layers", "1,2", "--json"]) == 0
    given = json.loads(capsys.readouterr().out)["stages"]
    assert [(one["device"], one["first"], one["last"]) for one in given] == [
        ("laptop", 0, 2), ("phone", 2, 4), ("end of laptop", 4, 5),
    ]  # fmt: skip
    assert main([*command, "--private"]) == 0
    out = capsys.readouterr().out
    assert "Both ends stay home, on laptop; that costs nothing." in out or "; that costs " in out
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ends"] == ""
    devices.write_text('coordinator = "tv"\n' + link + row.format("laptop", 1, 20))
    assert main([*command, "--private"]) == 1
    assert "on the coordinator's device, and tv is none of the devices" in capsys.readouterr().err
