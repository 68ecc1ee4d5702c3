"""Devices of a house for tests: keys and certificates as `shoal invite` and `shoal join` make them."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from shoal import house
from shoal.net.messages import PairedDevice, Role
from shoal.net.tls import Trust, certificate_in


@cache
def _made(name: str) -> bytes:
    return house._made()


class Houses:
    """Devices by name, each with a file of its own in `place`. The device `head` is the head."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def own(self, name: str) -> Path:
        """The file of a device's key and certificate."""
        path = self.place / f"{name}.pem"
        if not path.exists():
            path.touch(mode=0o600)
            path.write_bytes(_made(name))
        return path

    def device(self, name: str, role: Role | None = None) -> PairedDevice:
        """A device as the house knows it."""
        certificate = b64encode(certificate_in(self.own(name))).decode()
        return PairedDevice(name, role or ("head" if name == "head" else "device"), certificate)

    def devices(self, *names: str) -> tuple[PairedDevice, ...]:
        """The list of a house."""
        return tuple(map(self.device, names))

    def trust(self, name: str, devices: Sequence[str] = ()) -> Trust:
        """What a process of the device knows of a house of these devices."""
        return Trust(self.own(name), self.devices(*(devices or ("head", name))))
