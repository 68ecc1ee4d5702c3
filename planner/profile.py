"""Measured profiles: what a device and a link do, as rows, as versioned JSON, and as the planner's devices
and links.

The rows are facts as measured. What is promised (a RAM cap) or pretended (a slow-down factor) comes in only
when they are made into a cluster. Writing a file atomically is the caller's affair.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, TypeVar

from .check import check_name, check_real, check_row_rates, check_whole
from .refresh import slowed
from .rows import Cluster, Device, Link

VERSION = 2
FREE_SHARE = 0.75  # of the free RAM is promised when nobody says how much: other programs want to grow, too

Row = TypeVar("Row", "DeviceProfile", "LinkProfile")


@dataclass(frozen=True, slots=True)
class DeviceProfile:
    """What one device reached, measured alone with the kernels that will run, at its best thread count."""

    name: str
    backend: str  # native, numba, numpy
    isa: str  # the kernel set, as avx2 or neon_dot
    threads: int
    read_bytes_per_s: float  # weights of decoded rows
    macs_per_s: float
    ram_total: int  # bytes
    ram_free: int
    step_overhead_s: float  # one stage call that computes next to nothing
    idle_overhead_s: float = 0.0  # what a step takes more after a pause
    row_rates: tuple[tuple[int, float], ...] = ()  # (rows of a call, MAC/s), ascending
    attend_macs_per_s: float | None = None  # attention of one row; None: not measured
    prefill_attend_macs_per_s: float | None = None  # and of many

    def __post_init__(self) -> None:
        check_name("a device profile", self.name)
        check_name(f"profile of {self.name}: backend", self.backend)
        check_name(f"profile of {self.name}: isa", self.isa)
        check_whole(f"profile of {self.name}: threads", self.threads, 1)
        check_real(f"profile of {self.name}: read_bytes_per_s", self.read_bytes_per_s, above=0)
        check_real(f"profile of {self.name}: macs_per_s", self.macs_per_s, above=0)
        check_whole(f"profile of {self.name}: ram_total", self.ram_total, 1)
        check_whole(f"profile of {self.name}: ram_free", self.ram_free)
        check_real(f"profile of {self.name}: step_overhead_s", self.step_overhead_s)
        check_real(f"profile of {self.name}: idle_overhead_s", self.idle_overhead_s)
        check_row_rates(f"profile of {self.name}", self.row_rates)
        for field in ("attend_macs_per_s", "prefill_attend_macs_per_s"):
            if getattr(self, field) is not None:
                check_real(f"profile of {self.name}: {field}", getattr(self, field), above=0)
        if self.ram_free > self.ram_total:
            raise ValueError(
                f"profile of {self.name}: ram_free {self.ram_free} exceeds ram_total {self.ram_total}"
            )


@dataclass(frozen=True, slots=True)
class LinkProfile:
    """What one direction between two nodes reached."""

    src: str
    dst: str
    latency_s: float  # of half of all messages at most
    bytes_per_s: float
    latency_p95_s: float | None = None  # of 95 % at most; None: not measured

    def __post_init__(self) -> None:
        check_name("a link profile's src", self.src)
        check_name("a link profile's dst", self.dst)
        check_real(f"link {self.src} -> {self.dst}: latency_s", self.latency_s)
        check_real(f"link {self.src} -> {self.dst}: bytes_per_s", self.bytes_per_s, above=0)
        if self.latency_p95_s is not None:
            check_real(f"link {self.src} -> {self.dst}: latency_p95_s", self.latency_p95_s)
            if self.latency_p95_s < self.latency_s:
                raise ValueError(
                    f"link {self.src} -> {self.dst}: latency_p95_s {self.latency_p95_s} is below the median "
                    f"{self.latency_s}"
                )


@dataclass(frozen=True, slots=True)
class Profile:
    """All that was measured of a cluster; each device and each direction once."""

    devices: tuple[DeviceProfile, ...]
    links: tuple[LinkProfile, ...] = ()

    def __post_init__(self) -> None:
        names = [device.name for device in self.devices]
        _no_twin("device", names)
        _no_twin("link", [f"{link.src} -> {link.dst}" for link in self.links])


def _no_twin(what: str, names: list[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ValueError(f"the profile has {what} {name} twice")
        seen.add(name)


def dumps(profile: Profile) -> str:
    """JSON text of a profile, one that `loads` gives back equal."""
    body = {
        "shoal_profile": VERSION,
        "devices": [asdict(device) for device in profile.devices],
        "links": [asdict(link) for link in profile.links],
    }
    return json.dumps(body, indent=2, allow_nan=False) + "\n"


def loads(text: str) -> Profile:
    """The profile of a JSON text, which may come from anywhere.

    ValueError names what is wrong: no JSON, another version, a missing, unknown or repeated key, a wrong
    type, a number out of range or not finite.
    """
    try:
        body = json.loads(text, object_pairs_hook=_object, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("the profile is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"the profile is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise ValueError(f"the profile must be a JSON object, not {_kind(body)}")
    if body.get("shoal_profile") != VERSION or isinstance(body.get("shoal_profile"), bool):
        raise ValueError(f"the profile has version {body.get('shoal_profile')!r}; this shoal reads {VERSION}")
    _keys("the profile", body, {"shoal_profile", "devices", "links"})
    return Profile(_rows("devices", body, DeviceProfile), _rows("links", body, LinkProfile))


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    body = dict(pairs)
    if len(body) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the profile repeats the key {next(key for key in keys if keys.count(key) > 1)!r}")
    return body


def _no_constant(name: str) -> None:
    raise ValueError(f"the profile holds {name}, which is no finite number")


def _kind(value: object) -> str:
    return "nothing" if value is None else type(value).__name__


def _keys(what: str, body: dict[str, Any], known: set[str], needed: set[str] | None = None) -> None:
    for key in sorted((known if needed is None else needed) - body.keys()):
        raise ValueError(f"{what} lacks {key!r}")
    for key in sorted(body.keys() - known):
        raise ValueError(f"{what} has an unknown key {key!r}")


def _rows(key: str, body: dict[str, Any], kind: type[Row]) -> tuple[Row, ...]:
    entries = body[key]
    if not isinstance(entries, list):
        raise ValueError(f"the profile's {key} must be a list, not {_kind(entries)}")
    rows = []
    for at, entry in enumerate(entries):
        what = f"the profile's {key}[{at}]"
        if not isinstance(entry, dict):
            raise ValueError(f"{what} must be an object, not {_kind(entry)}")
        needed = {field.name for field in fields(kind) if field.default is MISSING}
        _keys(what, entry, {field.name for field in fields(kind)}, needed)
        try:
            # JSON has one kind of number, so 2e9 and 2000000000 are the same rate; whole numbers stay strict.
            rates = {field.name for field in fields(kind) if field.type in (float, float | None)}
            values: dict[str, Any] = {k: _as_float(v) if k in rates else v for k, v in entry.items()}
            if "row_rates" in values:
                values["row_rates"] = _pairs(values["row_rates"])
            rows.append(kind(**values))
        except (ValueError, OverflowError) as error:
            raise ValueError(f"{what}: {error}") from error
    return tuple(rows)


def _pairs(value: object) -> object:
    """Lists of two as pairs; anything else as it is, for the row to refuse."""
    if not isinstance(value, list) or not all(isinstance(pair, list) for pair in value):
        return value
    return tuple((pair[0], _as_float(pair[1])) if len(pair) == 2 else tuple(pair) for pair in value)


def _as_float(value: object) -> object:
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def device_row(
    profile: DeviceProfile, *, cap_bytes: int | None = None, slow: float = 1.0, base_bytes: int = 0
) -> Device:
    """The planner's row for a profiled device that promises `cap_bytes` of RAM (None: FREE_SHARE of what is
    free) and whose steps take `slow` times as long, all of them, the overhead too.

    ValueError: a cap above the device's RAM, a factor below 1.
    """
    if cap_bytes is None:
        cap_bytes = int(profile.ram_free * FREE_SHARE)
    check_whole(f"the RAM cap of {profile.name}", cap_bytes)
    if cap_bytes > profile.ram_total:
        raise ValueError(
            f"the RAM cap of {profile.name}, {cap_bytes} bytes, exceeds its RAM of {profile.ram_total} bytes"
        )
    check_real(f"the slow factor of {profile.name}", slow)
    if slow < 1:
        raise ValueError(f"the slow factor of {profile.name} must be >= 1, not {slow!r}")
    return slowed(
        Device(
            name=profile.name,
            ram_bytes=cap_bytes,
            read_bytes_per_s=profile.read_bytes_per_s,
            macs_per_s=profile.macs_per_s,
            base_bytes=base_bytes,
            step_overhead_s=profile.step_overhead_s,
            idle_overhead_s=profile.idle_overhead_s,
            row_rates=profile.row_rates,
            attend_macs_per_s=profile.attend_macs_per_s or math.inf,
            prefill_attend_macs_per_s=profile.prefill_attend_macs_per_s or math.inf,
        ),
        slow,
    )


def link_row(profile: LinkProfile) -> Link:
    """The planner's row for a profiled link."""
    return Link(profile.latency_s, profile.bytes_per_s)


def cluster_from(
    profile: Profile,
    head: str,
    *,
    caps: Mapping[str, int] | None = None,
    slow: Mapping[str, float] | None = None,
    base_bytes: Mapping[str, int] | None = None,
) -> Cluster:
    """The planner's cluster: the profiled devices with their caps, slow-down factors and bases by device
    name.

    ValueError: a cap, factor or base for a device that the profile does not have; a link to a node that is
    neither a device nor the head.
    """
    caps, slow, base_bytes = caps or {}, slow or {}, base_bytes or {}
    names = {device.name for device in profile.devices}
    for what, by_name in (("RAM cap", caps), ("slow factor", slow), ("base", base_bytes)):
        for name in by_name:
            if name not in names:
                raise ValueError(f"a {what} is given for {name}, which the profile does not have")
    return Cluster(
        devices=tuple(
            device_row(
                device,
                cap_bytes=caps.get(device.name),
                slow=slow.get(device.name, 1.0),
                base_bytes=base_bytes.get(device.name, 0),
            )
            for device in profile.devices
        ),
        links={(link.src, link.dst): link_row(link) for link in profile.links},
        head=head,
    )
