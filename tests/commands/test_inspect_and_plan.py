"""`shoal inspect` and `shoal plan` as a person sees them, on a small real model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shoal.cli import main
from shoal.engine.convert import convert

TINY = Path(__file__).parent.parent / "fixtures" / "tiny-llama"
LAYER_MACS = 72 * (96 + 32 + 32) + 96 * 72 + 3 * 72 * 104  # q, k, v; o; gate, up, down

DEVICES = """
default_link = { latency_ms = 1, mbit_per_s = 100 }
[[device]]
name = "laptop"
read_gb_per_s = 20
gmac_per_s = 200
ram_mb = RAM
base_mb = 1
[[device]]
name = "phone"
read_gb_per_s = 5
gmac_per_s = 20
ram_mb = RAM
base_mb = 1
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("model") / "tiny"
    convert(TINY, target, dtype="int8")
    return target


def test_the_table_shows_every_op_once_for_layers_that_are_alike(
    tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(tiny)]) == 0
    out = capsys.readouterr().out
    assert "units 1 to 3: layer 0 to layer 2, each" in out
    assert "q.weight [96, 72], k.weight [32, 72], v.weight [32, 72]" in out
    assert f"{LAYER_MACS:,}" in out
    assert out.count("attend ") == 1


def test_json_holds_the_costs_of_every_unit(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tiny), "--json"]) == 0
    body = json.loads(capsys.readouterr().out)
    assert [unit["name"] for unit in body["units"]] == ["embed", "layer 0", "layer 1", "layer 2", "head"]
    layer = body["units"][1]
    assert layer["macs"] == LAYER_MACS
    assert layer["kv_bytes_per_token"] == 2 * 2 * 16 * 2  # keys and values, heads, head_dim, bytes of f16
    assert layer["cut_bytes"] == 72 * 4
    for u, unit in enumerate(body["units"]):
        # The file's data, less the header and the padding between tensors.
        held = (tiny / f"unit-00{u}.safetensors").stat().st_size - 16384
        assert held - 64 * 20 <= unit["bytes"] <= held


def test_a_plan_says_who_holds_what_and_that_one_device_is_faster(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    devices = tmp_path / "devices.toml"
    devices.write_text(DEVICES.replace("RAM", "100"))
    assert main(["plan", str(tiny), "--devices", str(devices), "--context", "128"]) == 0
    out = capsys.readouterr().out
    assert "this plan is laptop alone" in out
    assert "out  phone" in out


def test_caps_that_are_too_small_have_their_own_exit_code(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    devices = tmp_path / "devices.toml"
    devices.write_text(DEVICES.replace("RAM", "1"))
    assert main(["plan", str(tiny), "--devices", str(devices), "--context", "128"]) == 6
    assert "MB short in total" in capsys.readouterr().err


def test_a_model_that_is_not_there_is_named_with_the_way_to_get_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["inspect", "no-such-model"]) == 3
    err = capsys.readouterr().err
    assert "no-such-model" in err
    assert "shoal pull" in err


def test_a_plan_keeps_to_what_is_asked_and_is_drawn(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    devices, picture = tmp_path / "devices.toml", tmp_path / "plan.svg"
    devices.write_text(DEVICES.replace("RAM", "100"))
    asked = ["plan", str(tiny), "--devices", str(devices), "--context", "128", "--json"]

    def stages(*more: str) -> list[tuple[str, int, int]]:
        assert main([*asked, *more]) == 0
        found = json.loads(capsys.readouterr().out)["stages"]
        return [(stage["device"], stage["first"], stage["last"]) for stage in found]

    assert stages("--layers", "1,2", "--svg", str(picture)) == [("laptop", 0, 2), ("phone", 2, 5)]
    assert picture.read_text().startswith("<svg ")
    assert stages("--exclude", "laptop") == [("phone", 0, 5)]
    assert stages("--first", "phone")[0][0] == "phone"
    assert stages("--last", "phone", "--objective", "first-token")[-1][0] == "phone"
    for wrong, message in (
        (
            ["--layers", "1,2,0"],
            "--layers has 3 numbers for 2 devices: give one number each for laptop",
        ),
        (["--layers", "1,1"], "add up to 2, and the model has 3"),
        (["--exclude", "who"], "no device who"),
    ):
        assert main([*asked, *wrong]) == 1
        assert message in capsys.readouterr().err
    for place, reason in (
        (tmp_path / "no" / "where.svg", "No such file or directory: check the path"),
        (Path("/dev/full"), "No space left on device: free space there"),
        (tmp_path, "Is a directory: check the path"),
    ):
        assert main([*asked, "--svg", str(place)]) == 16
        assert f"{place} cannot be written: {reason}" in capsys.readouterr().err
    assert main(["plan", *asked[1:2], "--devices", str(tmp_path)]) == 16
    assert f"{tmp_path}: Is a directory: check the path" in capsys.readouterr().err


def test_a_profile_is_shown_and_saved_for_plan(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = tmp_path / "here.json"
    assert main(["profile", str(tiny), "--threads", "1", "--save", str(saved)]) == 0
    out = capsys.readouterr().out
    assert "GB/s of weights" in out
    assert "more in the first step after a pause" in out
    assert main(["plan", str(tiny), "--devices", str(saved), "--context", "128"]) == 0
    assert "alone: this plan is " in capsys.readouterr().out
