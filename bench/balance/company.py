"""Nodes on loopback that end and start while a coordinator uses the others."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import trio

from shoal.processes import NodeSpec, RunningNode, end, start

_FIRST_PORT = 7461


@dataclass(slots=True)
class Member:
    """A node, which may have ended."""

    model: Path
    directory: Path
    spec: NodeSpec
    running: RunningNode | None = None

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.spec.listen.rpartition(":")
        return host, int(port)

    def start(self) -> None:
        """Starts it, unless it runs, and waits until it listens."""
        if self.running is None or self.running.process.poll() is not None:
            (self.directory / f"{self.spec.name}.port").unlink(missing_ok=True)
            self.running = start(self.model, self.spec, self.directory)

    def kill(self) -> None:
        """Ends it at once."""
        assert self.running is not None
        self.running.process.kill()
        self.running.process.wait()

    def ask_to_end(self) -> float:
        """Sends it SIGTERM; the time of that."""
        assert self.running is not None
        os.kill(self.running.process.pid, signal.SIGTERM)
        return time.monotonic()

    @property
    def code(self) -> int | None:
        """Its exit code, if it has ended."""
        assert self.running is not None
        return self.running.process.poll()


@dataclass(slots=True)
class Company:
    """The nodes in the order of their addresses."""

    members: Sequence[Member]
    _pool: ThreadPoolExecutor

    async def apart(self, call: Callable[[], None]) -> None:
        """Runs a blocking call in a thread that lives as long as the nodes, since a process ends with the
        thread that started it."""
        await trio.to_thread.run_sync(lambda: self._pool.submit(call).result())

    def processes(self) -> list[int]:
        """The ids of those that run."""
        running = [member.running.process for member in self.members if member.running is not None]
        return [process.pid for process in running if process.poll() is None]

    def all_running(self) -> None:
        """Starts those that have ended."""
        for member in self.members:
            self._pool.submit(member.start).result()


@contextmanager
def company(model: Path, specs: Sequence[NodeSpec], directory: Path) -> Iterator[Company]:
    """Nodes that are not started yet, each at a port of its own."""
    members = []
    for i, spec in enumerate(specs):
        placed = replace(
            spec, listen=f"127.0.0.1:{_FIRST_PORT + i}", options=("--insecure", *spec.options)
        )  # without the house of who runs this
        members.append(Member(model, directory, placed))
    with ThreadPoolExecutor(1) as pool:
        try:
            yield Company(members, pool)
        finally:
            end([member.running.process for member in members if member.running is not None])
