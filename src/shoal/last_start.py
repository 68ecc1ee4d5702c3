"""What `shoal up` keeps for its next start: the links between the devices of its house, and which devices had
layers. With it, the next start plans as soon as these devices are there, without measuring links first.

It is the file `last.json` beside those of the house (house.py). Nothing depends on it: one that is damaged,
or of another version, counts as none.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Annotated

from . import house
from .engine import strict
from .engine.files import write_whole
from .net.known import HEAD, DeviceLinks
from .net.messages import MOST_DEVICES, U32
from .net.requests import Key
from .planner import LinkSpeed

LAST = "last.json"
_MOST_LINKS = (MOST_DEVICES + 1) ** 2
_Device = Annotated[int, strict.Between(HEAD, (1 << 32) - 1)]


@dataclass(frozen=True, slots=True)
class _Link:
    source: _Device
    target: _Device
    speed: LinkSpeed


@dataclass(frozen=True, slots=True)
class _Last:
    """The contents of the file. `model` is the hash of the model of which `devices` had layers."""

    version: Annotated[int, strict.Between(1, 1)]
    model: Key
    devices: Annotated[tuple[U32, ...], strict.AtMost(MOST_DEVICES)]
    links: Annotated[tuple[_Link, ...], strict.AtMost(_MOST_LINKS)]


def recalled(model: str) -> tuple[frozenset[int], DeviceLinks]:
    """The devices (members.device_of) that had layers of this model, and the links between all devices, as
    far as they are known."""
    try:
        last = strict.decode(_Last, (house.directory() / LAST).read_bytes())
    except (OSError, ValueError):
        return frozenset(), {}
    devices = frozenset(last.devices) if last.model == model else frozenset()
    return devices, {(link.source, link.target): link.speed for link in last.links}


def keep(model: str, devices: Collection[int], links: DeviceLinks) -> None:
    """Keeps what `recalled` returns. OSError, ShoalError: it cannot be written."""
    found = tuple(_Link(*ends, speed) for ends, speed in sorted(links.items(), key=lambda item: item[0]))
    last = _Last(1, model, tuple(sorted(devices)), found)
    write_whole(house.directory() / LAST, strict.encode(last).decode())
