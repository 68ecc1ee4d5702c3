"""Battery, heat and load by what a system says of them: files of the same shape as those of real devices."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from tests.patience import LIMIT

from shoal.engine import power
from shoal.engine.power import PowerReader, Readings, on_mains, plugged, termux_status

MEMINFO = {
    "proc/meminfo": "MemTotal:        7731004 kB\nMemFree:          210000 kB\nMemAvailable:    2500000 kB\n"
}
RAM = 2500000 * 1024


def supply(name: str, **texts: object) -> dict[str, object]:
    return {f"sys/class/power_supply/{name}/{key}": text for key, text in texts.items()}


def zones(*named: tuple[str, object]) -> dict[str, object]:
    found: dict[str, object] = {}
    for i, (kind, temperature) in enumerate(named):
        found |= {f"sys/class/thermal/thermal_zone{i}/{key}": value for key, value in
                  (("type", kind), ("temp", temperature))}  # fmt: skip
    return found


def cpus(*limits: tuple[int, int, int]) -> dict[str, object]:
    """The frequency now allowed, the highest, and the capacity of each CPU."""
    found: dict[str, object] = {}
    for i, (now, highest, capacity) in enumerate(limits):
        folder = f"sys/devices/system/cpu/cpu{i}"
        found |= {
            f"{folder}/cpufreq/scaling_max_freq": now,
            f"{folder}/cpufreq/cpuinfo_max_freq": highest,
            f"{folder}/cpu_capacity": capacity,
        }
    return found


def pressure(kind: str, some: object) -> dict[str, object]:
    some_of_them = f"some avg10={some} avg60=1.00 avg300=0.50 total=123456"
    return {f"proc/pressure/{kind}": f"{some_of_them}\nfull avg10=88.00 avg60=0.00 avg300=0.00 total=9"}


PIXEL = {  # a Pixel 6, rooted: Tensor, with gauges of its battery beside it and zones that count other things
    **supply("battery", type="Battery", status="Discharging", capacity=76, temp=314, scope="System"),
    **supply("maxfg", type="Battery", status="Unknown", capacity=71, temp=200, present=1),
    **supply("usb", type="USB", online=0, usb_type="[C] PD"),
    **supply("tcpm-source-psy-i2c-max77759tcpc", type="USB", online=0),
    **supply("wireless", type="Wireless", online=0),
    **supply("otg", type="OTG", online=1),
    **zones(
        ("BIG", 61000), ("MID", 58500), ("LITTLE", 55000), ("G3D", 91000), ("TPU", 90000), ("soc", 24000),
        ("battery", 31400), ("battery_cycle", 99000), ("cellular-emergency", 100000), ("VIRTUAL-SKIN", 39000),
        ("usb_pwr_therm", 70000), ("vdroop1", 110000),
    ),
    **cpus(*[(1803000, 1803000, 124)] * 4, *[(2253000, 2253000, 427)] * 2, *[(1826000, 2802000, 1024)] * 2),
    **MEMINFO,
}  # fmt: skip
SAMSUNG = {  # a Galaxy: the battery is kept at 85 %, and its charger has types of its own
    **supply("battery", type="Battery", status="Not charging", capacity=85, temp=352, online=4),
    **supply("ac", type="Mains", online=1),
    **supply("usb", type="USB", online=0),
    **supply("wireless", type="Wireless", online=0),
    **supply("ps", type="Power Share", online=0),
    **zones(
        ("cpu-0-0-usr", 48300), ("cpu-1-7-usr", 52900), ("cpuss-0-usr", 47100), ("gpuss-0-usr", 95000),
        ("aoss0-usr", 44000), ("pm8350-bcl-lvl0", 0), ("xo-therm-usr", -273000), ("modem-lte-pa1", 120000),
        ("cpu-1-4-usr", 0), ("cpu-1-5-usr", -40000), ("cpu-1-6-usr", 204000),
    ),
    **cpus(*[(1800000, 1800000, 300)] * 4, *[(2419200, 2419200, 800)] * 3, (2841600, 2841600, 1024)),
    **pressure("cpu", "12.34"), **pressure("memory", "0.00"),
    **MEMINFO,
}  # fmt: skip
RASPBERRY = {
    **zones(("cpu-thermal", 55504)),
    **cpus(*[(1500000, 1800000, 1024)] * 4),
    **pressure("cpu", "55.00"), **pressure("memory", "3.10"),
    **MEMINFO,
}  # fmt: skip
LAPTOP = {
    **supply("AC", type="Mains", online=0),
    **supply("BAT0", type="Battery", status="Discharging", capacity=40, present=1),
    **supply("BAT1", type="Battery", status="Not charging", capacity=60, present=1),
    **supply("BAT2", type="Battery", status="Unknown", capacity=0, present=0),
    **supply("hidpp_battery_0", type="Battery", status="Discharging", capacity=5, scope="Device"),
    **zones(("acpitz", 16800), ("INT3400 Thermal", 20000), ("x86_pkg_temp", 71000), ("iwlwifi_1", 99000)),
    **cpus(*[(4700000, 4700000, 1024)] * 4),
    **pressure("cpu", "0.00"), **pressure("memory", "0.00"),
    **MEMINFO,
}  # fmt: skip
CASES = {
    "pixel": (PIXEL, Readings(False, 76, 31.4, 61.0, 100 * 1826 / 2802, None, None, RAM)),
    "samsung": (SAMSUNG, Readings(True, 85, 35.2, 52.9, 100.0, 12.34, 0.0, RAM)),
    "raspberry": (RASPBERRY, Readings(True, None, None, 55.504, 100 * 15 / 18, 55.0, 3.1, RAM)),
    "laptop": (LAPTOP, Readings(False, 50, None, 71.0, 100.0, 0.0, 0.0, RAM)),
}


def system(root: Path, files: Mapping[str, object]) -> Path:
    """A file system with these files."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return root


@pytest.fixture(autouse=True)
def _linux(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.delenv("ANDROID_ROOT", raising=False)
    monkeypatch.setattr("shutil.which", lambda name: None)


def read(root: Path) -> Readings:
    return PowerReader(
        root, usable=range(8) if (root / "sys/devices/system/cpu/cpu7").exists() else range(4)
    ).read()


@pytest.mark.parametrize(("files", "expected"), CASES.values(), ids=CASES)
def test_readings_of_devices(tmp_path: Path, files: Mapping[str, object], expected: Readings) -> None:
    found = read(system(tmp_path, files))
    assert found == replace(expected, clock=pytest.approx(expected.clock))


def test_readings_where_python_calls_the_platform_android(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Python 3.13 and newer do in Termux."""
    system(tmp_path, SAMSUNG)
    expected = read(tmp_path)
    assert expected.plugged is not None
    monkeypatch.setattr("sys.platform", "android")
    monkeypatch.setenv("ANDROID_ROOT", "/system")
    assert read(tmp_path) == expected


def test_readings_follow_the_files(tmp_path: Path) -> None:
    reader = PowerReader(system(tmp_path, SAMSUNG), usable=range(8))
    reader.read()
    system(tmp_path, {
        **supply("battery", status="Discharging", capacity=29, temp=431), **supply("ac", online=0),
        **zones(("cpu-0-0-usr", 91000)), **pressure("memory", "44.00"),
        "sys/devices/system/cpu/cpu7/cpufreq/scaling_max_freq": 710400,
        "proc/meminfo": "MemTotal: 7731004 kB\nMemAvailable: 90000 kB\n",
    })  # fmt: skip
    expected = Readings(False, 29, 43.1, 91.0, 25.0, 12.34, 44.0, 90000 * 1024)
    assert reader.read() == replace(expected, clock=pytest.approx(25.0))


def test_an_empty_system_says_only_that_it_has_power(tmp_path: Path) -> None:
    assert replace(read(tmp_path), ram=None) == Readings(plugged=True)


def test_android_without_files_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANDROID_ROOT", "/system")
    assert replace(read(tmp_path), ram=None) == Readings()
    (tmp_path / "sys/class/power_supply").mkdir(parents=True)
    assert read(tmp_path).plugged is None


@pytest.mark.parametrize(
    "garbage", ["", "\0", "nan", "1e3", "-", "9" * 400, "ünïcode", "-1", "4294967295", "[]", "0x1F"]
)
def test_garbage_is_no_reading(tmp_path: Path, garbage: str) -> None:
    files = {name: garbage if name.rpartition("/")[2] != "type" else text for name, text in SAMSUNG.items()}
    found = replace(read(system(tmp_path, files)), ram=None, clock=None)
    assert found == Readings(plugged=True if garbage == "4294967295" else None)


def test_bytes_that_are_no_text_are_no_reading(tmp_path: Path) -> None:
    root = system(tmp_path, RASPBERRY)
    for name in RASPBERRY:
        (root / name).write_bytes(b"\xff\xfe\x00" * 50)
    assert replace(read(root), ram=None) == Readings(plugged=True)


def test_directories_in_place_of_files_are_no_reading(tmp_path: Path) -> None:
    """As any error of reading, such as ENODATA of a battery that is being swapped."""
    for name in SAMSUNG:
        if name.rpartition("/")[2] not in ("type", "meminfo"):
            (tmp_path / name).mkdir(parents=True)
    system(tmp_path, {name: text for name, text in SAMSUNG.items() if name.endswith("type")})
    assert replace(read(tmp_path), ram=None) == Readings()


BATTERY, USB = supply("battery", type="Battery"), supply("usb", type="USB", online=1)
SUPPLIES = {
    "mains": (supply("AC", type="Mains", online=1), True),
    "on battery": ({**supply("AC", type="Mains", online=0), **BATTERY}, False),
    "a battery alone": (BATTERY, None),
    "it discharges": (supply("battery", type="Battery", status="Discharging"), False),
    "it discharges although there is power": (
        {**supply("battery", type="Battery", status="Discharging"), **USB}, True,
    ),
    "it charges": (supply("battery", type="Battery", status="Charging"), True),
    "it is full": (supply("battery", type="Battery", status="Full"), True),
    "it was full": (
        {**supply("battery", type="Battery", status="Full"), **supply("usb", type="USB", online=0)}, False,
    ),
    "an unknown charger": (
        {**supply("battery", type="Battery", status="Charging"), **supply("dc", type="DC", online=0)}, True,
    ),
    "a fast charger": ({**BATTERY, **supply("usb", type="USB_PD", online=1)}, True),
    "power for another device": ({**BATTERY, **supply("otg", type="OTG", online=1)}, None),
    "a mouse": (supply("hid", type="Battery", status="Discharging", scope="Device"), True),
    "an empty bay": (supply("BAT1", type="Battery", status="Unknown", present=0), True),
}  # fmt: skip


@pytest.mark.parametrize(("files", "expected"), SUPPLIES.values(), ids=SUPPLIES)
def test_power_from_outside(tmp_path: Path, files: Mapping[str, object], expected: bool | None) -> None:
    root = system(tmp_path, files)
    assert plugged(root) is expected
    assert on_mains(root) is (expected is True)


@pytest.mark.parametrize(
    ("kind", "counts"),
    [
        ("cpu-thermal", True), ("cpu_thermal", True), ("cpu0-silver-usr", True), ("CPU-therm", True),
        ("cpu", True), ("soc-thermal", True), ("soc_max", True), ("bigcore0-thermal", True),
        ("littlecore-thermal", True), ("mtktscpu", True), ("TCPU", True), ("x86_pkg_temp", True),
        ("bcm2835_thermal", True), ("tsens_tz_sensor4", True), ("exynos-therm", True), ("cpu-big1-1", True),
        ("soc", False), ("gpu-thermal", False), ("PMIC-Die", False), ("acpitz", False), ("mtktswmt", False),
        ("charger", False), ("cpufreq", False), ("ddr", False), ("battery", False), ("", False),
    ],
)  # fmt: skip
def test_zones_of_the_cpu(tmp_path: Path, kind: str, counts: bool) -> None:
    assert read(system(tmp_path, zones((kind, 47000)))).chip == (47.0 if counts else None)


@pytest.mark.parametrize("kind", ["battery", "Battery", "mtktsbattery", "batt_therm", "batt-temp"])
def test_a_zone_of_the_battery_where_its_supply_has_no_temperature(tmp_path: Path, kind: str) -> None:
    files = {
        **supply("battery", type="Battery", capacity=50),
        **zones((kind, 38500), ("battery_cycle", 99000)),
    }
    assert read(system(tmp_path, files)).temperature == 38.5
    system(tmp_path, supply("battery", temp=290))
    assert read(tmp_path).temperature == 29.0


# Termux:API.

SAID = """{
  "present": true, "technology": "Li-ion", "health": "GOOD", "plugged": "PLUGGED_AC", "status": "CHARGING",
  "temperature": 29.299999237060547, "voltage": 4123, "current": -512000, "percentage": 76, "level": 76
}"""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    return tmp_path / "termux-battery-status"


def script(path: Path, body: str) -> Path:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def says(path: Path, text: str) -> Path:
    return script(path, f"cat <<'END'\n{text}\nEND")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (SAID, Readings(True, 76, 29.299999237060547)),
        (SAID.replace("PLUGGED_AC", "UNPLUGGED"), Readings(False, 76, 29.299999237060547)),
        ('{"status": "DISCHARGING", "percentage": 12}', Readings(False, 12.0)),
        ('{"status": "NOT_CHARGING", "temperature": 31}', Readings(True, None, 31.0)),
        ('{"plugged": 5, "status": ["x"], "percentage": 101, "temperature": -273.1}', None),
        ('{"percentage": true, "temperature": "30", "plugged": "PLUGGED"}', None),
        ('{"percentage": NaN, "temperature": Infinity}', None),
        (f'{{"percentage": {10**400}, "temperature": -{10**400}}}', None),
        ('{"present": false, "plugged": "PLUGGED_AC", "percentage": 0}', None),
        ("[1, 2]", None), ("7", None), ("", None), ("Not yet available", None), ("[" * 5000, None),
    ],
)  # fmt: skip
def test_what_termux_says(program: Path, text: str, expected: Readings | None) -> None:
    assert termux_status(str(says(program, text))) == expected


def test_termux_fills_in_what_files_do_not_say(
    tmp_path: Path, program: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANDROID_ROOT", "/system")
    monkeypatch.setattr(
        "shutil.which", lambda name: str(says(program, SAID)) if name == power.TERMUX else None
    )
    root = system(tmp_path / "root", {**supply("battery", type="Battery", temp=333), **MEMINFO})
    assert PowerReader(root, usable=()).read() == Readings(True, 76, 33.3, ram=RAM)


def test_termux_is_not_asked_for_what_files_say(tmp_path: Path, program: Path) -> None:
    script(program, f"touch {tmp_path}/asked")
    PowerReader(system(tmp_path / "root", SAMSUNG), usable=(), termux=str(program)).read()
    assert not (tmp_path / "asked").exists()


def test_termux_is_asked_rarely_and_more_rarely_if_it_fails(tmp_path: Path, program: Path) -> None:
    now, asked = [0.0], tmp_path / "asked"
    script(program, f"echo >> {asked}; exit 1")
    reader = PowerReader(tmp_path, usable=(), termux=str(program), clock=lambda: now[0])

    def calls_until(end: int) -> int:
        before = len(asked.read_text()) if asked.exists() else 0
        for second in range(int(now[0]), end, 20):
            now[0] = second
            reader.read()
        return len(asked.read_text()) - before

    assert calls_until(3600) == 6  # at 0, 120, 360, 840, 1800 and 2760 s
    says(program, SAID)
    now[0] = 3720.0
    assert reader.read().battery == 76
    script(program, f"echo >> {asked}; exit 1")
    assert reader.read().battery == 76
    now[0] += 60
    assert reader.read().battery is None


def ended(path: Path) -> bool:
    """Whether the process whose number is in the file has ended."""
    try:
        return Path(f"/proc/{path.read_text().strip()}/stat").read_text().split()[2] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.parametrize("body", ["sleep 99", "exec sleep 99", "yes", "exec >&-; sleep 99"])
def test_a_program_that_does_not_end_is_ended_with_its_children(
    tmp_path: Path, program: Path, body: str
) -> None:
    script(program, f"echo $$ > {tmp_path}/pid; ({body}) & echo $! > {tmp_path}/child; wait")
    start = time.monotonic()
    assert termux_status(str(program), 0.15) is None
    assert time.monotonic() - start < 50
    until = time.monotonic() + LIMIT
    while not all(ended(tmp_path / name) for name in ("pid", "child")):
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.parametrize("mode", [0o600, None])
def test_a_program_that_cannot_be_started_says_nothing(program: Path, mode: int | None) -> None:
    if mode is not None:
        says(program, SAID).chmod(mode)
    assert termux_status(str(program)) is None


def test_a_program_that_fails_says_nothing(program: Path) -> None:
    script(program, f"cat <<'END'\n{SAID}\nEND\nexit 3")
    assert termux_status(str(program)) is None


def test_reading_leaves_no_descriptor_open(tmp_path: Path, program: Path) -> None:
    times = iter(range(0, 10**6, 1000))
    reader = PowerReader(tmp_path, usable=(), termux=str(says(program, SAID)), clock=times.__next__)
    reader.read()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        assert reader.read().battery == 76
    assert len(os.listdir("/proc/self/fd")) == before
