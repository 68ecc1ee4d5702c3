"""Node processes on this machine: they are started, waited for, and ended whatever happens to their
parent."""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .arguments import address
from .engine.errors import ShoalError
from .engine.host import on_linux

_PR_SET_PDEATHSIG = 1
_PRCTL = ctypes.CDLL(None).prctl if on_linux() else None
_POLL_S, _END_S = 0.02, 5.0


@dataclass(frozen=True, slots=True)
class NodeSpec:
    """A node to start. `slow` is the factor by which it plays a slower device; `enter` runs in the child
    process before it becomes a node."""

    name: str
    ram_mb: int
    slow: float = 1.0
    threads: int = 1
    options: tuple[str, ...] = ()
    listen: str = "127.0.0.1:0"
    enter: Callable[[], None] | None = None


@dataclass(frozen=True, slots=True)
class RunningNode:
    """A started node and the address that it listens on."""

    spec: NodeSpec
    process: subprocess.Popen[bytes]
    address: tuple[str, int]


def bare_node_bytes(model: Path) -> int:
    """RAM of a node's process on this machine without any unit of the model, in bytes."""
    program = "import sys; from shoal.node_process import bare_bytes; print(bare_bytes(sys.argv[1]))"
    command = [sys.executable, "-c", program, str(model)]
    return int(subprocess.run(command, check=True, capture_output=True).stdout)


@contextmanager
def nodes(
    model: Path, specs: Sequence[NodeSpec], directory: Path, seconds: float = 60
) -> Iterator[list[RunningNode]]:
    """Starts one node after another, so that each measures itself undisturbed. Their logs are in `directory`.

    ShoalError: a node ended, or did not listen within `seconds`; the end of its log is quoted.
    """
    started: list[RunningNode] = []
    try:
        for spec in specs:
            started.append(start(model, spec, directory, seconds))  # noqa: PERF401  the last may fail
        yield started
    finally:
        end([node.process for node in started])


def start(model: Path, spec: NodeSpec, directory: Path, seconds: float = 60) -> RunningNode:
    """Starts a node and waits until it listens. Errors as for `nodes`; the process has then ended."""
    process = _spawn(model, spec, directory)
    try:
        return RunningNode(spec, process, _wait(spec, process, directory, seconds))
    except BaseException:
        end([process])
        raise


def _spawn(model: Path, spec: NodeSpec, directory: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "shoal", "node", str(model), "--name", spec.name]
    command += ["--ram", str(spec.ram_mb)]
    command += ["--slow", str(spec.slow), "--threads", str(spec.threads), *spec.options]
    command += ["--listen", spec.listen, "--port-file", str(directory / f"{spec.name}.port")]
    with (directory / f"{spec.name}.log").open("wb") as log:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            preexec_fn=spec.enter or end_with_parent,
        )


def end_with_parent() -> None:
    """Lets the kernel end this child process with its parent, which cannot clean up if it is killed; where
    the kernel can."""
    if _PRCTL is not None:
        _PRCTL(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _wait(
    spec: NodeSpec, process: subprocess.Popen[bytes], directory: Path, seconds: float
) -> tuple[str, int]:
    port_file, until = directory / f"{spec.name}.port", time.monotonic() + seconds
    while not port_file.exists():
        if process.poll() is not None or time.monotonic() > until:
            log = (directory / f"{spec.name}.log").read_text(errors="replace").strip()
            code = process.poll()
            ended = f"did not listen within {seconds:.0f} s" if code is None else f"ended with code {code}"
            raise ShoalError(f"the node {spec.name} {ended}; the end of its log: {log[-500:] or '(empty)'}")
        time.sleep(_POLL_S)
    return address(port_file.read_text(encoding="ascii").strip())


def end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Terminates the processes, and kills those that do not end."""
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(_END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
