"""What a lab looks like: a TOML file as frozen rows, checked in full.

coordinator = "flagship" # the device that the coordinator runs on; default: a host of its own, without delay
turns = true             # one device computes at a time, with the machine's memory to itself; default false

[link]                   # of every device that has no link of its own
delay_ms = 2             # one way between the device and the access point: two devices are twice as far apart
jitter_ms = 0.5          # a delay is drawn from delay +- jitter; bytes keep their order
mbit_per_s = 80          # each way

[[device]]
name = "flagship"
speed = 0.8              # of one core of this machine
cap_layers = 16          # RAM: a bare node, its workspace, and that many layers with their state; or:
# cap_mb = 500
# link = { delay_ms = 20, mbit_per_s = 20 }
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shoal.engine.errors import ShoalError

MAX_SPEED = 1.7
"""Cores that all devices together may take of a machine with two: beyond, it is the machine that decides."""
MAX_TURNS_SPEED = 0.9
"""And of one core, where they take turns."""


@dataclass(frozen=True, slots=True)
class LinkSpec:
    """A device's way to all others. Seconds; bytes/s, None: not limited."""

    delay_s: float = 0.0
    jitter_s: float = 0.0
    bytes_per_s: float | None = None


@dataclass(frozen=True, slots=True)
class DeviceSpec:
    """One device. At most one of the caps is given; without, all RAM is promised and nothing enforced."""

    name: str
    speed: float
    link: LinkSpec
    cap_layers: int | None = None
    cap_mb: int | None = None

    @property
    def slow(self) -> float:
        """The factor by which its steps take longer than this machine's."""
        return 1 / self.speed


@dataclass(frozen=True, slots=True)
class LabSpec:
    """Devices in the order in which the equal split takes them."""

    devices: tuple[DeviceSpec, ...]
    coordinator: str | None = None
    turns: bool = False

    def __post_init__(self) -> None:
        names = [device.name for device in self.devices]
        if not names or len(set(names)) < len(names):
            raise ValueError("it needs at least one [[device]], and each name once")
        if self.coordinator is not None and self.coordinator not in names:
            raise ValueError(f"the coordinator is on {self.coordinator!r}, and there is no such device")
        self.check_speeds([device.speed for device in self.devices])

    def check_speeds(self, speeds: list[float]) -> None:
        """ValueError: together they are more than this machine has for such a lab."""
        most = MAX_TURNS_SPEED if self.turns else MAX_SPEED
        if sum(speeds) > most + 1e-9:
            raise ValueError(
                f"the devices' speeds add up to {sum(speeds):.2f} cores, and beyond {most} this machine "
                "decides what is measured: lower some"
            )


def read_spec(path: Path) -> LabSpec:
    """The lab that a file describes. ShoalError: unreadable, unknown keys, values out of range."""
    try:
        return spec_of(tomllib.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ShoalError(f"{path}: {error}") from error


def spec_of(body: dict[str, Any]) -> LabSpec:
    """The lab of a table. ValueError: unknown keys, values out of range."""
    _keys("the lab", body, {"coordinator", "turns", "link", "device"})
    link = _link("[link]", body.get("link", {}), LinkSpec())
    rows = body.get("device", [])
    if not isinstance(rows, list):
        raise ValueError("a device is a table of its own: [[device]]")
    devices = tuple(_device(row, link) for row in rows)
    turns = body.get("turns", False)
    if not isinstance(turns, bool):
        raise ValueError(f"turns must be true or false, not {turns!r}")
    return LabSpec(devices, body.get("coordinator"), turns)


def _device(row: Any, link: LinkSpec) -> DeviceSpec:
    what = f"[[device]] {row.get('name')}" if isinstance(row, dict) else "[[device]]"
    _keys(what, row, {"name", "speed", "cap_layers", "cap_mb", "link"})
    name = row.get("name")
    if not isinstance(name, str) or not name.isidentifier() or len(name) > 32:
        raise ValueError(f"{what}: a name is letters, digits and _, at most 32")
    if "cap_layers" in row and "cap_mb" in row:
        raise ValueError(f"{what}: give cap_layers or cap_mb, not both")
    caps = {key: int(_number(what, row, key, 1, 1e6)) for key in ("cap_layers", "cap_mb") if key in row}
    own = _link(f"{what}: link", row.get("link", {}), link)
    return DeviceSpec(name, _number(what, row, "speed", 0.001, 1.0), own, **caps)


def _link(what: str, row: dict[str, Any], default: LinkSpec) -> LinkSpec:
    _keys(what, row, {"delay_ms", "jitter_ms", "mbit_per_s"})
    link = default
    if "delay_ms" in row:
        link = replace(link, delay_s=_number(what, row, "delay_ms", 0, 60_000) / 1e3)
    if "jitter_ms" in row:
        link = replace(link, jitter_s=_number(what, row, "jitter_ms", 0, 60_000) / 1e3)
    if "mbit_per_s" in row:
        link = replace(link, bytes_per_s=_number(what, row, "mbit_per_s", 0.01, 1e5) * 1e6 / 8)
    if link.jitter_s > link.delay_s:
        raise ValueError(f"{what}: the jitter exceeds the delay, and nothing arrives before it was sent")
    return link


def _keys(what: str, row: Any, known: set[str]) -> None:
    if not isinstance(row, dict):
        raise ValueError(f"{what} must be a table")
    for key in sorted(row.keys() - known):
        raise ValueError(f"{what} has an unknown key {key!r}; known: {', '.join(sorted(known))}")


def _number(what: str, row: dict[str, Any], key: str, low: float, high: float) -> float:
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ValueError(f"{what}: {key} must be a number from {low:g} to {high:g}, not {value!r}")
    return float(value)
