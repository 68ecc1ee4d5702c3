"""Nodes that differ, on ground that can change under them.

with Lab.open(read_spec(path), model_path) as lab:
    cluster = survey_cluster(model, lab.addresses, insecure=True)
    lab.node(2).slow(2.5)        # gets hot: each step takes 2.5 times as long as the spec says
    lab.node(0).kill()
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from shoal import planner
from shoal.engine.errors import ShoalError
from shoal.engine.model_directory import Model
from shoal.engine.stage import StageOptions
from shoal.net.slow import set_factor, turn
from shoal.planner.cost import unit_held_bytes
from shoal.planning import MB, planner_model
from shoal.processes import NodeSpec, RunningNode, bare_node_bytes, end, start

from . import ground
from .air import COUNT, Air, Place, change
from .others import Others
from .pace import awake, followed
from .spec import DeviceSpec, LabSpec, LinkSpec

CONTEXT = 512
"""Positions of state that a cap in layers has room for, by default."""


@dataclass(slots=True)
class LabNode:
    """One device of an open lab."""

    number: int
    spec: DeviceSpec
    cap_mb: int | None
    running: RunningNode
    cgroup: str
    _lab: Lab
    _link: LinkSpec = field(init=False)

    def __post_init__(self) -> None:
        self._link = self.spec.link

    @property
    def process(self) -> subprocess.Popen[bytes]:
        return self.running.process

    def slow(self, times: float) -> None:
        """From the next step on each takes `times` as long as by the spec; 1: as by the spec. ValueError: too
        fast for this machine."""
        self._lab.slow(self.spec, times)

    def link(self, link: LinkSpec) -> None:
        """Another link from now on. The rate needs network namespaces."""
        self._link = link
        self._lab.command(change(self.spec.name, link.delay_s, link.jitter_s))
        if self._lab.ground.namespaces:
            ground.set_rate(self.number, link.bytes_per_s)

    def cap(self, mb: int) -> None:
        """Another memory cap. ShoalError: no cgroups here, or the node holds more."""
        self._needs_cgroup()
        ground.set_cap(self.cgroup, mb * MB)

    def kill(self) -> None:
        """Ends it at once, as a battery that is empty; returns when it is gone."""
        self.process.kill()
        self.process.wait()

    def freeze(self) -> None:
        """It stops in the middle of whatever it does, and keeps its connections. ValueError: where devices
        take turns, nobody else would ever have one."""
        if self._lab.spec.turns:
            raise ValueError("where devices take turns none can be frozen: it might have its own")
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """It goes on."""
        self.process.send_signal(signal.SIGCONT)

    def cut(self) -> None:
        """Its link carries nothing any more, and nobody is told. ShoalError: no network namespaces here."""
        self._carrier(up=False)

    def mend(self) -> None:
        """Its link is back."""
        self._carrier(up=True)

    def peak_bytes(self) -> int:
        """The most RAM that its cgroup ever held: anonymous memory, and pages of files that it read first."""
        self._needs_cgroup()
        return ground.count_of(self.cgroup, "max_usage_in_bytes")

    def failcnt(self) -> int:
        """How often it ran against its cap."""
        self._needs_cgroup()
        return ground.count_of(self.cgroup, "failcnt")

    def forget_peaks(self) -> None:
        """Peaks and the number of times at the cap count from now on."""
        self._needs_cgroup()
        ground.forget_peaks(self.cgroup)
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5", encoding="ascii")

    def status(self, name: str) -> int:
        """A number of /proc/PID/status in bytes, such as VmHWM: the most it held, pages of files included."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text(encoding="ascii").splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
        raise KeyError(name)

    def major_faults(self) -> int:
        """Pages that it had to read from a disk so far."""
        stat = Path(f"/proc/{self.process.pid}/stat").read_text("ascii", "replace")
        return int(stat.rpartition(")")[2].split()[9])

    def _carrier(self, *, up: bool) -> None:
        if not self._lab.ground.namespaces:
            raise ShoalError("a link can be cut only where the lab has network namespaces")
        ground.set_carrier(self.number, up)
        if up and self._link.bytes_per_s is not None:
            ground.set_rate(self.number, self._link.bytes_per_s)

    def _needs_cgroup(self) -> None:
        if not self.cgroup:
            raise ShoalError("memory is counted and capped only where the lab has memory cgroups")


@dataclass(slots=True)
class Lab:
    """An open lab. `addresses`: where a coordinator reaches the nodes, in the order of the spec."""

    spec: LabSpec
    ground: ground.Ground
    directory: Path
    lacks: tuple[str, ...]
    """What this machine does not let the lab do, one sentence each."""
    addresses: list[tuple[str, int]]
    nodes: list[LabNode] = field(default_factory=list)
    second: tuple[str, int] | None = None
    """Where a coordinator reaches the second range of its own device."""
    _air: subprocess.Popen[bytes] | None = None
    _awake: list[int] = field(default_factory=list)
    _others: Others | None = None
    _times: dict[str, float] = field(default_factory=dict)
    _pace: float = 1.0
    _telling: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    @contextmanager
    def open(
        cls,
        spec: LabSpec,
        model: Path,
        *,
        context: int = CONTEXT,
        sequences: int = 1,
        options: Sequence[str] = (),
        strict: bool = True,
        both_ends: bool = False,
    ) -> Iterator[Lab]:
        """Nodes of a model that listen, `options` on the command line of each. Caps in layers hold their
        state for so many sequences of `context` positions. `both_ends`: the coordinator's device has a second
        range, whose address is the last one; it needs network namespaces.

        ShoalError: another lab is open; a node ends at once; or, if `strict`, this machine lacks something
        that the spec asks for (else the lab goes on without it, and `lacks` says so)."""
        no_net, no_caps = ground.lacks_namespaces(), ground.lacks_cgroups()
        lacks = tuple(reason for reason in (no_net, no_caps) if reason is not None)
        if strict and lacks:
            raise ShoalError(f"a lab runs as root on Linux, and this machine lacks {'; '.join(lacks)}")
        caps = caps_mb(spec, model, context, sequences)
        with ExitStack() as stack:
            lock = ground.locked()
            stack.callback(os.close, lock)
            directory = Path(tempfile.mkdtemp(prefix="shoal-lab-"))
            count = len(spec.devices)
            try:
                laid = ground.lay_out(count, directory, namespaces=no_net is None, cgroups=no_caps is None)
                lab = cls(spec, laid, directory, lacks, _listeners(laid, count))
                lab.second = (ground.HOST, ground.NODE_PORT + 1 + count) if both_ends else None
                lab._air = _start_air(lab, lock)
            except BaseException:
                ground.remove_leftovers()
                raise
            stack.callback(lab._close)
            lab._awake = stack.enter_context(awake())
            lab._others = Others(lab)
            lab._tell(1.0)
            crowded = threading.Event()
            crowded.set()
            if spec.turns:
                stack.enter_context(followed(partial(turn, directory / "turns"), lab._tell, crowded))
            for i, device in enumerate(spec.devices):
                lab.nodes.append(_start_node(lab, i, device, model, caps[i], options))
            crowded.clear()
            if lab.second is not None:
                lab.addresses.append(lab.second)
            yield lab

    def node(self, which: int | str) -> LabNode:
        """A device by its number or name."""
        if isinstance(which, int):
            return self.nodes[which]
        return next(node for node in self.nodes if node.spec.name == which)

    def others(self) -> float:
        """Cores that other programs took since the lab was opened."""
        assert self._others is not None
        return self._others.cores()

    def processes(self) -> list[int]:
        """The ids of the nodes that run, of the air, and of what keeps the cores awake."""
        assert self._air is not None
        running = [node.process for node in self.nodes if node.process.poll() is None]
        return [*(process.pid for process in (*running, self._air)), *self._awake]

    def slow(self, device: DeviceSpec, times: float) -> None:
        """See LabNode.slow."""
        others = [
            other.speed / self._times.get(other.name, 1.0) for other in self.spec.devices if other != device
        ]
        self.spec.check_speeds([*others, device.speed / times])
        self._times[device.name] = times
        self._tell()

    def _tell(self, pace: float | None = None) -> None:
        """Tells each device how slow it is, on a machine of this pace; called by two threads."""
        with self._telling:
            self._pace = self._pace if pace is None else pace
            for device in self.spec.devices:
                factor = device.slow * self._times.get(device.name, 1.0) * self._pace
                set_factor(self.directory / f"{device.name}.slow", max(1.0, factor))

    def command(self, line: bytes) -> None:
        """To the air."""
        assert self._air is not None and self._air.stdin is not None
        self._air.stdin.write(line)
        self._air.stdin.flush()

    def sent(self) -> Counter[str]:
        """The bytes that those who connected to a node have sent so far, by the purpose of the connection."""
        self.command(COUNT)
        assert self._air is not None and self._air.stdout is not None
        return Counter(json.loads(self._air.stdout.readline()))

    def log(self, which: int | str) -> str:
        """What a node has printed."""
        name = self.node(which).spec.name
        return (self.directory / f"{name}.log").read_text(encoding="utf-8", errors="replace")

    def _close(self) -> None:
        for node in self.nodes:
            node.thaw()
        end([node.process for node in self.nodes])
        assert self._air is not None and self._air.stdin is not None
        self._air.stdin.close()  # it removes everything, and ends
        assert self._air.stdout is not None
        self._air.stdout.close()
        if self._air.wait(30) != 0:
            raise ShoalError(
                "the lab was not cleaned up: `python -m bench.lab clean` does it, and says why not"
            )


def caps_mb(spec: LabSpec, path: Path, context: int, sequences: int = 1) -> list[int | None]:
    """Each device's cap in MB: as given, or for so many layers with their state beside a bare node and the
    model's largest table, so that any of them can be at either end."""
    model = Model.open(path)
    rows = planner_model(model, StageOptions())
    held = unit_held_bytes(rows, rows.units[1], planner.Workload(context, sequences=sequences))
    workspace = max(unit.workspace_bytes for unit in rows.units)
    bare = bare_node_bytes(path) + workspace + max(rows.units[0].bytes, rows.units[-1].bytes)
    return [
        d.cap_mb if d.cap_layers is None else -(-(bare + d.cap_layers * held) // MB) for d in spec.devices
    ]


def _listeners(laid: ground.Ground, count: int) -> list[tuple[str, int]]:
    host = ground.HOST if laid.namespaces else "127.0.0.1"
    return [(host, ground.NODE_PORT + 1 + i) for i in range(count)]


def _node_address(laid: ground.Ground, i: int) -> tuple[str, int]:
    return (
        (ground.address(i), ground.NODE_PORT)
        if laid.namespaces
        else ("127.0.0.1", ground.NODE_PORT + 101 + i)
    )


def _start_air(lab: Lab, lock: int) -> subprocess.Popen[bytes]:
    """The process that delays, and cleans up; it holds the lock as well."""
    places = []
    for i, device in enumerate(lab.spec.devices):
        sources = [ground.address(i)] if lab.ground.namespaces else []
        if device.name == lab.spec.coordinator:
            sources.append(lab.addresses[i][0])
        target = _node_address(lab.ground, i)
        link = device.link
        places.append(Place(device.name, lab.addresses[i], target, sources, link.delay_s, link.jitter_s))
        if lab.second is not None and device.name == lab.spec.coordinator:
            beside = target[0], target[1] + 1
            places.append(Place(device.name, lab.second, beside, [], link.delay_s, link.jitter_s))
        if lab.ground.namespaces:
            ground.set_rate(i, link.bytes_per_s)
    free = [ground.HOST] if lab.spec.coordinator is None else []
    process = subprocess.Popen(
        [sys.executable, "-m", f"{__package__}.air", Air(places, free, lab.ground).to_json()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        pass_fds=[lock],
        start_new_session=True,
    )
    assert process.stdout is not None
    if process.stdout.readline() != b"ready\n":
        raise ShoalError(f"the lab's air ended with exit code {process.wait()}; its words stand above")
    return process


def _start_node(
    lab: Lab, i: int, device: DeviceSpec, model: Path, cap_mb: int | None, options: Sequence[str]
) -> LabNode:
    """One node, measured while the others are idle."""
    cgroup = ground.make_cgroup(lab.ground, device.name, None if cap_mb is None else cap_mb * MB)
    factor = ["--slow-file", str(lab.directory / f"{device.name}.slow")]
    if lab.spec.turns:
        factor += ["--slow-turns", str(lab.directory / "turns")]
    resident = ("--resident",) if cap_mb is not None else ()
    if lab.second is not None and device.name == lab.spec.coordinator:
        options = (*options, "--both-ends", "always")
    host, port = _node_address(lab.ground, i)
    size = sum(entry.size for entry in Model.open(model).index.files.values())
    spec = NodeSpec(
        device.name,
        cap_mb or (2 * size) // MB + 1000,
        options=(*factor, *resident, "--insecure", *options),
        listen=f"{host}:{port}",
        enter=ground.enter(i, lab.ground, cgroup),
    )
    running = start(model, spec, lab.directory, seconds=120)
    return LabNode(i, device, cap_mb, replace(running, address=lab.addresses[i]), cgroup, lab)
