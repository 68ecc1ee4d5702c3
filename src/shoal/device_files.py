"""Files that describe devices: TOML that a person writes, and JSON that `shoal profile` writes. Both are
decoded strictly (engine/strict) to the planner's rows."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from .engine.errors import ShoalError
from .engine.host import Ram
from .engine.measure import DeviceMeasurements
from .engine.strict import Between, Printable, convert, parse
from .planner import Cluster, Device, LinkSpeed
from .planning import BASE_BYTES, FREE_SHARE, MB, device_row

PROFILE_VERSION = 3
_Bytes = Annotated[int, Between(1, 1 << 60)]
_Word = Annotated[str, Printable(1, 64)]


@dataclass(frozen=True, slots=True)
class DeviceProfile:
    """A device as it would offer itself, measured with the kernels that will run, and how it was measured."""

    device: Device
    backend: _Word
    """native, numba or numpy."""
    isa: _Word
    """The kernel set, such as avx2 or neon_dot."""
    threads: Annotated[int, Between(1, 4096)]
    ram_total: _Bytes
    ram_free: _Bytes

    def __post_init__(self) -> None:
        if self.ram_free > self.ram_total:
            raise ValueError(f"ram_free {self.ram_free} exceeds ram_total {self.ram_total}")
        if self.device.ram_bytes > self.ram_total:
            promised = f"device {self.device.name}: ram_bytes {self.device.ram_bytes}"
            raise ValueError(f"{promised} exceeds ram_total {self.ram_total}")


@dataclass(frozen=True, slots=True)
class ProfiledLink:
    """The measured speed of one direction between two devices."""

    source: _Word
    target: _Word
    speed: LinkSpeed


@dataclass(frozen=True, slots=True)
class Profile:
    """All measurements of a cluster. The coordinator is on the first device."""

    shoal_profile: int
    devices: tuple[DeviceProfile, ...]
    links: tuple[ProfiledLink, ...] = ()

    @property
    def cluster(self) -> Cluster:
        """The planner's view. ValueError: no device, a duplicate device or link, or a link to an unknown
        device."""
        if not self.devices:
            raise ValueError("it has no devices")
        links = {(link.source, link.target): link.speed for link in self.links}
        if len(links) < len(self.links):
            raise ValueError("it has a duplicate link")
        devices = tuple(profile.device for profile in self.devices)
        return Cluster(devices, links, devices[0].name)


def device_profile(name: str, measured: DeviceMeasurements, ram: Ram) -> DeviceProfile:
    """A measurement as a row of a profile. The device promises FREE_SHARE of its free RAM.

    ShoalError: the system does not say how much RAM it has."""
    if ram.total is None or ram.estimate is None:
        raise ShoalError(
            "this system does not say how much RAM it has, which a profile needs: describe the device in a "
            ".toml file with its ram_mb"
        )
    backend, _, isa = measured.backend.partition(" ")
    promised = int(ram.estimate * FREE_SHARE)
    device = device_row(name, measured, ram_bytes=promised, base_bytes=BASE_BYTES)
    return DeviceProfile(
        device, backend, isa.strip("()") or backend, measured.threads, ram.total, ram.estimate
    )


def dump_profile(devices: tuple[DeviceProfile, ...], links: tuple[ProfiledLink, ...] = ()) -> str:
    """A profile as JSON text; `load_profile` returns an equal profile."""
    return json.dumps(asdict(Profile(PROFILE_VERSION, devices, links)), indent=2, allow_nan=False) + "\n"


def load_profile(text: str) -> Profile:
    """The profile in untrusted JSON text. ValueError names what is wrong."""
    body = parse(text)
    if not isinstance(body, dict):
        raise ValueError("a profile must be a JSON object")
    version = body.get("shoal_profile")
    if version != PROFILE_VERSION or isinstance(version, bool):
        raise ValueError(
            f"the profile has version {version!r:.20}, and this shoal reads version {PROFILE_VERSION}: "
            "measure again with `shoal profile --save`"
        )
    return convert(Profile, body, "the profile", defaults=True)


def read_devices(path: Path) -> Cluster:
    """The cluster that a file describes: TOML as in the README, or JSON of `shoal profile`.

    ShoalError: the file cannot be read, has an unknown key, or a value is out of range.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json" or text.lstrip().startswith("{"):  # which no TOML file does
            return load_profile(text).cluster
        import tomllib  # only here: a node reads no such file

        return _cluster(tomllib.loads(text))
    except FileNotFoundError:
        raise ShoalError(f"{path} does not exist: name a file that describes the devices") from None
    except RecursionError:
        raise ShoalError(f"{path} is nested too deeply") from None
    except ValueError as e:
        raise ShoalError(f"{path}: {e}") from e


_Number = Annotated[float, Between(-1e15, 1e15)]


@dataclass(frozen=True, slots=True)
class _DeviceTable:
    """A [[device]] table of a TOML file."""

    name: str
    read_gb_per_s: _Number
    gmac_per_s: _Number
    ram_mb: _Number
    base_mb: _Number = BASE_BYTES / MB
    step_overhead_ms: _Number = 0.1
    idle_overhead_ms: _Number = 0.0

    @property
    def row(self) -> Device:
        return Device(
            name=self.name,
            ram_bytes=int(self.ram_mb * MB),
            read_bytes_per_s=self.read_gb_per_s * 1e9,
            macs_per_s=self.gmac_per_s * 1e9,
            base_bytes=int(self.base_mb * MB),
            step_overhead_s=self.step_overhead_ms / 1e3,
            idle_overhead_s=self.idle_overhead_ms / 1e3,
        )


@dataclass(frozen=True, slots=True)
class _LinkTable:
    """The speed of a link in a TOML file."""

    latency_ms: _Number
    mbit_per_s: _Number

    @property
    def row(self) -> LinkSpeed:
        return LinkSpeed(self.latency_ms / 1e3, self.mbit_per_s * 1e6 / 8)


def _cluster(body: dict[str, Any]) -> Cluster:
    """The cluster of a TOML file. ValueError names what is wrong."""
    for key in sorted(body.keys() - {"device", "coordinator", "default_link", "link"}):
        raise ValueError(
            f"the file has an unknown key {key!r}; known: coordinator, default_link, device, link"
        )
    rows = body.get("device")
    if not isinstance(rows, list) or not rows:
        raise ValueError("it needs at least one [[device]]")
    devices = tuple(
        convert(_DeviceTable, row, f"[[device]] {_named(row)}", defaults=True).row for row in rows
    )
    names = [device.name for device in devices]
    coordinator = _name("coordinator", body.get("coordinator", names[0]))
    links = {}
    if "default_link" in body:
        link = convert(_LinkTable, body["default_link"], "default_link").row
        links = {(a, b): link for a in {coordinator, *names} for b in {coordinator, *names} if a != b}
    rows = body.get("link", [])
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("each link must be a [[link]] table")
    for row in rows:
        ends = (_name("[[link]]: from", row.get("from")), _name("[[link]]: to", row.get("to")))
        speed = {key: value for key, value in row.items() if key not in ("from", "to")}
        links[ends] = links[ends[::-1]] = convert(_LinkTable, speed, "[[link]]").row
    return Cluster(devices, links, coordinator)


def _named(row: Any) -> str:
    name = row.get("name") if isinstance(row, dict) else None
    return name if isinstance(name, str) and name.isprintable() else "without a name"


def _name(what: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{what} must be a name, not {value!r:.60}")
    return value
