"""Runs inputs through a target: those that were kept, and changes of these and of its seeds."""

from __future__ import annotations

import base64
import hashlib
import signal
import tracemalloc
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from types import FrameType

import trio
import trio.testing

from .lines import Lines
from .mutate import Source, mutated
from .target import Target

CORPUS = Path(__file__).with_name("corpus")
"""A folder for each target, with inputs that were read wrongly once, and a file with those that first reached
a line of the reader."""
MOST_BYTES = 24 << 20
"""What reading 64 KiB at most may allocate: the largest frame, or the values as objects."""
MEASURED = 50
"""One of so many inputs is run again, with its allocations measured."""
TRACED, FIRST = (2, 16), 20_000
"""One of so many inputs, of the FIRST and later, is traced for the lines that it reaches, which is slow."""
SECONDS = 10
"""An input that takes so long hangs."""
MOST_POOL = 400


@dataclass(frozen=True, slots=True)
class Bad:
    """An input that a target reads wrongly, and how."""

    data: bytes
    how: str


class _HangError(BaseException):
    """No `except Exception` of a target takes it."""


def kept(name: str) -> list[bytes]:
    """The inputs of a target in the corpus."""
    wrong = [path.read_bytes() for path in sorted((CORPUS / folder(name)).glob("*"))]
    reached = _reached(name)
    lines = reached.read_bytes().split() if reached.exists() else []
    return wrong + [zlib.decompress(base64.b64decode(line)) for line in lines]


def keep(name: str, bad: Bad) -> Path:
    """Adds an input that was read wrongly to the corpus."""
    path = CORPUS / folder(name) / hashlib.sha256(bad.data).hexdigest()[:16]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bad.data)
    return path


def keep_reached(name: str, inputs: list[bytes]) -> None:
    """Adds inputs that have reached a line to the corpus."""
    with _reached(name).open("ab") as file:
        for data in inputs:
            file.write(base64.b64encode(zlib.compress(data, 9)) + b"\n")


def folder(name: str) -> str:
    """The folder of a target."""
    return "".join(letter if letter.isalnum() else "-" for letter in name)


def _reached(name: str) -> Path:
    return CORPUS / f"{folder(name)}.reached"


def explore(name: str, target: Target, count: int, seed: int) -> Bad | None:
    """Runs so many inputs through a target; see Explorer."""
    return Explorer(name, target, seed).run(count)


class Explorer:
    """Runs the seeds of a target, the inputs in its corpus and new ones, which are changes of all these, of
    inputs that reached a line first, and of some that were accepted last. The same seed gives the same
    inputs."""

    def __init__(self, name: str, target: Target, seed: int) -> None:
        self._name, self._target, self._random = name, target, Random(f"{name} {seed}")
        self._data = b""
        self.lines = Lines()
        self.reached = list[bytes]()
        """New inputs that reached a line first."""

    def run(self, count: int) -> Bad | None:
        """Runs so many new inputs; returns the first that is read wrongly."""
        try:
            with _alarm():
                if self._target.waits:
                    trio.run(self._run, count, clock=trio.testing.MockClock(autojump_threshold=0))
                else:  # nothing of it waits
                    self._run(count).send(None)
        except StopIteration:
            return None
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # also that of a library which is not written in Python
            return Bad(self._data, f"{type(error).__name__}: {error}"[:2000])
        return None

    async def _run(self, count: int) -> None:
        random, seeds, accepted = self._random, self._target.seeds, list[bytes]()
        pool = [*seeds, *kept(self._name)]
        for number, data in enumerate(pool):
            right = await self._traced(data)
            assert right or number >= len(seeds), f"a seed of {self._name} is refused"
        self.lines.new, source = False, Source(pool, self.lines.words())
        for at in range(count):
            data = mutated(random, random.choice(random.choice((pool, accepted or pool))), source)
            if at % TRACED[at >= FIRST]:
                right = await self._accepts(data)
            else:
                right = await self._traced(data)
                if self.lines.new:
                    self.lines.new = False
                    pool.append(data)
                    self.reached.append(data)
            if right and len(accepted) < MOST_POOL:
                accepted.append(data)
            elif right:
                accepted[random.randrange(MOST_POOL)] = data
            if at % MEASURED == 0:
                took = await self._allocated(data)
                assert took <= MOST_BYTES, f"it allocates {took} bytes"

    async def _accepts(self, data: bytes) -> bool:
        """Whether the target accepts an input. Any error but those by which it refuses one is raised."""
        self._data = data
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            waits = self._target.read(data)
            if self._target.waits:
                await waits
        except self._target.refuses:
            return False
        return True

    async def _traced(self, data: bytes) -> bool:
        with self.lines:
            return await self._accepts(data)

    async def _allocated(self, data: bytes) -> int:
        """The most bytes that are allocated at a time while the target reads an input."""
        tracemalloc.start()
        try:
            await self._accepts(data)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()


@contextmanager
def _alarm() -> Iterator[None]:
    """Ends what takes too many seconds of a core: a machine that is busy with other things is no hang."""

    def hangs(number: int, frame: FrameType | None) -> None:
        raise _HangError(f"it takes more than {SECONDS} s")

    before = signal.signal(signal.SIGPROF, hangs)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
