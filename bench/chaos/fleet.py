"""Nodes that are killed, frozen and mended: one process each, with its own copy of the model's files."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import trio

from shoal.engine.model_directory import Model
from shoal.net.slow import turn
from shoal.processes import NodeSpec, RunningNode, end, start

RAM_MB = 2000


@dataclass
class Node:
    """A node, its files, and what was done to it."""

    name: str
    source: Path
    directory: Path
    slow: float
    running: RunningNode | None = None
    fds: int = 0
    """File descriptors that the process has without a coordinator."""
    rss: list[int] = field(default_factory=list)
    """Resident bytes of the process after each trial."""
    hung: ExitStack = field(default_factory=ExitStack)

    @property
    def model(self) -> Path:
        return self.directory / self.name

    @property
    def pid(self) -> int:
        assert self.running is not None
        return self.running.process.pid

    @property
    def alive(self) -> bool:
        return self.running is not None and self.running.process.poll() is None

    def start(self) -> None:
        """Starts the process, at the address that it had before, and waits until it listens."""
        (self.directory / f"{self.name}.port").unlink(missing_ok=True)
        listen = "127.0.0.1:0" if self.running is None else "{}:{}".format(*self.running.address)
        # Where devices take turns, a call waits for a lock. Whoever holds the lock makes it hang.
        options = ("--measure-seconds", "0.05", "--no-resident", "--slow-turns", str(self.turns))
        spec = NodeSpec(self.name, RAM_MB, self.slow, options=options, listen=listen)
        self.running = start(self.model, spec, self.directory)
        self.fds, self.rss = self.open_files(), []

    @property
    def turns(self) -> Path:
        return self.directory / f"{self.name}.turns"

    def kill(self) -> None:
        """Ends the process at once."""
        assert self.running is not None
        self.running.process.kill()
        self.running.process.wait()

    def freeze(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        if self.alive:
            os.kill(self.pid, signal.SIGCONT)

    def hang(self) -> None:
        """Lets the calls of its stage not return."""
        self.hung.enter_context(turn(self.turns))

    def truncate(self, size: int) -> None:
        """Cuts off the files of its units, which it has mapped."""
        for path in self.model.glob("unit-*.safetensors"):
            os.truncate(path, size)

    def mend(self) -> None:
        """Undoes all of it: afterwards the process runs and its files are whole."""
        self.thaw()
        self.hung.close()
        broken = any(
            path.stat().st_size != (self.source / path.name).stat().st_size
            for path in self.model.glob("unit-*.safetensors")
        )
        if broken and self.alive:
            self.kill()
        if broken or not self.model.exists():
            shutil.rmtree(self.model, ignore_errors=True)
            shutil.copytree(self.source, self.model)
        if not self.alive:
            self.start()

    def leaks(self) -> bool:
        """Whether the process has more file descriptors than without a coordinator."""
        return self.alive and self.open_files() > self.fds

    def open_files(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def children(self) -> list[int]:
        """The ids of processes that the process has started."""
        tasks = Path(f"/proc/{self.pid}/task").glob("*/children")
        return [int(number) for task in tasks for number in task.read_text("ascii").split()]

    def resident_bytes(self) -> int:
        for line in Path(f"/proc/{self.pid}/status").read_text("ascii").splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
        raise KeyError("VmRSS")


@dataclass
class Fleet:
    """The nodes by name."""

    nodes: dict[str, Node]
    _directory: Path
    _pool: ThreadPoolExecutor
    _files: frozenset[Path] = frozenset()

    async def apart(self, call: Callable[[], None]) -> None:
        """Runs a blocking call in a thread that lives as long as the fleet, since a child process ends with
        the thread that started it."""
        await trio.to_thread.run_sync(lambda: self._pool.submit(call).result())

    async def mend(self) -> None:
        for node in self.nodes.values():
            await self.apart(node.mend)
        self._files = self._files or self._found()

    def new_files(self) -> list[Path]:
        """Files that were not there when the nodes had started for the first time; logs are none."""
        return sorted(self._found() - self._files)

    def _found(self) -> frozenset[Path]:
        return frozenset(path for path in self._directory.rglob("*") if path.suffix != ".log")


@contextmanager
def fleet(model: Path, directory: Path, count: int, slow: float) -> Iterator[Fleet]:
    """Nodes "n0", "n1", …, which are not started yet."""
    Model.open(model)
    made = [Node(f"n{i}", model, directory, slow) for i in range(count)]
    with ThreadPoolExecutor(1) as pool:
        try:
            yield Fleet({node.name: node for node in made}, directory, pool)
        finally:
            for node in made:
                node.thaw()
                node.hung.close()
            end([node.running.process for node in made if node.running is not None])
