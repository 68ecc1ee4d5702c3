"""Weights that travel over a slow link to a device that has none, and the answers that pass it meanwhile:

    python -m bench.travel [MODEL] [--mbit 100 20] [--tokens 200] [--scenes alone,laptop,chain,killed,flipped]
    python -m bench.travel llama-1.1b-random/int8 --mbit 100

Nodes with the model, and one in a network namespace whose link has a rate (tc), so root is needed. All speak
TLS. Scenes:

alone    the new node gets all units while nothing else happens: the rate of its files, of what the link has
laptop   it gets them while the laptop computes an answer: the pauses between tokens, beside those before and
         after it, and those beside a plain TCP stream at the link's rate, which needs next to no computing
chain    the same where the new node holds the second half of the layers, so that every token passes the link
killed   the new node is killed in the middle: the bytes that it gets again when it is back
flipped  one of two sources sends a wrong byte: who is named, and whether the files are right
"""

from __future__ import annotations

import argparse
import base64
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import trio
from bench.lab import ground
from bench.models import model_path

from shoal import __version__, house
from shoal.engine.batch import Sampling
from shoal.engine.costs import unit_cost
from shoal.engine.errors import NoPlanError
from shoal.engine.files import cache_directory
from shoal.engine.hash_cache import file_sha256
from shoal.engine.model_directory import Model
from shoal.net.coordinator import Coordinator, CoordinatorOptions
from shoal.net.holding import FetchReport
from shoal.net.identity import identity_of, shape_of
from shoal.net.messages import PairedDevice
from shoal.net.placement import Links, NodeInfo, Placement
from shoal.planner import Assignment
from shoal.processes import end

PROMPT, WARM = 32, 8
MB = 1e6
_DEVICES = ("bench", "laptop", "liar", "phone")
_START_SECONDS = 120.0
Address = tuple[str, int]
Running = tuple[Address, subprocess.Popen[bytes]]

# A stream of zeros at most at a rate, without a queue of its own on the link.
_SEND = """
import socket, sys
host, port, rate = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
out = socket.create_connection((host, port))
out.setsockopt(socket.SOL_SOCKET, 47, rate)  # SO_MAX_PACING_RATE
data = bytes(65536)
while True:
    out.sendall(data)
"""
_SINK = """
import socket
server = socket.create_server(("", 0))
print(server.getsockname()[1], flush=True)
taken, _ = server.accept()
taken.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 65536)
into = bytearray(1 << 20)
while taken.recv_into(into):
    pass
"""
# `shoal node`, of which every answer about one file has a wrong byte.
_LIAR = """
import sys
from shoal.held_files import HeldFiles
name, read = sys.argv.pop(1), HeldFiles.read
def flipped(self, file, *where):
    data = read(self, file, *where)
    return bytes([data[0] ^ 1]) + data[1:] if file == name else data
HeldFiles.read = flipped
from shoal.cli import main
sys.exit(main())
"""


@dataclass(frozen=True, slots=True)
class Pauses:
    """Seconds between tokens, and the bytes/s of files that arrived meanwhile."""

    seconds: tuple[float, ...]
    bytes_per_s: float = 0.0

    @property
    def mean(self) -> float:
        """The mean pause."""
        return sum(self.seconds) / len(self.seconds)

    def at(self, share: float) -> float:
        """The pause above which are that share of them."""
        ordered = sorted(self.seconds)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    def __str__(self) -> str:
        parts = (f"{self.mean * 1e3:.1f} ms in the mean", f"p50 {self.at(0.5) * 1e3:.1f}")
        return ", ".join((*parts, f"p95 {self.at(0.95) * 1e3:.1f}"))


@dataclass(frozen=True, slots=True)
class Road:
    """A laptop and a phone with a link of `mbit` Mbit/s between them, and a model."""

    model: Model
    mbit: float
    tokens: int
    laid: ground.Ground
    place: Path

    @property
    def bytes_per_s(self) -> float:
        """What the link has."""
        return self.mbit * 1e6 / 8

    def share(self, bytes_per_s: float) -> str:
        """A rate, as part of that of the link."""
        return f"{bytes_per_s / self.bytes_per_s:.0%} of the link's rate"

    def inside(self) -> Callable[[], None]:
        """What a process on the phone does first."""
        return ground.enter(0, self.laid, "")

    @contextmanager
    def laptop(self, name: str = "laptop", lies_about: str = "") -> Iterator[Running]:
        """A node with the whole model."""
        cache = cache_directory().parent
        with self._node(self.model.path, name, ground.HOST, cache, None, lies_about) as running:
            yield running

    @contextmanager
    def phone(self, units: Sequence[int] = (), *, again: bool = False) -> Iterator[Running]:
        """A node that has the files of these units; `again`: what is left there."""
        path = self.fetched if again else skeleton(self.model, self.fetched, units)
        with self._node(path, "phone", ground.address(0), self.place, self.inside()) as running:
            yield running

    @property
    def fetched(self) -> Path:
        """The directory of the phone's files."""
        return self.place / "shoal" / "fetched" / self.model.hash

    def log(self, name: str) -> str:
        """What a node has printed."""
        return (self.place / f"{name}.log").read_text(encoding="utf-8", errors="replace")

    @contextmanager
    def _node(
        self,
        path: Path,
        name: str,
        host: str,
        cache: Path,
        inside: Callable[[], None] | None,
        lies_about: str = "",
    ) -> Iterator[Running]:
        """A node process, until the block ends, and its address."""
        port = self.place / f"{name}.port"
        port.unlink(missing_ok=True)
        command = [sys.executable, *(("-c", _LIAR, lies_about) if lies_about else ("-m", "shoal"))]
        command += ["node", str(path), "--name", name, "--listen", f"{host}:0"]
        command += ["--threads", "1", "--policy", "none", "--port-file", str(port)]
        environment = {
            **os.environ,
            "XDG_CACHE_HOME": str(cache),
            "XDG_CONFIG_HOME": str(self.place / f"{name}.config"),
        }
        with (self.place / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                command, env=environment, preexec_fn=inside, stdout=log, stderr=subprocess.STDOUT
            )
        try:
            until = time.monotonic() + _START_SECONDS
            while not port.exists():
                if process.poll() is not None or time.monotonic() > until:
                    raise RuntimeError(f"the node {name} has not started: {self.log(name)[-2000:]}")
                time.sleep(0.05)
            yield (host, int(port.read_text().rpartition(":")[2])), process
        finally:
            end([process])

    @contextmanager
    def stream(self) -> Iterator[None]:
        """A plain TCP stream to the phone that fills nine tenths of the link."""
        with ExitStack() as stack:
            sink = subprocess.Popen(
                [sys.executable, "-c", _SINK], stdout=subprocess.PIPE, preexec_fn=self.inside()
            )
            stack.callback(end, [sink])
            assert sink.stdout is not None
            port = sink.stdout.readline().decode().strip()
            to = ground.address(0), port, str(int(0.9 * self.bytes_per_s))
            stack.callback(end, [subprocess.Popen([sys.executable, "-c", _SEND, *to])])
            yield

    @asynccontextmanager
    async def coordinator(
        self, addresses: Sequence[Address], cut: int, target: Mapping[str, tuple[int, ...]]
    ) -> AsyncIterator[Coordinator]:
        """A coordinator with units [0, cut) on the laptop, and the others on the phone."""
        me = identity_of(self.model, "bench", __version__, house.trust())
        plan = planner(self.model, cut, target)
        async with Coordinator.open(addresses, me, shape_of(self.model), plan, _OPTIONS) as coordinator:
            yield coordinator


_OPTIONS = CoordinatorOptions(log=lambda line: print(f"    {line}", file=sys.stderr), moves="reload")


def skeleton(model: Model, path: Path, units: Sequence[int]) -> Path:
    """A fetched model that has the files of these units only."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    own = {name for u in units for name in model.index.units[u].files}
    for name in {"index.json", "config.json", *model.index.common} | own:
        shutil.copy2(model.path / name, path / name)
    return path


def make_house(place: Path) -> None:
    """Makes a house of this process, its head, and the devices, each with a configuration of its own."""
    devices = list[PairedDevice]()
    for name in _DEVICES:
        os.environ["XDG_CONFIG_HOME"] = str(place / f"{name}.config")
        certificate = base64.b64encode(house.own_certificate()).decode()
        devices.append(PairedDevice(name, "device" if devices else "head", certificate))
    for name in reversed(_DEVICES):  # the last one is that of this process
        os.environ["XDG_CONFIG_HOME"] = str(place / f"{name}.config")
        house.save_joined(devices)


def planner(model: Model, cut: int, target: Mapping[str, tuple[int, ...]]) -> Callable[..., Placement]:
    """A plan of units [0, cut) on the laptop, and the others on the phone, if there are any."""

    def plan(nodes: Sequence[NodeInfo], links: Links) -> Placement:
        ranges = [("laptop", 0, cut), ("phone", cut, model.n_units)]
        stages = tuple(Assignment(label, a, b) for label, a, b in ranges if a < b)
        lost = {stage.device for stage in stages} - {info.label for info in nodes}
        if lost:
            raise NoPlanError(f"{', '.join(lost)} is not there")
        return Placement(stages, target=target)

    return plan


def everything(model: Model) -> dict[str, tuple[int, ...]]:
    """The target that has the phone fetch all units."""
    return {"phone": tuple(range(model.n_units))}


def report(coordinator: Coordinator) -> FetchReport | None:
    """How far the phone is with its files."""
    return next((one for one in coordinator.fetches if one.label == "phone"), None)


async def fetched(road: Road, addresses: Sequence[Address], share: float = 1.0) -> tuple[int, float]:
    """Has the phone fetch all units until that share of them is there: the bytes that came, and the seconds
    from the first of them to the last."""
    async with road.coordinator(addresses, road.model.n_units, everything(road.model)) as coordinator:
        began: tuple[float, int] | None = None
        while True:
            one = report(coordinator)
            if one is not None and one.wanted > 0:
                if began is None and one.got > 0:
                    began = trio.current_time(), one.got
                if began is not None and one.got >= share * one.wanted:
                    return one.got - began[1], trio.current_time() - began[0]
            await trio.sleep(0.01)


async def answered(road: Road, addresses: Sequence[Address], cut: int, moving: bool) -> Pauses:
    """The pauses of an answer; with `moving`, while the phone fetches all units."""
    prompt = list(range(5, 5 + PROMPT))
    async with road.coordinator(addresses, cut, everything(road.model) if moving else {}) as coordinator:
        arrivals = list[float]()
        got: list[tuple[float, int]] = []
        while moving and ((one := report(coordinator)) is None or one.bytes_per_s <= 0):  # noqa: ASYNC110
            await trio.sleep(0.1)  # a node that comes with files is not told to fetch at once
        async with coordinator.generate(prompt, Sampling(), max_tokens=road.tokens + WARM) as answer:
            async for _ in answer:
                arrivals.append(trio.current_time())
                one = report(coordinator)
                if one is not None and len(arrivals) >= WARM and (not got or one.got > got[-1][1]):
                    got.append((arrivals[-1], one.got))
                    if one.got >= one.wanted:
                        break
        pauses = [b - a for a, b in zip(arrivals[WARM - 1 : -1], arrivals[WARM:], strict=True)]
        rate = (got[-1][1] - got[0][1]) / (got[-1][0] - got[0][0]) if len(got) > 1 else 0.0
        return Pauses(tuple(pauses), rate)


# --- scenes


def alone(road: Road) -> None:
    """All units while nothing else happens."""
    with road.laptop() as (laptop, giver), road.phone() as (phone, taker):
        before = [cpu_seconds(process) for process in (giver, taker)]
        size, seconds = trio.run(fetched, road, (laptop, phone))
        used = [cpu_seconds(p) - b for p, b in zip((giver, taker), before, strict=True)]
    print(f"  {size / MB:.0f} MB in {seconds:.1f} s: {road.share(size / seconds)}")
    each = [f"{1e3 * one / (size / MB):.1f} ms" for one in used]
    print(f"  computing for a MB: {each[0]} on the giver, {each[1]} on the taker", flush=True)


def laptop(road: Road) -> None:
    """A new node gets all units while the laptop answers."""
    _answers(road, road.model.n_units, ())


def chain(road: Road) -> None:
    """A node that has half of the units, and computes with them, gets the others."""
    model, n = road.model, road.model.n_units
    half = _bytes(model) / 2
    cut = next(u for u in range(n) if sum(unit_cost(model, v).bytes for v in range(u)) > half)
    _answers(road, cut, range(cut, n))


def _answers(road: Road, cut: int, own: Sequence[int]) -> None:
    with road.laptop() as (laptop, _), road.phone(own) as (phone, _):
        found = dict[str, list[Pauses]]()
        for how in ("alone", "beside a plain stream", "while files travel", "alone"):
            with ExitStack() as stack:
                if "stream" in how:
                    stack.enter_context(road.stream())
                pauses = trio.run(answered, road, (laptop, phone), cut, "files" in how)
            found.setdefault(how, []).append(pauses)
            rate = f"; {road.share(pauses.bytes_per_s)}" if "files" in how else ""
            print(f"  tokens {how}: {pauses}{rate}", flush=True)
    quiet = [pause for pauses in found["alone"] for pause in pauses.seconds]
    for how in ("beside a plain stream", "while files travel"):
        factor = found[how][0].mean / (sum(quiet) / len(quiet))
        middle = found[how][0].at(0.5) / Pauses(tuple(quiet)).at(0.5)
        print(f"  pauses {how}: {factor:.2f} times as long in the mean, {middle:.2f} in the middle")


def killed(road: Road) -> None:
    """A node that is killed in the middle goes on where it was."""
    sent = Path(f"/sys/class/net/{ground.BRIDGE}0/statistics/tx_bytes")
    with road.laptop() as (laptop, _):
        with road.phone() as (phone, process):
            trio.run(fetched, road, (laptop, phone), 0.5)
            process.send_signal(signal.SIGKILL)
            process.wait()
        kept = _kept(road.fetched)
        before = int(sent.read_text())
        with road.phone(again=True) as (phone, _):
            size, _ = trio.run(fetched, road, (laptop, phone))
        passed, missing = int(sent.read_text()) - before, _bytes_of_files(road.model) - kept
    right = _all_right(road)
    print(
        f"  killed with {kept / MB:.1f} MB of whole pieces, of {(kept + missing) / MB:.1f} MB; "
        f"{size / MB:.1f} MB were fetched then, {passed / MB:.1f} MB in packets; all files right: {right}",
        flush=True,
    )


def flipped(road: Road) -> None:
    """One of two sources sends wrong bytes of a file."""
    model = road.model
    name = model.index.units[model.n_units // 2].files[0]
    with ExitStack() as stack:
        running = (road.laptop(), road.laptop("liar", name), road.phone())
        trio.run(fetched, road, [stack.enter_context(one)[0] for one in running])
    said = re.findall(r"fetching: .*wrong.*", road.log("phone"))
    print("  " + "\n  ".join(said))
    print(f"  all files right: {_all_right(road)}", flush=True)


def _kept(path: Path) -> int:
    """The bytes of files and pieces that are whole, as a new process will find them."""
    from shoal.net.files import PIECE
    from shoal.part_file import HAVE, PART, read_record

    whole = sum(file.stat().st_size for file in path.glob("unit-*.safetensors"))
    for record in path.glob(f"*{HAVE}"):
        size = record.with_name(record.name.removesuffix(HAVE) + PART).stat().st_size
        pieces = read_record(record.read_text(), size)
        whole += sum(min(PIECE, size - piece * PIECE) for piece in pieces)
    return whole


def _all_right(road: Road) -> bool:
    """Whether the phone has all files, with the right bytes."""
    names = {name for unit in road.model.index.units for name in unit.files}
    entries = road.model.index.files
    return all(file_sha256(road.fetched / name) == entries[name].sha256 for name in names)


def cpu_seconds(process: subprocess.Popen[bytes]) -> float:
    """The time that the threads of a process have computed."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _bytes(model: Model) -> int:
    return sum(unit_cost(model, u).bytes for u in range(model.n_units))


def _bytes_of_files(model: Model) -> int:
    return sum(model.index.files[name].size for name in {n for unit in model.index.units for n in unit.files})


SCENES = {scene.__name__: scene for scene in (alone, laptop, chain, killed, flipped)}


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench.travel", description=__doc__)
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--mbit", type=float, nargs="+", default=[100, 20])
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--scenes", default=",".join(SCENES))
    parser.add_argument("--first", action="store_true", help="go before all other programs (SCHED_RR)")
    args = parser.parse_args()
    if args.first:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    model = Model.open(model_path(args.model))
    with ExitStack() as stack:
        stack.callback(os.close, ground.locked())
        place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        make_house(place)
        laid = ground.lay_out(1, place / "lab", namespaces=True, cgroups=False)
        stack.callback(laid.remove)
        for mbit in args.mbit:
            print(f"{mbit:g} Mbit/s, {model.path.name}, {_bytes_of_files(model) / MB:.0f} MB")
            ground.set_rate(0, mbit * 1e6 / 8)
            road = Road(model, mbit, args.tokens, laid, place)
            for name in args.scenes.split(","):
                print(f" {name}", flush=True)
                SCENES[name](road)
    return 0


if __name__ == "__main__":
    sys.exit(main())
