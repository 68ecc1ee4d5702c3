"""Devices of a house for tests: keys and certificates as `shoal invite` and `shoal join` make them."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from shoal import house
from shoal.net.messages import Housemate, Role
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

    def mate(self, name: str, role: Role | None = None) -> Housemate:
        """A device as the house knows it."""
        certificate = b64encode(certificate_in(self.own(name))).decode()
        return Housemate(name, role or ("head" if name == "head" else "device"), certificate)

    def mates(self, *names: str) -> tuple[Housemate, ...]:
        """The list of a house."""
        return tuple(map(self.mate, names))

    def trust(self, name: str, mates: Sequence[str] = ()) -> Trust:
        """What a process of the device knows of a house of these devices."""
        return Trust(self.own(name), self.mates(*(mates or ("head", name))))
