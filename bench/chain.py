"""Chains of node processes on this machine, and measurements over them, with the library of this checkout or
of another. bench/lap.py, streams.py, press.py, first.py and opening.py use it.

Every node has one thread and, as far as there are enough, a core of its own. Each measurement is a process:
the coordinator of a chain, or one process that holds all units, on the last core. A measurement fails if
their tokens differ."""

from __future__ import annotations

import argparse
import atexit
import functools
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.chain_worker import CALL
from bench.lab import ground
from bench.models import model_path

from shoal.engine.costs import unit_cost
from shoal.engine.errors import ShoalError
from shoal.engine.model_directory import Model
from shoal.processes import end

_WORKER = Path(__file__).with_name("chain_worker.py")
_HERE = Path(__file__).resolve().parents[1]
_PATIENCE_S, _POLL_S = 60.0, 0.02
_RAM_MB = 1000
_MEASURE_SECONDS = 0.5
"""How long a node measures its device."""
_MOST_SECONDS = 600

Answer = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Checkout:
    """A version of shoal: the name of its columns, and the root of its checkout, whose C library is built.
    `config` is the directory of its configuration, in which there may be a house."""

    name: str
    root: Path
    config: Path = Path("/nonexistent")

    def environ(self) -> dict[str, str]:
        """The environment in which `shoal` is this version."""
        kept = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
        return {**kept, "PYTHONPATH": str(self.root / "src"), "XDG_CONFIG_HOME": str(self.config)}


@dataclass(frozen=True, slots=True)
class ChainNode:
    """A node that runs: its name, address, process, and log of calls."""

    name: str
    address: str
    process: subprocess.Popen[bytes]
    log: Path

    def calls(self) -> list[tuple[float, float, int, int]]:
        """The calls of its stages so far: start, end, rows, first position."""
        return list(CALL.iter_unpack(self.log.read_bytes()))


@dataclass(frozen=True, slots=True)
class Chain:
    """Nodes of one version of shoal."""

    checkout: Checkout
    model: Model
    nodes: Sequence[ChainNode]

    def head(self, count: int, job: str, **more: Any) -> Answer:
        """A job of chain_worker.py over the first `count` nodes, in their order. Their calls are as equally
        long as whole layers allow: those of decoded rows for the job `decode`, those of prompts for
        others."""
        nodes = self.nodes[:count]
        work = {
            "do": job,
            "model": str(self.model.path),
            "nodes": [node.address for node in nodes],
            "names": [node.name for node in nodes],
            "layers": even_layers(self.model, count, head=job == "decode"),
            **more,
        }
        return _worker(self.checkout, "head", work, ())

    def pids(self, count: int) -> list[int]:
        """The process ids of the first `count` nodes."""
        return [node.process.pid for node in self.nodes[:count]]


def alone(checkout: Checkout, model: Model, job: str, *, core: int | None = None, **more: Any) -> Answer:
    """A job of chain_worker.py in one process that holds all units, with one thread, on a core: the last one,
    unless another is given."""
    pinned = cores()[-1:] if core is None else [core]
    return _worker(checkout, "alone", {"do": job, "model": str(model.path), **more}, pinned)


class Expected:
    """The answers of one process to the prompts of the streams, computed once and as far as they are asked
    for."""

    def __init__(self, checkout: Checkout, model: Model, prompt: int) -> None:
        self._checkout, self._model, self._prompt = checkout, model, prompt
        self._known: list[list[int]] = []

    def check(self, found: Sequence[Sequence[int]]) -> None:
        """RuntimeError: a chain answered otherwise than one process."""
        most = max(map(len, found))
        if len(found) > len(self._known) or most > len(self._known[0]):
            room = self._model.config.context - self._prompt
            tokens, streams = min(2 * most, room), max(len(found), len(self._known))
            job = {"prompt": self._prompt, "tokens": tokens, "batches": [streams]}
            self._known = alone(self._checkout, self._model, "decode", **job)["runs"][0]["tokens"]
        same([known[: len(one)] for known, one in zip(self._known, found, strict=False)], found)


def same(expected: Sequence[Sequence[int]], found: Sequence[Sequence[int]]) -> None:
    """RuntimeError: they differ."""
    for stream, (ours, theirs) in enumerate(zip(expected, found, strict=True)):
        if list(ours) != list(theirs):
            at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), len(ours))
            raise RuntimeError(f"stream {stream}: the nodes and one process differ from token {at} on")


def even_layers(model: Model, count: int, *, head: bool) -> list[int]:
    """Layers of each of `count` stages, so that the bytes which a row reads are as even as possible. The last
    stage has the LM head as well, which counts only if rows need it (`head`), as decoded ones do. ValueError:
    there are more stages than layers."""
    reads = [unit_cost(model, u).read_bytes for u in range(model.n_units)]
    if not head:
        reads[-1] = 0
    layers = len(reads) - 2
    if count > layers:
        raise ValueError(f"{model.path.name} has {layers} layers, too few for a chain of {count} nodes")
    best: dict[int, tuple[int, list[int]]] = {0: (0, [])}  # units before a cut: the worst stage, its layers
    for stage in range(count):
        longer: dict[int, tuple[int, list[int]]] = {}
        for done, (worst, cuts) in best.items():
            rest = count - stage - 1
            for upto in range(done + 1, layers - rest + 1) if rest else [layers]:
                size = sum(reads[done + 1 : upto + 1])
                size += (reads[0] if stage == 0 else 0) + (0 if rest else reads[-1])
                value = (max(worst, size), [*cuts, upto - done])
                if upto not in longer or value < longer[upto]:
                    longer[upto] = value
        best = longer
    return best[layers][1]


def over(nodes: int) -> str:
    """The beginning of the names of figures of a chain of `nodes` nodes."""
    return f"over {nodes} node{'s' * (nodes > 1)}"


def streamed(count: int) -> str:
    """The number of streams, in words."""
    return f"{count} stream{'s' * (count > 1)}"


def tokens_per_s(times: Sequence[float]) -> float:
    """The speed of one stream whose tokens came at these times."""
    return (len(times) - 1) / (times[-1] - times[0])


def cores() -> list[int]:
    """The CPUs that this process may use."""
    return sorted(os.sched_getaffinity(0))


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a node runs: its core, the arguments that say where it listens, and what its process does before
    it becomes a node."""

    core: int
    listen: tuple[str, ...] = ("--listen", "127.0.0.1:0")
    enter: Callable[[], None] = lambda: None

    def begin(self) -> None:
        """Moves the process that calls it there."""
        os.sched_setaffinity(0, [self.core])
        self.enter()


@contextmanager
def chains(
    versions: Sequence[Checkout], model: Model, count: int, *, in_lab: bool = False
) -> Iterator[list[Chain]]:
    """`count` nodes of each version, one started after another. Those of one version wait while the others
    are measured. `in_lab`: each node has a network namespace on the bridge of bench/lab. RuntimeError: a node
    ended, or did not listen in time. SystemExit: there can be no namespaces here, or another lab is open."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="shoal-bench-")))
        total = count * len(versions)
        places = iter(stack.enter_context(_lab(total, count)) if in_lab else _loopback(total, count))
        found = []
        for checkout in versions:
            nodes = [
                stack.enter_context(_node(checkout, model, directory, f"{checkout.name}{i}", next(places)))
                for i in range(count)
            ]
            found.append(Chain(checkout, model, nodes))
        yield found


def _loopback(total: int, count: int) -> list[_Place]:
    return [_Place(cores()[i % count % len(cores())]) for i in range(total)]


@contextmanager
def _lab(total: int, count: int) -> Iterator[list[_Place]]:
    """The same places in namespaces of their own, which are removed at the end."""
    reason = ground.lacks_namespaces()
    if reason is not None:
        raise SystemExit(f"--lab runs as root on Linux, and this machine lacks {reason}")
    try:
        lock = ground.locked()
    except ShoalError as error:
        raise SystemExit(f"--lab: {error}") from None
    try:
        laid = ground.lay_out(
            total, Path(tempfile.mkdtemp(prefix="shoal-lab-")), namespaces=True, cgroups=False
        )
        yield [
            _Place(
                place.core,
                ("--listen", f"{ground.address(i)}:{ground.NODE_PORT}", "--insecure"),
                ground.enter(i, laid, ""),
            )
            for i, place in enumerate(_loopback(total, count))
        ]
    finally:
        ground.remove_leftovers()
        os.close(lock)


@contextmanager
def _node(checkout: Checkout, model: Model, directory: Path, name: str, place: _Place) -> Iterator[ChainNode]:
    port, log = directory / f"{name}.port", directory / f"{name}.calls"
    log.touch()
    command = [sys.executable, str(_WORKER), "node", str(log), str(model.path), "--name", name]
    command += [*place.listen, "--port-file", str(port)]
    command += ["--threads", "1", "--backend", "native", "--ram", str(_RAM_MB)]
    command += ["--measure-seconds", str(_MEASURE_SECONDS)]
    with (directory / f"{name}.log").open("wb") as words:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=words, stderr=subprocess.STDOUT,
            env=checkout.environ(), preexec_fn=place.begin,
        )  # fmt: skip
    try:
        until = time.monotonic() + _PATIENCE_S
        while not port.exists():
            if process.poll() is not None or time.monotonic() > until:
                text = (directory / f"{name}.log").read_text("utf-8", "replace")[-1000:]
                raise RuntimeError(f"the node {name} ended, or did not listen in time: {text}")
            time.sleep(_POLL_S)
        yield ChainNode(name, port.read_text("ascii").strip(), process, log)
    finally:
        end([process])


def _worker(checkout: Checkout, role: str, job: Answer, pinned: Sequence[int]) -> Answer:
    command = [sys.executable, str(_WORKER), role, json.dumps(job)]
    found: Answer = json.loads(output_of(command, pinned, checkout.environ()))
    return found


def output_of(
    command: Sequence[str], pinned: Sequence[int] = (), environ: Mapping[str, str] | None = None
) -> str:
    """The output of a process on those cores (none: on all). It shares the session of the nodes, since Linux
    divides the cores by session first. RuntimeError: it failed, with the end of its standard error."""
    pin = functools.partial(os.sched_setaffinity, 0, pinned) if pinned else None
    done = subprocess.run(
        command, capture_output=True, text=True, env=environ, preexec_fn=pin, timeout=_MOST_SECONDS,
        check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)} failed:\n{done.stderr[-3000:]}")
    return done.stdout


# --- what the commands share


def parser(name: str, text: str, rounds: int = 5) -> argparse.ArgumentParser:
    """The options that all of these commands have."""
    made = argparse.ArgumentParser(
        prog=f"python -m bench.{name}", description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("model", nargs="?", default="smollm2-135m", help="(default smollm2-135m)")
    made.add_argument(
        "--against",
        type=Path,
        metavar="DIRECTORY",
        help="measure another checkout as well, in the same rounds; its C library must be built",
    )
    made.add_argument(
        "--tls", action="store_true", help="measure over TLS as well, in the same rounds (not with --lab)"
    )
    made.add_argument("--rounds", type=int, default=rounds, metavar="N", help=f"(default {rounds})")
    made.add_argument("-o", "--output", type=Path, metavar="FILE", help="write every sample there, as JSON")
    return made


def opened(args: argparse.Namespace) -> tuple[Model, list[Checkout]]:
    """The model of the command line, and the versions of shoal. SystemExit: as for `checkouts`."""
    found = checkouts(args.against)
    if args.tls:
        found.append(Checkout("tls", _HERE, _house()))
    return Model.open(model_path(args.model)), found


def _house() -> Path:
    """A directory with a house of one device, until this process ends."""
    place = tempfile.TemporaryDirectory(prefix="shoal-bench-")
    atexit.register(place.cleanup)
    made = "from shoal import house; house.open_or_create('bench')"
    environ = Checkout("tls", _HERE, Path(place.name)).environ()
    subprocess.run([sys.executable, "-c", made], env=environ, check=True)
    return Path(place.name)


def checkouts(against: Path | None) -> list[Checkout]:
    """This version of shoal, and another if there is one. SystemExit: the other one is no checkout."""
    found = [Checkout("this", _HERE)]
    if against is not None:
        if not (against / "src/shoal").is_dir():
            raise SystemExit(f"--against {against}: there is no src/shoal in it")
        found.append(Checkout("other", against.resolve()))
    return found


def in_turns(rounds: int, series: Sequence[Callable[[int], None]]) -> None:
    """Calls each with the number of the round, and begins with another one from round to round."""
    for number in range(rounds):
        for i in range(len(series)):
            series[(number + i) % len(series)](number)
