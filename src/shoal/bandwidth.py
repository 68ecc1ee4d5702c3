"""How fast this device reads a model's weights when it does nothing else: the ceiling of decoding.

    python -m shoal.bandwidth MODEL_DIRECTORY THREADS

answers every line on its input with bytes/s of one more measurement. A process of its own, so that its
mappings of the files do not count as memory of whoever compares with it (`Reader`).
"""

from __future__ import annotations

import mmap
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from .engine.errors import ModelFileError, ShoalError
from .engine.shards import Model

_SECONDS = 0.05
_WORD = np.dtype(np.uint64)

Words = NDArray[np.uint64]


class ReadLoop:
    """Files in memory maps, and threads that each read their share of every one of them."""

    def __init__(self, files: Sequence[Path], threads: int) -> None:
        """ModelFileError: a file is missing or empty. The first measurement is warm: every page was
        touched."""
        whole = [_words(path) for path in files]
        self.bytes = sum(words.nbytes for words in whole)
        """Bytes of one pass over everything; up to 7 at the end of each file are left out."""
        self._shares = [
            [words[len(words) * t // threads : len(words) * (t + 1) // threads] for words in whole]
            for t in range(threads)
        ]
        self._passes = 1
        first = self.seconds()
        self._passes = max(1, round(_SECONDS / max(first, 1e-9)))

    def seconds(self) -> float:
        """Time of one pass over everything, by the mean of the passes of about 50 ms."""
        gate = threading.Barrier(len(self._shares) + 1)
        workers = [threading.Thread(target=self._read, args=(share, gate)) for share in self._shares]
        for worker in workers:
            worker.start()
        gate.wait()
        start = time.perf_counter()
        for worker in workers:
            worker.join()
        return (time.perf_counter() - start) / self._passes

    def _read(self, share: Sequence[Words], gate: threading.Barrier) -> None:
        gate.wait()
        for _ in range(self._passes):
            for words in share:
                np.bitwise_xor.reduce(words)  # vectorised, needs every byte, and lets other threads run


def _words(path: Path) -> Words:
    try:
        with path.open("rb") as file:
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as e:
        raise ModelFileError(f"{path} cannot be read: {e}") from e
    return np.frombuffer(memory, np.uint64, len(memory) // _WORD.itemsize)


def decoded_files(model: Model) -> list[Path]:
    """The files whose weights a decoded token reads whole: all but an embedding that no head shares."""
    names = {name for unit in model.index.units[1:] for name in unit.files}
    return [model.path / name for name in sorted(names)]


class Reader:
    """The read loop in a child process. A context: its end ends the child."""

    def __init__(self, model: Path, threads: int) -> None:
        command = [sys.executable, "-m", f"{__package__}.bandwidth", str(model), str(threads)]
        # A session of its own: Ctrl-C is for us, and the child ends when its input does.
        self._child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )

    def __enter__(self) -> Self:
        """Returns when the child is warm, and idle."""
        try:
            self.bytes_per_s()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self._end()

    def _end(self) -> None:
        self._child.terminate()
        self._child.communicate()

    def bytes_per_s(self) -> float:
        """One measurement, about 50 ms. ShoalError: the child has ended; its words are on standard error."""
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        try:
            self._child.stdin.write("\n")
            self._child.stdin.flush()
        except BrokenPipeError:
            pass  # it ended: there is no answer either
        answer = self._child.stdout.readline()
        if not answer:
            raise ShoalError("the read loop ended before it had measured; its error stands above")
        return float(answer)


def main(arguments: Sequence[str]) -> int:
    """The child's side."""
    directory, threads = arguments
    loop = ReadLoop(decoded_files(Model.open(directory)), int(threads))
    for _ in sys.stdin:
        print(loop.bytes / loop.seconds(), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
