"""Options of the HTTP server, which `shoal serve` and `shoal up` have (docs/server.md). Like `arguments`, it
imports nothing heavy."""

from __future__ import annotations

import argparse
from pathlib import Path

from .arguments import listed, name, positive, seconds, whole

HOST, PORT = "127.0.0.1", 8080
"""Where it listens unless it is told otherwise."""


def add_http(group: argparse._ActionsContainer) -> None:
    """Adds the options that say who may ask, and how many at once."""
    group.add_argument(
        "--api-key-file",
        type=Path,
        metavar="FILE",
        help="require an API key: FILE has one on each line, optionally after a name for the log (default: "
        "everybody who reaches the port may ask)",
    )
    group.add_argument("--tls-cert", type=Path, metavar="FILE", help="certificate chain, for https")
    group.add_argument(
        "--tls-key", type=Path, metavar="FILE", help="its private key (default: in --tls-cert)"
    )
    group.add_argument(
        "--allow-origin",
        type=listed(name),
        default=(),
        metavar="ORIGIN,...",
        help="allow scripts of web pages from these origins, such as https://chat.example; *: from all "
        "(default: none)",
    )
    group.add_argument(
        "--allow-host",
        type=listed(name),
        default=(),
        metavar="NAME,...",
        help="allow these names in the Host header, such as that of a proxy before the server (default: the "
        "names of this device, and from other devices IP addresses)",
    )
    group.add_argument(
        "--answers",
        type=positive,
        default=32,
        metavar="N",
        help="compute at most N answers together; other requests wait (default 32)",
    )
    group.add_argument(
        "--queue",
        type=whole,
        default=128,
        metavar="N",
        help="let at most N requests wait; further ones get status 429 (default 128)",
    )
    group.add_argument(
        "--grace",
        type=seconds,
        default=30.0,
        metavar="S",
        help="after Ctrl-C or SIGTERM, let running answers go on for at most S seconds (default 30)",
    )
