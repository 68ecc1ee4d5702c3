"""The RAM and CPUs that this process may use. In a container they are fewer than the machine's, and a process
that exceeds them is killed or throttled.

RAM is bounded by the machine, by every visible control group from the process's own upwards (cgroup v1, v2
or both), and by the limits of the process (`ulimit -v`, `ulimit -d`). CPUs are bounded by the affinity mask
(taskset, cpusets) and by the control groups' quotas. The parameter `root` is the root of the file system, so
that tests can provide the files of other systems."""

from __future__ import annotations

import os
import re
import resource
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from .errors import ShoalError
from .kernel_files import integer, read_fields, read_lines, read_number, read_text

_ROOT = Path("/")
_MB = 1_000_000
_BIG = 0.7
"""Lowest speed of a big core, as a fraction of the fastest core's. Middle cores have 0.75 to 0.9, small ones
0.5 to 0.65."""
_MOST_THREADS = 4
"""Default limit of threads: more of them compete for memory bandwidth, and heat a phone."""
_UNKNOWN = 3
"""If the system does not report the available RAM, 1/_UNKNOWN of the total counts as available."""


@dataclass(frozen=True, slots=True)
class Ram:
    """Bytes of RAM that this process may use. None: the system does not report it."""

    total: int | None
    """The most that the process can ever have."""
    available: int | None
    """Bytes that it can get now without swapping: unused RAM, and file pages that can be dropped."""
    bound: str = "that this machine has"
    """The source of `total`, as words that follow a number of MB."""

    @property
    def estimate(self) -> int | None:
        """`available`, or a third of `total` if that is not reported. None: neither is."""
        if self.available is None and self.total is not None:
            return self.total // _UNKNOWN
        return self.available


def on_linux() -> bool:
    """Whether the kernel is Linux. Android's is, and Python calls that a platform of its own since 3.13."""
    return sys.platform.startswith(("linux", "android"))


def ram(root: Path = _ROOT) -> Ram:
    """The RAM that this process may use: the lowest of all bounds."""
    machine = _machine(root)
    bounds = [machine, *_group_bounds(root), *_process_bounds(root)]
    totals = [(bound.total, bound.bound) for bound in bounds if bound.total is not None]
    if not totals:
        return Ram(None, None)
    total, name = min(totals, key=lambda item: item[0])
    if machine.available is None:  # limits of containers and processes do not count other programs' memory
        return Ram(total, None, name)
    return Ram(total, min(total, *(b.available for b in bounds if b.available is not None)), name)


def check_promise(asked_mb: int, there: Ram) -> None:
    """ShoalError: the RAM that a process is asked to promise is more than it can have."""
    if there.total is not None and asked_mb > -(-there.total // _MB):
        raise ShoalError(
            f"--ram {asked_mb} is more than the {there.total / _MB:.0f} MB {there.bound}, and a node that "
            "uses more is killed while it answers: give a smaller number"
        )


def resident_bytes() -> int:
    """Bytes of RAM that this process uses, or its peak where the system reports only that."""
    sizes = _statm(_ROOT)
    if sizes is not None:
        return sizes[1]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def usable_cpus() -> frozenset[int]:
    """Numbers of the CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def big_cores(usable: Collection[int] | None = None, root: Path = _ROOT) -> frozenset[int]:
    """The big cores among the usable CPUs (default: all that this process may run on): those nearly as fast
    as the fastest. Big cores would wait for small ones at every operation. All usable CPUs, if the system
    does not report speeds."""
    usable = usable_cpus() if usable is None else usable
    for name in ("cpu_capacity", "cpufreq/cpuinfo_max_freq"):
        speeds = {cpu: read_number(root / f"sys/devices/system/cpu/cpu{cpu}" / name) for cpu in usable}
        known = [speed for speed in speeds.values() if speed is not None]
        if len(known) == len(speeds):
            return frozenset(cpu for cpu, speed in speeds.items() if (speed or 0) >= _BIG * max(known))
    return frozenset(usable)


def cpu_quota(root: Path = _ROOT) -> float | None:
    """CPU seconds per second that this process and the other members of its control groups may use; None: no
    quota."""
    shares = []
    for group in control_groups("cpu", root):
        v2 = (read_text(group / "cpu.max") or "").split()  # such as "max 100000" or "150000 100000"
        quota, period = map(integer, v2 if len(v2) == 2 else ("", ""))
        if not v2:  # cgroup v1, where -1 means no quota
            quota, period = read_number(group / "cpu.cfs_quota_us"), read_number(group / "cpu.cfs_period_us")
        if quota and period and quota > 0:
            shares.append(quota / period)
    return min(shares, default=None)


def most_threads(root: Path = _ROOT) -> int:
    """The most threads that can compute at the same time: one per big core, and no more than the CPU quota
    allows, because the others wait for a thread that is throttled."""
    quota = cpu_quota(root)
    cores = len(big_cores(root=root))
    return cores if quota is None else max(1, min(cores, int(quota)))


def default_threads(root: Path = _ROOT) -> int:
    """The number of threads to use if nothing was measured: `most_threads`, at most four."""
    return min(_MOST_THREADS, most_threads(root))


def control_groups(controller: str, root: Path = _ROOT) -> Iterator[Path]:
    """Directories of the control groups that limit this process through `controller` ("cpu", "memory"): in
    each hierarchy its own group first, then its ancestors as far as they are mounted."""
    paths: dict[bool, str] = {}
    for line in read_lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if not controllers or controller in controllers.split(","):
            paths[not controllers] = path  # True: the single hierarchy of v2
    # By mount point: a later mount at the same point hides the earlier one.
    mounts: dict[bool, dict[Path, str]] = {True: {}, False: {}}
    for line in read_lines(root / "proc/self/mountinfo"):
        place, _, filesystem = line.partition(" - ")
        kind, _, options = filesystem.partition(" ")
        options = options.rpartition(" ")[2]
        if kind == "cgroup2" or (kind == "cgroup" and controller in options.split(",")):
            of, at = (_unescaped(field) for field in place.split(" ")[3:5])
            mounts[kind == "cgroup2"][root / at.lstrip("/")] = of
    for version, path in paths.items():
        below = {top: _below(path, of) for top, of in mounts[version].items()}
        shown = {top: way for top, way in below.items() if way is not None}
        # If no mount shows the process's own group, the mounted group is one of its ancestors, as in some
        # containers: its limits apply as well.
        for top, way in (shown or dict.fromkeys(below, "")).items():
            group = top / way
            while group != top:
                yield group
                group = group.parent
            yield top


def limit_libraries() -> None:
    """Limits the threads of NumPy's matrix libraries to the CPU quota, by setting OMP_NUM_THREADS.

    Without it they start one thread per CPU, and their threads busy-wait for throttled ones. It has an effect
    only before NumPy is imported. A value that is already set stays."""
    if cpu_quota() is not None:
        os.environ.setdefault("OMP_NUM_THREADS", str(most_threads()))


def _machine(root: Path) -> Ram:
    """The RAM of the machine."""
    found = read_fields(root / "proc/meminfo", 1024)
    total, available = found.get("MemTotal"), found.get("MemAvailable")
    if total is None:  # no procfs, as on macOS, or an Android that hides it
        try:
            page, pages = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_PHYS_PAGES")
        except (ValueError, OSError):
            page = pages = -1
        total = page * pages if min(page, pages) > 0 else None
    files = ("MemFree", "Active(file)", "Inactive(file)")
    if available is None and all(name in found for name in files):  # Linux before 3.14
        available = sum(found[name] for name in files)
    return Ram(total, available)


def _group_bounds(root: Path) -> Iterator[Ram]:
    """The bound of each memory control group. Clean file pages count as available, since the kernel drops
    them before it kills a process."""
    for group in control_groups("memory", root):
        stat = read_fields(group / "memory.stat")
        limits = [read_number(group / f"memory.{name}") for name in ("max", "high", "limit_in_bytes")]
        limits.append(stat.get("hierarchical_memory_limit"))  # v1: includes ancestors that are not mounted
        limit = min((limit for limit in limits if limit is not None), default=None)
        used = read_number(group / "memory.current")
        if used is None:
            used = read_number(group / "memory.usage_in_bytes")
        if limit is None:
            continue
        available = None
        if used is not None:
            # v1 has totals with descendant groups under names with "total_"; v2 always includes them.
            part = {name.removeprefix("total_"): n for name, n in sorted(stat.items(), key=_total_last)}
            clean = part.get("inactive_file", 0) + part.get("active_file", 0)
            for name in ("dirty", "file_dirty", "writeback", "file_writeback"):
                clean -= part.get(name, 0)
            available = max(0, limit - used + max(0, clean))
        yield Ram(limit, available, "that this container may use (the memory limit of its control group)")


def _total_last(item: tuple[str, int]) -> bool:
    return item[0].startswith("total_")


def _process_bounds(root: Path) -> Iterator[Ram]:
    """The bounds from the limits of the process itself."""
    sizes = _statm(root)
    for kind, column, option in ((resource.RLIMIT_AS, 0, "-v"), (resource.RLIMIT_DATA, 5, "-d")):
        limit = resource.getrlimit(kind)[0]
        if limit != resource.RLIM_INFINITY:
            available = None if sizes is None else max(0, limit - sizes[column])
            yield Ram(limit, available, f"that this process may use (ulimit {option})")


def _below(path: str, top: str) -> str | None:
    """The path of a control group relative to the group `top`; None: it is not below `top`."""
    if ".." in path.split("/") or ".." in top.split("/"):  # outside this process's namespace
        return None
    prefix = top.rstrip("/") + "/"
    return path[len(prefix) :] if f"{path}/".startswith(prefix) else None


def _unescaped(field: str) -> str:
    """A path from mountinfo with its octal escapes (of spaces and such) decoded."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), field)


def _statm(root: Path) -> list[int] | None:
    """Sizes of this process in bytes: virtual, resident, shared, text, 0, data. None: not reported."""
    sizes = read_text(root / "proc/self/statm")
    return None if sizes is None else [int(pages) * os.sysconf("SC_PAGE_SIZE") for pages in sizes.split()]
