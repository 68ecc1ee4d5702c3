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
        help="let in who has a key of FILE, which has one on each line, with a name before it if you like "
        "(default: everybody who reaches the port)",
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
        help="let scripts of these web pages ask, such as https://chat.example; *: of all (default: none)",
    )
    group.add_argument(
        "--allow-host",
        type=listed(name),
        default=(),
        metavar="NAME,...",
        help="let in requests to these names of the server, such as that of a proxy before it (default: "
        "names of this device; of others, IP addresses)",
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
        help="let at most N requests wait; others are told when to come again (default 128)",
    )
    group.add_argument(
        "--grace",
        type=seconds,
        default=30.0,
        metavar="S",
        help="after Ctrl-C or SIGTERM, let running answers go on for at most S seconds (default 30)",
    )
