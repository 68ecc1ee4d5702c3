"""Whether a command asks the head of this device, or computes in its own process."""

from __future__ import annotations

import argparse
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from ..engine.errors import OperatingSystemError, ShoalError
from ..engine.model_directory import Model
from . import unix_socket

if TYPE_CHECKING:
    from ..status import Status
    from .reconnecting import ReconnectingEngine

LOOK_SECONDS = 2.0
"""The time between two looks at a head whose answers are waited for."""


def head_for(args: argparse.Namespace, model: Model) -> ReconnectingEngine | None:
    """The engine of the head, for the command line of `shoal run` and the like. None: no head runs, it has
    another model or a shorter context than asked for, or the command line says where to compute. What is not
    as usual is said on standard error."""
    if not may_ask(args):
        return None
    from .reconnecting import connect_to_head

    try:
        engine = connect_to_head()
    except ShoalError as error:
        print(f"shoal: computing without the head: {error}", file=sys.stderr)
        return None
    if engine is None or (engine.welcome.hash == model.hash and _fits(args, engine)):
        return engine
    engine.close()
    return None


def may_ask(args: argparse.Namespace) -> bool:
    """Whether there may be a head, and the command line says nothing about where to compute and with which
    engine."""
    chosen = args.alone, args.nodes, args.insecure, args.backend, args.isa, args.threads, args.resident
    if chosen != (False, (), False, "auto", "auto", None, None):
        return False
    if getattr(args, "private", None) is not None:  # the head has decided that when it began
        return False
    with suppress(OperatingSystemError):  # there is no home directory, and so no head
        return os.path.exists(unix_socket.socket_path())
    return False


def _fits(args: argparse.Namespace, engine: ReconnectingEngine) -> bool:
    context = engine.welcome.context
    if args.context is None or not 0 < context < args.context:
        return True
    print(
        f"shoal: computing without the head: its context is {context} tokens, and {args.context} are asked "
        "for",
        file=sys.stderr,
    )
    return False


def where(engine: ReconnectingEngine) -> str:
    """Where answers are computed, in words. Errors as for ReconnectingEngine.status."""
    working = [device for device in engine.status().devices if device.units is not None]
    return f"the house's head, {len(working)} device{'' if len(working) == 1 else 's'}"


def _say(sentence: str) -> None:
    print(f"shoal: {sentence}", file=sys.stderr, flush=True)


@contextmanager
def waiting_told(engine: ReconnectingEngine, say: Callable[[str], object] = _say) -> Iterator[None]:
    """Says, while the block waits for answers, why the head cannot give any, and when it can again. It looks
    in a thread of its own."""
    ended = threading.Event()

    def look() -> None:
        said, at_once = "", not engine.welcome.context
        with suppress(ShoalError):  # whoever waits for an answer is told
            while at_once or not ended.wait(LOOK_SECONDS):
                now = obstacle(engine.status()) if at_once or engine.busy else said
                if now != said and not ended.is_set():
                    say(now or "the head is ready")
                said, at_once = now, False

    threading.Thread(target=look, name="shoal waiting", daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def obstacle(status: Status) -> str:
    """Why the head cannot answer for now, as a sentence; empty: it can, or will within seconds."""
    if status.context and status.phase != "waiting":
        return ""
    return f"the head is not ready ({status.reason or status.phase}): the answer comes when it is"
