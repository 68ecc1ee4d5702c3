"""Network namespaces on a bridge, link rates, and memory cgroups: laid out for a lab, changed, and removed.

One lab at a time: a lock file is held by the lab and by its `air` process until everything is removed, and
remembers what there is to remove when both are killed; the next lab then begins with that.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from shoal.engine.errors import ShoalError
from shoal.engine.host import control_groups

_RUN = Path("/run")
LOCK = (_RUN if os.access(_RUN, os.W_OK) else Path(tempfile.gettempdir())) / "shoal-lab.lock"
BRIDGE = "shoal-lab"
HOST = "10.197.77.1"
"""The address of the bridge: the coordinator connects from it, and the air listens on it for all devices."""
NODE_PORT = 7000
_CLONE_NEWNET = 0x40000000
_PR_SET_PDEATHSIG = 1
_QUEUE = "1mb"


@dataclass(slots=True)
class Ground:
    """What was laid out: namespaces or not, the cgroup above the nodes' own (""; none), a directory."""

    namespaces: int
    cgroup: str
    directory: str

    def remove(self) -> None:
        """Ends what runs in the cgroups, and removes all of it; harmless when some is gone already."""
        if self.cgroup:
            _remove_cgroups(Path(self.cgroup))
        for i in range(self.namespaces):
            _try("ip", "link", "del", _outside(i))  # a namespace takes its own end along, but later
            _try("ip", "netns", "del", namespace(i))
        if self.namespaces:
            _try("ip", "link", "del", BRIDGE)
        shutil.rmtree(self.directory, ignore_errors=True)
        LOCK.write_text("", encoding="ascii")


def namespace(i: int) -> str:
    """The network namespace of device i."""
    return f"{BRIDGE}-{i}"


def address(i: int) -> str:
    """The address of device i on the bridge."""
    return f"10.197.77.{10 + i}"


def lacks_namespaces() -> str | None:
    """None when network namespaces can be made here, else the reason why not."""
    if shutil.which("ip") is None or shutil.which("tc") is None:
        return "ip and tc are not installed (Debian: iproute2)"
    name = f"{BRIDGE}-try"
    _try("ip", "netns", "del", name)
    made = _try("ip", "netns", "add", name)
    _try("ip", "netns", "del", name)
    return made and f"network namespaces: {made}"


def lacks_cgroups(controller: str = "memory") -> str | None:
    """None when a resource (default: memory) can be capped here, else the reason why not."""
    above = own_cgroup(controller)
    if above is None:
        return f"{controller} caps: no {controller} controller of cgroup v1 is mounted"
    probe = above / f"{BRIDGE}-try"
    try:
        probe.mkdir(exist_ok=True)
        probe.rmdir()
    except OSError as error:
        return f"{controller} caps: {probe}: {error.strerror}"
    return None


def locked() -> int:
    """The lock, as a descriptor that children inherit; what a killed lab left behind is removed. ShoalError:
    another lab is there."""
    descriptor = os.open(LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ShoalError("another lab is open on this machine, where one has room: wait for it") from None
    remove_leftovers()
    return descriptor


def remove_leftovers() -> None:
    """What a lab laid out and did not remove. Call with the lock held."""
    left = LOCK.read_text(encoding="ascii")
    if left:
        Ground(**json.loads(left)).remove()


def lay_out(count: int, directory: Path, *, namespaces: bool, cgroups: bool) -> Ground:
    """The ground of so many devices. Call with the lock held. ShoalError: the system refuses."""
    above = own_cgroup() if cgroups else None
    ground = Ground(count if namespaces else 0, "" if above is None else str(above / BRIDGE), str(directory))
    LOCK.write_text(json.dumps(asdict(ground)), encoding="ascii")
    if ground.cgroup:
        Path(ground.cgroup).mkdir()
    if namespaces:
        _bridge(count)
    return ground


def _bridge(count: int) -> None:
    _run("ip", "link", "add", BRIDGE, "type", "bridge")
    _run("ip", "addr", "add", f"{HOST}/24", "dev", BRIDGE)
    _run("ip", "link", "set", BRIDGE, "up")
    for i in range(count):
        inside, outside = ("ip", "-n", namespace(i)), _outside(i)
        _run("ip", "netns", "add", namespace(i))
        _run("ip", "link", "add", outside, "type", "veth", "peer", "name", "eth0", "netns", namespace(i))
        _run("ip", "link", "set", outside, "master", BRIDGE, "up")
        _run(*inside, "addr", "add", f"{address(i)}/24", "dev", "eth0")
        _run(*inside, "link", "set", "eth0", "up")
        _run(*inside, "link", "set", "lo", "up")


def set_rate(i: int, bytes_per_s: float | None) -> None:
    """Limits device i's link, each way; None: no limit."""
    for inside in (("tc",), ("tc", "-n", namespace(i))):
        device = _outside(i) if len(inside) == 1 else "eth0"
        if bytes_per_s is None:
            _try(*inside, "qdisc", "del", "dev", device, "root")
            continue
        burst = max(4096, int(bytes_per_s * 0.0002))  # a message of some KB must feel the rate
        limit = ("rate", f"{int(bytes_per_s * 8)}bit", "burst", f"{burst}b", "limit", _QUEUE)
        _run(*inside, "qdisc", "replace", "dev", device, "root", "tbf", *limit)


def set_carrier(i: int, up: bool) -> None:
    """Cuts device i's link, or mends it: what is sent meanwhile is lost, and TCP sends it again."""
    _run("ip", "link", "set", _outside(i), "up" if up else "down")


def enter(i: int, ground: Ground, cgroup: str) -> Callable[[], None]:
    """What a child does before it becomes a node: dies with its parent, and moves to its place."""
    libc = ctypes.CDLL(None, use_errno=True)

    def inside() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if cgroup:
            (Path(cgroup) / "cgroup.procs").write_text("0", encoding="ascii")
        if ground.namespaces:
            net = os.open(f"/run/netns/{namespace(i)}", os.O_RDONLY)
            if libc.setns(net, _CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), "setns")
            os.close(net)

    return inside


def make_cgroup(ground: Ground, name: str, limit: int | None) -> str:
    """A memory cgroup for one node, capped at `limit` bytes; "" without cgroups."""
    if not ground.cgroup:
        return ""
    path = Path(ground.cgroup) / name
    path.mkdir(exist_ok=True)
    set_cap(str(path), limit)
    return str(path)


def set_cap(cgroup: str, limit: int | None) -> None:
    """Changes a cap. ShoalError: the node holds more than that and cannot give it back."""
    try:
        (Path(cgroup) / "memory.limit_in_bytes").write_text(str(-1 if limit is None else limit), "ascii")
    except OSError as error:
        raise ShoalError(f"{cgroup}: a cap of {limit} bytes is refused: {error.strerror}") from error


def count_of(cgroup: str, name: str) -> int:
    """A number that the memory controller keeps, such as failcnt or max_usage_in_bytes."""
    return int((Path(cgroup) / f"memory.{name}").read_text(encoding="ascii"))


def forget_peaks(cgroup: str) -> None:
    """The controller's peak and failcnt begin again."""
    for name in ("max_usage_in_bytes", "failcnt"):
        (Path(cgroup) / f"memory.{name}").write_text("0", encoding="ascii")


def own_cgroup(controller: str = "memory") -> Path | None:
    """This process's own cgroup (v1) of a controller: what is made below it stays within whatever limits this
    process was put under. None: no such controller is mounted."""
    return next((group for group in control_groups(controller) if (group / "tasks").exists()), None)


def _remove_cgroups(above: Path) -> None:
    """Kills what runs in them and removes them; a process needs a moment to end."""
    until = time.monotonic() + 10
    for path in [*above.glob("*/"), above]:
        while path.exists():
            for number in _members(path):
                try:
                    os.kill(number, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            try:
                path.rmdir()
            except OSError as error:
                if time.monotonic() > until:
                    raise ShoalError(f"{path} cannot be removed: {error.strerror}") from error
                time.sleep(0.02)


def _members(cgroup: Path) -> list[int]:
    try:
        return [int(line) for line in (cgroup / "cgroup.procs").read_text(encoding="ascii").split()]
    except OSError:
        return []


def _outside(i: int) -> str:
    """The bridge's end of device i's cable."""
    return f"{BRIDGE}{i}"


def _run(*command: str) -> None:
    problem = _try(*command)
    if problem is not None:
        raise ShoalError(f"`{' '.join(command)}` failed: {problem}")


def _try(*command: str) -> str | None:
    """What a command complained of; None when it did what it should."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        return f"{command[0]}: {error.strerror}"
    return None if done.returncode == 0 else (done.stderr.strip() or f"exit code {done.returncode}")
