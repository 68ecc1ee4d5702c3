"""Profiles survive JSON; text from anywhere is refused, the culprit named, unless it is exactly a profile."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.device_files import (
    DeviceProfile,
    ProfiledLink,
    device_profile,
    dump_profile,
    load_profile,
    read_devices,
)
from shoal.engine.errors import ShoalError
from shoal.engine.host import Ram
from shoal.engine.measure import DeviceMeasurements
from shoal.planner import Device, LinkSpeed
from shoal.planning import BASE_BYTES

PI = DeviceProfile(
    Device("pi", 3_000_000_000, 12e9, 80e9, 60_000_000, 2e-5, 3e-4, ((1, 12e9), (64, 80e9)), 4e9),
    *("native", "neon_dot", 4, 8_000_000_000, 4_000_000_000),
)  # fmt: skip
LAPTOP = DeviceProfile(
    Device("laptop", 6_000_000_000, 36e9, 400e9), "native", "avx2", 2, 16_000_000_000, 9_000_000_000
)
LINKS = (
    ProfiledLink("laptop", "pi", LinkSpeed(0.004, 10e6, 0.009)),
    ProfiledLink("pi", "laptop", LinkSpeed(0.005, 8e6)),
)
BOTH = dump_profile((PI, LAPTOP), LINKS)


def body() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(BOTH)
    return found


def test_a_profile_survives_json() -> None:
    found = load_profile(BOTH)
    assert (found.devices, found.links) == ((PI, LAPTOP), LINKS)


names = st.text(min_size=1, max_size=3).filter(str.isprintable)
rates = st.floats(min_value=1e-3, max_value=1e18)
times = st.floats(min_value=0, max_value=1e6)
sizes = st.integers(min_value=1, max_value=2**50)
rows = st.builds(Device, names, st.just(0), rates, rates, sizes, times, times, st.just(((1, 1e9),)), rates)
devices = st.builds(DeviceProfile, rows, names, names, st.integers(1, 512), sizes, st.just(1))
links = st.builds(ProfiledLink, names, names, st.builds(LinkSpeed, times, rates, times))


@settings(max_examples=25)
@given(st.lists(devices, max_size=3), st.lists(links, max_size=3))
def test_any_profile_survives_json(some: list[DeviceProfile], ways: list[ProfiledLink]) -> None:
    found = load_profile(dump_profile(tuple(some), tuple(ways)))
    assert (found.devices, found.links) == (tuple(some), tuple(ways))


def test_the_file_says_its_version_and_every_field() -> None:
    found = body()
    assert found["shoal_profile"] == 3
    assert found["links"][0] == {
        "source": "laptop",
        "target": "pi",
        "speed": {"latency_s": 0.004, "bytes_per_s": 10e6, "latency_p95_s": 0.009},
    }
    assert set(found["devices"][0]) == {"device", "backend", "isa", "threads", "ram_total", "ram_free"}
    device = found["devices"][0]["device"]
    assert device["row_rates"] == [[1, 12e9], [64, 80e9]]
    assert set(device) == {
        *("name", "ram_bytes", "base_bytes", "read_bytes_per_s", "macs_per_s"),
        *("step_overhead_s", "idle_overhead_s", "row_rates"),
        *("attend_macs_per_s", "prefill_attend_macs_per_s", "beside"),
    }


def test_a_whole_number_will_do_for_a_rate_and_a_default_for_what_was_not_measured() -> None:
    found = body()
    found["devices"][0]["device"]["read_bytes_per_s"] = 12_000_000_000
    del found["devices"][1]["device"]["row_rates"], found["links"][1]["speed"]["latency_p95_s"]
    assert load_profile(json.dumps(found)) == load_profile(BOTH)


DEVICE = ["devices", 0, "device"]


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        (["shoal_profile"], 2, "version 2, and this shoal reads version 3: measure again"),
        (["shoal_profile"], True, "version True"),
        (["extra"], 1, "unknown key 'extra'"),
        (["devices"], {}, r"the profile\.devices = \{\} is not a list"),
        (["devices", 0], 7, r"the profile\.devices\[0\] is not an object"),
        ([*DEVICE, "speed"], 7, r"devices\[0\]\.device has an unknown key 'speed'"),
        ([*DEVICE, "name"], "", r"devices\[0\]\.device: a device needs a name"),
        (["devices", 0, "threads"], 0, r"threads = 0 is not between 1 and 4096"),
        (["devices", 0, "threads"], 2.0, r"threads = 2\.0 is not an integer"),
        (["devices", 0, "threads"], True, "threads = True is not an integer"),
        ([*DEVICE, "macs_per_s"], 0, "device pi: macs_per_s must be > 0"),
        ([*DEVICE, "macs_per_s"], False, "macs_per_s = False is not a number"),
        ([*DEVICE, "macs_per_s"], None, "macs_per_s = None is not a number"),
        ([*DEVICE, "macs_per_s"], 10**400, "macs_per_s is not finite"),
        (["devices", 0, "ram_free"], 9_000_000_000, "ram_free 9000000000 exceeds ram_total"),
        ([*DEVICE, "ram_bytes"], 9_000_000_000, "ram_bytes 9000000000 exceeds ram_total 8000000000"),
        ([*DEVICE, "ram_bytes"], 1e9, "ram_bytes = 1000000000.0 is not an integer"),
        (["devices", 0, "isa"], ["a"], r"isa = \['a'\] is not a string"),
        ([*DEVICE, "row_rates"], [[1, 5.0], [1, 6.0]], "rows of row_rates must be a whole number >= 2"),
        ([*DEVICE, "row_rates"], [[1, 5.0, 2]], r"row_rates\[0\] has 3 items, not 2"),
        ([*DEVICE, "row_rates"], 3, "row_rates = 3 is not a list"),
        ([*DEVICE, "row_rates"], [[1, 0]], "MAC/s at 1 rows must be > 0"),
        ([*DEVICE, "attend_macs_per_s"], 0, "attend_macs_per_s must be > 0"),
        ([*DEVICE, "idle_overhead_s"], -1, "idle_overhead_s must be >= 0"),
        (["links", 1, "speed", "latency_s"], -0.1, r"links\[1\]\.speed: a link's latency_s must be >= 0"),
        (["links", 1, "speed", "bytes_per_s"], "fast", "bytes_per_s = 'fast' is not a number"),
    ],
)
def test_a_wrong_value_is_refused(where: list[Any], value: Any, message: str) -> None:
    found = body()
    place: Any = found
    for key in where[:-1]:
        place = place[key]
    place[where[-1]] = value
    with pytest.raises(ValueError, match=message):
        load_profile(json.dumps(found))


@pytest.mark.parametrize("key", ["name", "ram_bytes", "macs_per_s"])
def test_a_missing_field_is_refused(key: str) -> None:
    found = body()
    del found["devices"][0]["device"][key]
    with pytest.raises(ValueError, match=f"lacks '{key}'"):
        load_profile(json.dumps(found))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "Expecting value"),
        ("[]", "must be a JSON object"),
        ("{}", "version None"),
        ('{"shoal_profile": 3, "devices": [], "devices": [], "links": []}', "duplicate key"),
        ('{"shoal_profile": NaN}', "NaN is not a number"),
        (BOTH.replace("0.004", "1e999"), "latency_s is not finite"),
        (BOTH.replace("0.004", "Infinity"), "Infinity is not a number"),
        ("[" * 100_000, "nested too deeply"),
        ('{"shoal_profile": ' + "9" * 5000 + "}", "integer string conversion"),
    ],
)
def test_text_that_is_no_profile_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_profile(text)


def test_a_cluster_is_made_of_a_profile(tmp_path: Path) -> None:
    path = tmp_path / "both.json"
    path.write_text(BOTH)
    cluster = read_devices(path)
    assert cluster.devices == (PI.device, LAPTOP.device)
    assert cluster.link("pi", "laptop") == LinkSpeed(0.005, 8e6)
    assert cluster.coordinator == "pi"


def test_a_profile_is_known_by_its_text(tmp_path: Path) -> None:
    path = tmp_path / "devices.toml"  # as the README calls the file, and `profile --save` is given the name
    path.write_text(BOTH)
    assert read_devices(path).coordinator == "pi"


@pytest.mark.parametrize(
    ("devices", "links", "message"),
    [
        ((), (), "it has no devices"),
        ((PI, PI), (), "device pi is listed twice"),
        ((PI, LAPTOP), (LINKS[0], LINKS[0]), "it has a duplicate link"),
        ((PI,), LINKS, "there is no device laptop"),
    ],
)
def test_a_profile_that_is_no_cluster_is_refused(
    tmp_path: Path, devices: Any, links: Any, message: str
) -> None:
    path = tmp_path / "odd.json"
    path.write_text(dump_profile(devices, links))
    with pytest.raises(ShoalError, match=rf"odd\.json: .*{message}"):
        read_devices(path)


MEASURED = DeviceMeasurements(
    "native (avx2)", True, 2, 36e9, 400e9, ((1, 36e9), (64, 400e9)), 5e9, 7e9, 1e-5, 2e-4
)


def test_a_device_promises_a_share_of_what_is_free_and_leaves_room_for_the_process() -> None:
    found = device_profile("here", MEASURED, Ram(8_000_000_000, 4_000_000_000))
    assert found == DeviceProfile(
        Device(
            "here", 3_000_000_000, 36e9, 400e9, BASE_BYTES, 1e-5, 2e-4, ((1, 36e9), (64, 400e9)), 5e9, 7e9
        ),
        *("native", "avx2", 2, 8_000_000_000, 4_000_000_000),
    )  # fmt: skip
    with pytest.raises(ShoalError, match="does not say how much RAM it has"):
        device_profile("here", MEASURED, Ram(None, None))
