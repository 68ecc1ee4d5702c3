"""Readings of a device's battery, heat and load: how much of it may be used now (net/throttling.py).

They are files of Linux: power supplies, thermal zones, frequency limits and pressure. Each file may be
missing, unreadable (Android hides most of them from programs) or hold garbage; its reading is then None. On
Android, Termux:API fills in what the battery's files do not say. The parameter `root` is the root of the file
system, so that tests can provide the files of other systems."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path

from .host import big_cores, on_linux, ram
from .kernel_files import read_lines, read_number, read_text
from .wait import waiter

_ROOT = Path("/")
COLDEST, HOTTEST = 1.0, 125.0
"""°C between which a reading is believed. A sensor that is off reports 0, -40, -273 or 200, and some files
called temperatures count something else in small or large numbers."""
_CPU_ZONE = re.compile(
    r"""(?:.*[-_])?cpu(?:ss)?(?:[-_.\d].*|)   # cpu-thermal, cpu0-thermal, cpu-1-2-usr, cpuss-0-usr
    | mtktscpu | tcpu | x86_pkg_temp          # MediaTek, Intel
    | (?:big|mid|little)(?:core)?\d*(?:[-_]?thermal)?     # Exynos, Tensor, Rockchip
    | soc[-_](?:max|thermal).*                # MediaTek, Rockchip, Amlogic: `soc` alone is a state of charge
    | bcm\d+_thermal | exynos-therm.* | tsens_tz_sensor\d+""",
    re.VERBOSE,
)
_BATTERY_ZONE = re.compile(r"(?:mtkts)?batt(?:ery)?(?:[-_]?(?:therm(?:al)?|temp))?")
_PLUGS = re.compile(r"Mains|USB.*|Wireless|BrickID")
"""Types of power supplies that bring power from outside. `OTG` is power that the device gives."""
TERMUX = "termux-battery-status"
_TERMUX_SECONDS = 10.0
"""How long Termux:API may take. Without its app the program never ends."""
_TERMUX_BYTES = 1 << 16
_RARELY, _MOST_RARELY = 60.0, 960.0
"""Seconds between two calls of Termux:API, which wakes an app: twice as many after each one that fails."""


@dataclass(frozen=True, slots=True)
class Readings:
    """What a device says about itself at the moment. None: it does not say."""

    plugged: bool | None = None
    """Whether it has power from outside. A full battery, or one that is kept from being full, is not charged
    although the device is plugged in."""
    battery: float | None = None
    """Per cent of the battery's capacity that are left."""
    temperature: float | None = None
    """°C of the battery, which are about those that a hand feels."""
    chip: float | None = None
    """°C of the hottest core of the CPU."""
    clock: float | None = None
    """Per cent of a big core's highest frequency to which the system limits it now; of the one that is
    limited most."""
    cpu_pressure: float | None = None
    """Per cent of the last 10 s in which a program waited for a CPU."""
    memory_pressure: float | None = None
    """Per cent of the last 10 s in which a program waited for memory."""
    ram: int | None = None
    """Bytes of RAM that programs can still get."""


@dataclass(frozen=True, slots=True)
class _Supply:
    """A power supply: its kind by the kernel, and its directory."""

    kind: str
    path: Path

    def text(self, name: str) -> str:
        return (read_text(self.path / name) or "").strip()

    def number(self, name: str) -> int | None:
        return read_number(self.path / name)

    @property
    def online(self) -> bool | None:
        value = self.number("online")
        return None if value is None or value < 0 else value > 0


def on_mains(root: Path = _ROOT) -> bool:
    """Whether this device runs on mains power, so that a thread may keep a core busy while it waits for a few
    milliseconds. True on Linux without a battery; False where the system does not tell, as on many phones."""
    return plugged(root) is True


def plugged(root: Path = _ROOT) -> bool | None:
    """Whether this device has power from outside. A Linux device without a battery has it, but for Android,
    which hides its battery. None: the system does not tell."""
    return _plugged(_supplies(root))


def is_android() -> bool:
    """Whether this process runs on Android, as in Termux."""
    return "ANDROID_ROOT" in os.environ


def _supplies(root: Path) -> list[_Supply] | None:
    """The power supplies of this device, without those of mice and keyboards. None: the system hides them."""
    if not on_linux():
        return None
    try:
        paths = sorted((root / "sys/class/power_supply").iterdir())
    except FileNotFoundError:
        return None if is_android() else []
    except OSError:
        return None
    found = [_Supply((read_text(path / "type") or "").strip(), path) for path in paths]
    return [one for one in found if one.text("scope") != "Device" and one.number("present") != 0]


def _batteries(supplies: list[_Supply] | None) -> list[_Supply]:
    """The batteries. On a phone the one called `battery` is the whole, and others are gauges of its parts."""
    found = [one for one in supplies or () if one.kind == "Battery"]
    return [one for one in found if one.path.name == "battery"] or found


def _plugged(supplies: list[_Supply] | None) -> bool | None:
    if supplies is None:
        return None
    batteries = _batteries(supplies)
    plugs = [one.online for one in supplies if _PLUGS.fullmatch(one.kind)]
    states = {one.text("status") for one in batteries}
    if any(plugs) or "Charging" in states:
        return True
    if "Discharging" in states or False in plugs:
        return False
    if states & {"Full", "Not charging"}:  # of a battery with power that it does not take
        return True
    return None if batteries or is_android() else True


class PowerReader:
    """Reads a device's battery, heat and load. `read` blocks for milliseconds, and for seconds when it calls
    Termux:API, so it belongs into a thread. `termux` is the program (default: the one that is installed, on
    Android); `clock` is a monotonic clock."""

    def __init__(
        self,
        root: Path = _ROOT,
        *,
        usable: Collection[int] | None = None,
        termux: str | None = None,
        clock: Callable[[], float] = time.monotonic,
        seconds: float = _TERMUX_SECONDS,
    ) -> None:
        self._root, self._usable, self._clock, self._seconds = root, usable, clock, seconds
        self._termux = termux or (shutil.which(TERMUX) if is_android() else None)
        self._again, self._pause = -math.inf, _RARELY
        self._told = Readings()
        """What Termux:API has said last."""

    def read(self) -> Readings:
        """The readings of this moment, with those of Termux:API at most a few minutes old."""
        found = self._files()
        if None not in (found.plugged, found.battery, found.temperature) or self._termux is None:
            return found
        if self._clock() >= self._again:
            told = termux_status(self._termux, self._seconds)
            self._pause = _RARELY if told is not None else min(_MOST_RARELY, 2 * self._pause)
            self._told, self._again = told or Readings(), self._clock() + self._pause
        return replace(found, **{
            field.name: getattr(self._told, field.name)
            for field in fields(Readings) if getattr(found, field.name) is None
        })  # fmt: skip

    def _files(self) -> Readings:
        root = self._root
        supplies = _supplies(root)
        batteries = _batteries(supplies)
        zones = _zones(root)
        temperatures = [_believed(one.number("temp"), 10) for one in batteries]
        if all(t is None for t in temperatures):
            temperatures = [t for name, t in zones if _BATTERY_ZONE.fullmatch(name)]
        levels = [level for one in batteries if (level := one.number("capacity")) is not None]
        levels = [level for level in levels if 0 <= level <= 100]
        return Readings(
            plugged=_plugged(supplies),
            battery=sum(levels) / len(levels) if levels else None,
            temperature=_highest(temperatures),
            chip=_highest([t for name, t in zones if _CPU_ZONE.fullmatch(name)]),
            clock=_clock_limit(root, self._usable),
            cpu_pressure=_pressure(root, "cpu"),
            memory_pressure=_pressure(root, "memory"),
            ram=ram(root).available,
        )


def _zones(root: Path) -> list[tuple[str, float | None]]:
    """The types of the thermal zones, in small letters, and their °C. Only zones with a type that counts are
    read: some sensors are slow."""
    try:
        paths = sorted((root / "sys/class/thermal").glob("thermal_zone*"))
    except OSError:
        return []
    named = [((read_text(path / "type") or "").strip().lower(), path) for path in paths]
    return [
        (name, _believed(read_number(path / "temp"), 1000))
        for name, path in named
        if _CPU_ZONE.fullmatch(name) or _BATTERY_ZONE.fullmatch(name)
    ]


def _believed(value: int | None, per_degree: int) -> float | None:
    degrees = None if value is None else value / per_degree
    return degrees if degrees is not None and COLDEST <= degrees <= HOTTEST else None


def _highest(values: list[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _clock_limit(root: Path, usable: Collection[int] | None) -> float | None:
    """Per cent of the highest frequency that the system allows now, of the big core with the lowest."""
    shares = []
    for cpu in big_cores(usable, root):
        folder = root / f"sys/devices/system/cpu/cpu{cpu}/cpufreq"
        now, highest = read_number(folder / "scaling_max_freq"), read_number(folder / "cpuinfo_max_freq")
        if now is not None and highest is not None and now > 0 and highest > 0:
            shares.append(min(now, highest) / highest)
    return 100 * min(shares) if shares else None


def _pressure(root: Path, kind: str) -> float | None:
    """The `some` average over 10 s of a pressure file."""
    for line in read_lines(root / "proc/pressure" / kind):
        found = re.match(r"some avg10=(\d{1,3}(?:\.\d+)?)\s", line)
        if found and float(found[1]) <= 100:
            return float(found[1])
    return None


def termux_status(program: str, seconds: float = _TERMUX_SECONDS) -> Readings | None:
    """What Termux:API says of the battery. None: it has said nothing within `seconds`, or not what it
    should."""
    text = _said(program, seconds)
    try:
        told = json.loads(text) if text is not None else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(told, dict) or told.get("present") is False:
        return None
    plug, state = told.get("plugged"), told.get("status")
    level, degrees = _real(told.get("percentage")), _real(told.get("temperature"))
    found = Readings(
        plugged=_termux_plugged(plug, state),
        battery=level if level is not None and 0 <= level <= 100 else None,
        temperature=degrees if degrees is not None and COLDEST <= degrees <= HOTTEST else None,
    )
    return None if found == Readings() else found


def _termux_plugged(plug: object, state: object) -> bool | None:
    if isinstance(plug, str) and (plug == "UNPLUGGED" or plug.startswith("PLUGGED_")):
        return plug != "UNPLUGGED"
    return {"CHARGING": True, "FULL": True, "NOT_CHARGING": True, "DISCHARGING": False}.get(str(state))


def _real(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    with suppress(OverflowError):
        return float(value)
    return None


def _said(program: str, seconds: float) -> bytes | None:
    """What a program writes until it ends. None: it does not end in time, writes too much, fails, or cannot
    be started. It is ended with its children, since Termux:API is a script around the program that waits."""
    until, wait, said = time.monotonic() + seconds, waiter(), b""
    try:
        process = subprocess.Popen(
            [program],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    except (OSError, ValueError):
        return None
    whole = False
    with process:
        assert process.stdout is not None
        handle = process.stdout.fileno()
        while not whole and len(said) <= _TERMUX_BYTES and (left := until - time.monotonic()) > 0:
            if wait([handle], 0.0, left):
                piece = os.read(handle, _TERMUX_BYTES)
                said, whole = said + piece, not piece
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, until - time.monotonic()) if whole else 0.0)
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
    return said if whole and process.returncode == 0 else None
