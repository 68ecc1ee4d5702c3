"""Runs inputs through a target: those that were kept, and mutations of its seeds."""

from __future__ import annotations

import hashlib
import signal
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from types import FrameType

from .mutate import mutated
from .target import Target

CORPUS = Path(__file__).with_name("corpus")
"""Inputs that were read wrongly once, a folder for each target."""
MOST_BYTES = 24 << 20
"""What reading 64 KiB at most may allocate: the largest frame, or the values as objects."""
MEASURED = 50
"""One of so many inputs is run again, with its allocations measured."""
BATCH, SECONDS = 1000, 60
"""So many inputs may take so long, before the one that runs is said to hang."""
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
    return [path.read_bytes() for path in sorted((CORPUS / folder(name)).glob("*"))]


def keep(name: str, bad: Bad) -> Path:
    """Adds an input to the corpus."""
    path = CORPUS / folder(name) / hashlib.sha256(bad.data).hexdigest()[:16]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bad.data)
    return path


def folder(name: str) -> str:
    """The folder of a target."""
    return "".join(letter if letter.isalnum() else "-" for letter in name)


def explore(name: str, target: Target, count: int, seed: int) -> Bad | None:
    """Runs the seeds, the kept inputs and so many new ones; returns the first that is read wrongly. New
    ones are changes of the seeds and of inputs that were accepted."""
    random, pool = Random(f"{name} {seed}"), [*target.seeds, *kept(name)]
    for data in target.seeds:
        assert accepts(target, data), f"a seed of {name} is refused"
    seeds = len(pool)
    for begin in range(0, len(pool) + count, BATCH):
        data = b""
        try:
            with _alarm(SECONDS):
                for at in range(begin, min(begin + BATCH, seeds + count)):
                    data = pool[at] if at < seeds else mutated(random, random.choice(pool), pool)
                    if accepts(target, data) and at >= seeds:
                        if len(pool) < seeds + MOST_POOL:
                            pool.append(data)
                        else:
                            pool[seeds + random.randrange(MOST_POOL)] = data
                    if at % MEASURED == 0:
                        took = allocated(target, data)
                        if took > MOST_BYTES:
                            return Bad(data, f"it allocates {took} bytes")
        except _HangError:
            return Bad(data, "it hangs")
        except Exception as error:
            return Bad(data, f"{type(error).__name__}: {error}")
    return None


def accepts(target: Target, data: bytes) -> bool:
    """Whether a target accepts an input. Any error but those by which it refuses one is raised."""
    try:
        target.read(data)
    except target.refuses:
        return False
    return True


def allocated(target: Target, data: bytes) -> int:
    """The most bytes that are allocated at a time while a target reads an input."""
    tracemalloc.start()
    try:
        accepts(target, data)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@contextmanager
def _alarm(seconds: int) -> Iterator[None]:
    """Ends what takes so many seconds of a core: a machine that is busy with other things is no hang."""

    def hangs(number: int, frame: FrameType | None) -> None:
        raise _HangError

    before = signal.signal(signal.SIGPROF, hangs)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
