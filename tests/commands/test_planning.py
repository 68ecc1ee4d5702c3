"""Devices described by hand, and engine costs joined with the planner."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal import planner
from shoal.device_files import read_devices
from shoal.engine.errors import NoPlanError, ShoalError
from shoal.planning import plan_or_error

GOOD = """
coordinator = "laptop"
[default_link]
latency_ms = 4
mbit_per_s = 80
[[device]]
name = "laptop"
read_gb_per_s = 20
gmac_per_s = 200
ram_mb = 500
base_mb = 50
[[device]]
name = "phone"
read_gb_per_s = 10
gmac_per_s = 50
ram_mb = 300
[[link]]
from = "laptop"
to = "phone"
latency_ms = 2
mbit_per_s = 160
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "devices.toml"
    path.write_text(text)
    return path


def test_units_of_the_file(tmp_path: Path) -> None:
    cluster = read_devices(write(tmp_path, GOOD))
    laptop = cluster.device("laptop")
    assert (laptop.ram_bytes, laptop.base_bytes, laptop.read_bytes_per_s) == (500_000_000, 50_000_000, 20e9)
    assert cluster.link("phone", "laptop") == planner.LinkSpeed(0.002, 20e6)
    assert cluster.coordinator == "laptop"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"at least one \[\[device\]\]"),
        (GOOD + "colour = 1", "unknown key 'colour'"),
        (GOOD.replace("ram_mb = 300", ""), "lacks 'ram_mb'"),
        (GOOD.replace("ram_mb = 300", "ram_mb = '300'"), "ram_mb = '300' is not a number"),
        (GOOD.replace("ram_mb = 300", "ram_mb = -1"), "ram_bytes"),
        (GOOD.replace('to = "phone"', 'to = "tablet"'), "tablet"),
        (GOOD.replace('name = "phone"', 'name = "laptop"'), "twice"),
        ("[", "devices.toml"),
        (f"a = {'[' * 5000}{']' * 5000}", "nested too deeply"),
        (GOOD.replace('to = "phone"', 'to = ["phone"]'), "to must be a name"),
        (GOOD.replace('name = "phone"', 'name = ["phone"]'), "name = .* is not a string"),
        (GOOD.replace('"phone"', '"pho\\u0001ne"'), "cannot be printed"),
        (GOOD.replace('coordinator = "laptop"', "coordinator = [1]"), "coordinator must be a name"),
        ("link = 3\n" + GOOD[: GOOD.index("[[link]]")], r"\[\[link\]\]"),
        *((GOOD.replace("= 300", f"= {bad}"), "ram_mb") for bad in ("inf", "nan", "1e400", "9" * 400)),
    ],
)
def test_a_bad_file_is_named_with_its_fault(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ShoalError, match=message) as caught:
        read_devices(write(tmp_path, text))
    assert "devices.toml" in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ShoalError, match=r"nowhere\.toml does not exist"):
        read_devices(tmp_path / "nowhere.toml")


def test_a_cap_that_no_plan_meets_says_how_much_is_missing(tmp_path: Path) -> None:
    cluster = read_devices(write(tmp_path, GOOD))
    unit = planner.Unit("layer", 400_000_000, 400_000_000, 1, 0, 0, 4)
    model = planner.ModelCosts((unit, unit, unit))
    with pytest.raises(NoPlanError, match=r"[0-9.]+ MB") as caught:
        plan_or_error(planner.Question(model, cluster, planner.Workload(context=16)))
    assert caught.value.exit_code == 6
