"""Profiles survive JSON; text from anywhere is refused, the culprit named, unless it is exactly a profile."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.planner.profile import (
    DeviceProfile,
    LinkProfile,
    Profile,
    cluster_from,
    device_row,
    dumps,
    link_row,
    loads,
)
from shoal.planner.rows import Device, Link

PI = DeviceProfile(
    "pi", "native", "neon_dot", 4, 12e9, 80e9, 8_000_000_000, 4_000_000_000, 2e-5, 3e-4,
    row_rates=((1, 12e9), (64, 80e9)), attend_macs_per_s=4e9,
)  # fmt: skip
LAPTOP = DeviceProfile("laptop", "native", "avx2", 2, 36e9, 400e9, 16_000_000_000, 9_000_000_000, 1e-5)
BOTH = Profile(
    (PI, LAPTOP), (LinkProfile("laptop", "pi", 0.004, 10e6, 0.009), LinkProfile("pi", "laptop", 0.005, 8e6))
)


def body() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(dumps(BOTH))
    return found


def test_a_profile_survives_json() -> None:
    assert loads(dumps(BOTH)) == BOTH


names = st.text(min_size=1, max_size=3).filter(str.isprintable)
rates = st.floats(min_value=1e-9, max_value=1e18)
times = st.floats(min_value=0, max_value=1e6)
sizes = st.integers(min_value=1, max_value=2**50)
devices = st.builds(
    DeviceProfile, names, names, names, st.integers(1, 512), rates, rates, sizes, st.just(0), times
)
links = st.builds(LinkProfile, names, names, times, rates)


@settings(max_examples=25)
@given(
    st.lists(devices, unique_by=lambda row: row.name, max_size=3),
    st.lists(links, unique_by=lambda row: (row.src, row.dst), max_size=3),
)
def test_any_profile_survives_json(some: list[DeviceProfile], ways: list[LinkProfile]) -> None:
    profile = Profile(tuple(some), tuple(ways))
    assert loads(dumps(profile)) == profile


def test_the_file_says_its_version_and_every_field() -> None:
    found = body()
    assert found["shoal_profile"] == 2
    assert found["links"][0] == {
        "src": "laptop",
        "dst": "pi",
        "latency_s": 0.004,
        "bytes_per_s": 10e6,
        "latency_p95_s": 0.009,
    }
    assert found["devices"][0]["row_rates"] == [[1, 12e9], [64, 80e9]]
    assert set(found["devices"][0]) == {
        *("name", "backend", "isa", "threads", "read_bytes_per_s", "macs_per_s"),
        *("ram_total", "ram_free", "step_overhead_s", "idle_overhead_s", "row_rates"),
        *("attend_macs_per_s", "prefill_attend_macs_per_s"),
    }


def test_a_whole_number_will_do_for_a_rate() -> None:
    text = dumps(BOTH).replace("12000000000.0", "12000000000")
    assert loads(text) == BOTH
    assert text != dumps(BOTH)


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        (["shoal_profile"], 1, "version 1; this shoal reads 2"),
        (["shoal_profile"], True, "version True"),
        (["extra"], 1, "unknown key 'extra'"),
        (["devices"], {}, "devices must be a list, not dict"),
        (["devices", 0], 7, r"devices\[0\] must be an object, not int"),
        (["devices", 0, "speed"], 7, r"devices\[0\] has an unknown key 'speed'"),
        (["devices", 1, "name"], "pi", "device pi twice"),
        (["devices", 0, "name"], "", r"devices\[0\]: a device profile needs a name"),
        (["devices", 0, "threads"], 0, "profile of pi: threads must be a whole number >= 1"),
        (["devices", 0, "threads"], 2.0, "profile of pi: threads must be a whole number"),
        (["devices", 0, "threads"], True, "profile of pi: threads must be a whole number"),
        (["devices", 0, "macs_per_s"], 0, "profile of pi: macs_per_s must be > 0"),
        (["devices", 0, "macs_per_s"], False, "profile of pi: macs_per_s must be a number"),
        (["devices", 0, "macs_per_s"], None, "profile of pi: macs_per_s must be a number"),
        (["devices", 0, "macs_per_s"], 10**400, r"devices\[0\]: int too large"),
        (["devices", 0, "ram_free"], 9_000_000_000, "ram_free 9000000000 exceeds ram_total"),
        (["devices", 0, "isa"], ["a"], "profile of pi: isa"),
        (["devices", 0, "row_rates"], [[1, 5.0], [1, 6.0]], "rows of row_rates must be a whole number >= 2"),
        (["devices", 0, "row_rates"], [[1, 5.0, 2]], "row_rates must be a tuple of"),
        (["devices", 0, "row_rates"], 3, "row_rates must be a tuple of"),
        (["devices", 0, "row_rates"], [[1, 0]], "MAC/s at 1 rows must be > 0"),
        (["devices", 0, "attend_macs_per_s"], 0, "attend_macs_per_s must be > 0"),
        (["devices", 0, "idle_overhead_s"], -1, "idle_overhead_s must be >= 0"),
        (["links", 0, "latency_p95_s"], 0.001, "latency_p95_s 0.001 is below the median 0.004"),
        (["links", 1, "latency_s"], -0.1, r"links\[1\]: link pi -> laptop: latency_s must be >= 0"),
        (["links", 1, "bytes_per_s"], "fast", "link pi -> laptop: bytes_per_s must be a number"),
        (
            ["links", 1],
            {"src": "laptop", "dst": "pi", "latency_s": 1, "bytes_per_s": 1},
            "laptop -> pi twice",
        ),
    ],
)
def test_a_wrong_value_is_refused(where: list[Any], value: Any, message: str) -> None:
    found = body()
    place: Any = found
    for key in where[:-1]:
        place = place[key]
    place[where[-1]] = value
    with pytest.raises(ValueError, match=message):
        loads(json.dumps(found))


@pytest.mark.parametrize("key", ["name", "threads", "step_overhead_s"])
def test_a_missing_field_is_refused(key: str) -> None:
    found = body()
    del found["devices"][0][key]
    with pytest.raises(ValueError, match=f"lacks '{key}'"):
        loads(json.dumps(found))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("[]", "must be a JSON object, not list"),
        ("{}", "version None"),
        ('{"shoal_profile": 1, "devices": [], "devices": [], "links": []}', "repeats the key 'devices'"),
        ('{"shoal_profile": NaN}', "NaN, which is no finite number"),
        (dumps(BOTH).replace("0.004", "1e999"), "latency_s must be finite"),
        (dumps(BOTH).replace("0.004", "Infinity"), "Infinity, which is no finite number"),
        ("[" * 100_000, "nested too deeply"),
        ('{"shoal_profile": ' + "9" * 5000 + "}", "integer string conversion"),
    ],
)
def test_text_that_is_no_profile_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loads(text)


def test_a_device_promises_its_cap_and_slows_as_a_whole() -> None:
    assert device_row(PI, cap_bytes=10**9, slow=4.0, base_bytes=7) == Device(
        "pi", 10**9, 3e9, 20e9, base_bytes=7, step_overhead_s=8e-5, idle_overhead_s=1.2e-3,
        row_rates=((1, 3e9), (64, 20e9)), attend_macs_per_s=1e9,
    )  # fmt: skip
    assert device_row(PI).ram_bytes == 3_000_000_000
    assert link_row(BOTH.links[0]) == Link(0.004, 10e6)


def test_a_promise_that_cannot_be_kept_is_refused() -> None:
    with pytest.raises(ValueError, match="RAM cap of pi, 8000000001 bytes, exceeds its RAM of 8000000000"):
        device_row(PI, cap_bytes=8_000_000_001)
    with pytest.raises(ValueError, match=r"slow factor of pi must be >= 1, not 0\.5"):
        device_row(PI, slow=0.5)
    with pytest.raises(ValueError, match="RAM cap of pi must be a whole number"):
        device_row(PI, cap_bytes=1e9)  # type: ignore[arg-type]


def test_a_cluster_is_made_of_a_profile() -> None:
    cluster = cluster_from(BOTH, "laptop", caps={"pi": 10}, slow={"laptop": 2.0}, base_bytes={"pi": 3})
    assert [device.name for device in cluster.devices] == ["pi", "laptop"]
    assert (cluster.device("pi").ram_bytes, cluster.device("pi").base_bytes) == (10, 3)
    assert cluster.device("laptop").macs_per_s == 200e9
    assert cluster.link("pi", "laptop") == Link(0.005, 8e6)
    assert cluster.head == "laptop"


@pytest.mark.parametrize("what", ["caps", "slow", "base_bytes"])
def test_a_setting_for_nobody_is_refused(what: str) -> None:
    with pytest.raises(ValueError, match="given for pj, which the profile does not have"):
        cluster_from(BOTH, "laptop", **{what: {"pj": 1}})  # type: ignore[arg-type]
