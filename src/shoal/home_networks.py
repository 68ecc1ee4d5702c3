"""Which addresses devices of a home have. The head and the process of mDNS both ask, and share no more."""

from __future__ import annotations

import ipaddress
from contextlib import suppress

_PRIVATE = tuple(
    map(ipaddress.IPv4Network, ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "169.254.0.0/16"))
)


def is_private(address: str) -> bool:
    """Whether this is an IPv4 address as devices of a home have it."""
    with suppress(ValueError):
        ip = ipaddress.IPv4Address(address)
        return any(ip in network for network in _PRIVATE)
    return False
