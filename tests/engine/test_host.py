"""RAM and CPUs by what a system says of them: files of the same shape as those of real ones."""

from __future__ import annotations

import os
import resource
from collections.abc import Mapping
from pathlib import Path

import pytest

from shoal.engine import host
from shoal.engine.backends.native import pinned
from shoal.engine.host import Ram, big_cores, cpu_quota, default_threads, most_threads, ram, usable_cpus

MIB = 1 << 20
NO_LIMIT = 9223372036854771712
"""What cgroup v1 says where there is no limit."""
CONTAINER = "that this container may use (the memory limit of its control group)"
MEMINFO = {
    "proc/meminfo": "MemTotal:       24683652 kB\nMemFree:          200000 kB\nMemAvailable:   20000000 kB\n"
    "Buffers:           41104 kB\nCached:          2039848 kB\nActive(file):     700000 kB\n"
    "Inactive(file):  1300000 kB\nHugePages_Total:       0\n"
}
TOTAL, AVAILABLE = 24683652 * 1024, 20000000 * 1024
V1_STAT = """cache 0
inactive_file 1
active_file 2
dirty 3
hierarchical_memory_limit {limit}
hierarchical_memsw_limit 9223372036854771712
total_cache 157286400
total_rss 104857600
total_dirty 10485760
total_writeback 0
total_inactive_file 125829120
total_active_file 31457280
"""
V2_STAT = """anon 104857600
file 157286400
kernel 1048576
shmem 0
file_mapped 8388608
file_dirty 6291456
file_writeback 4194304
inactive_file 125829120
active_file 31457280
slab_reclaimable 524288
"""
CLEAN = (120 + 30 - 10) * MIB
"""Pages of files in both that can be dropped."""


def mount(number: int, of: str, at: str, kind: str, options: str) -> str:
    return f"{number} 24 0:{number} {of} {at} rw,nosuid shared:9 - {kind} {kind} rw{options}\n"


def system(root: Path, files: Mapping[str, object]) -> Path:
    """A file system with these files."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n" if not str(text).endswith("\n") else str(text))
    return root


def v1(folder: str, limit: int, used: int, hierarchical: int | None = None) -> dict[str, object]:
    """A memory group of cgroup v1."""
    stat = V1_STAT.format(limit=limit if hierarchical is None else hierarchical)
    return {
        f"{folder}/memory.limit_in_bytes": limit,
        f"{folder}/memory.usage_in_bytes": used,
        f"{folder}/memory.stat": stat,
    }


def v2(folder: str, limit: object, used: int, high: object = "max") -> dict[str, object]:
    """A memory group of cgroup v2."""
    return {
        f"{folder}/memory.max": limit,
        f"{folder}/memory.high": high,
        f"{folder}/memory.current": used,
        f"{folder}/memory.stat": V2_STAT,
    }


MEMORY_V1 = "sys/fs/cgroup/memory"
V1_MOUNTS = (
    mount(20, "/", "/proc", "proc", "")
    + mount(31, "/", "/sys/fs/cgroup", "tmpfs", ",mode=755")
    + mount(32, "/", "/sys/fs/cgroup/cpu,cpuacct", "cgroup", ",cpu,cpuacct")
    + mount(33, "/", "/sys/fs/cgroup/cpuset", "cgroup", ",cpuset")
    + mount(34, "/", "/sys/fs/cgroup/memory", "cgroup", ",memory")
    + mount(35, "/", "/sys/fs/cgroup/systemd", "cgroup", ",name=systemd")
)
V1_GROUPS = "9:name=systemd:/{of}\n5:cpuset:/\n4:memory:/{of}\n2:cpu,cpuacct:/{of}\n"
V2_MOUNT = mount(31, "/", "/sys/fs/cgroup", "cgroup2", ",nsdelegate,memory_recursiveprot")


def v1_host(of: str, mounts: str = V1_MOUNTS) -> dict[str, object]:
    return {**MEMINFO, "proc/self/cgroup": V1_GROUPS.format(of=of), "proc/self/mountinfo": mounts}


def v2_host(of: str, mounts: str = V2_MOUNT) -> dict[str, object]:
    return {**MEMINFO, "proc/self/cgroup": f"0::/{of}\n", "proc/self/mountinfo": mounts}


def in_docker_v1(of: str) -> str:
    """Docker's mounts without a cgroup namespace: what is mounted is the container's own group."""
    kinds = (("memory", "memory"), ("cpu,cpuacct", "cpu,cpuacct"))
    return "".join(
        mount(50 + i, f"/{of}", f"/sys/fs/cgroup/{folder}", "cgroup", f",{controllers}")
        for i, (folder, controllers) in enumerate(kinds)
    )


def test_a_machine_without_limits(tmp_path: Path) -> None:
    files = v1_host("user.slice") | v1(f"{MEMORY_V1}/user.slice", NO_LIMIT, 300 * MIB)
    root = system(tmp_path, files | v1(MEMORY_V1, NO_LIMIT, 900 * MIB))
    assert ram(root) == Ram(TOTAL, AVAILABLE, "that this machine has")


@pytest.mark.parametrize("of", ["app", "docker/0123abcd/app"])
def test_v1_less_what_cannot_be_dropped(tmp_path: Path, of: str) -> None:
    root = system(tmp_path, v1_host(of) | v1(f"{MEMORY_V1}/{of}", 400 * MIB, 260 * MIB))
    assert ram(root) == Ram(400 * MIB, 140 * MIB + CLEAN, CONTAINER)


@pytest.mark.parametrize("of", ["app.scope", "user.slice/user-1000.slice/app.scope"])
def test_v2_less_what_cannot_be_dropped(tmp_path: Path, of: str) -> None:
    root = system(tmp_path, v2_host(of) | v2(f"sys/fs/cgroup/{of}", 400 * MIB, 260 * MIB))
    assert ram(root) == Ram(400 * MIB, 140 * MIB + CLEAN, CONTAINER)


@pytest.mark.parametrize(
    ("limit", "high", "total"),
    [(400 * MIB, 300 * MIB, 300), (400 * MIB, 500 * MIB, 400), ("max", 200 * MIB, 200)],
)
def test_v2_throttles_above_high(tmp_path: Path, limit: object, high: object, total: int) -> None:
    files = v2_host("app") | v2("sys/fs/cgroup/app", limit, 150 * MIB, high)
    assert ram(system(tmp_path, files)) == Ram(total * MIB, (total - 150) * MIB + CLEAN, CONTAINER)


def test_the_least_total_and_the_least_available_may_be_of_two_groups(tmp_path: Path) -> None:
    """The pod has the greater limit, and its other containers have used it up."""
    top = "sys/fs/cgroup/kubepods.slice"
    files = v2_host("kubepods.slice/pod7.slice/one.scope") | v2(f"{top}/pod7.slice/one.scope", "max", 1)
    files |= v2(f"{top}/pod7.slice", 2000 * MIB, 1950 * MIB) | v2(top, "max", 3000 * MIB)
    files |= v2(f"{top}/pod7.slice/one.scope", 1000 * MIB, 250 * MIB)
    assert ram(system(tmp_path, files)) == Ram(1000 * MIB, 50 * MIB + CLEAN, CONTAINER)


def test_a_limit_above_the_ram_limits_nothing(tmp_path: Path) -> None:
    root = system(tmp_path, v1_host("app") | v1(f"{MEMORY_V1}/app", 1 << 45, 100 * MIB))
    assert ram(root) == Ram(TOTAL, AVAILABLE, "that this machine has")


@pytest.mark.parametrize("used", [400 * MIB, 405 * MIB])
def test_nothing_is_left(tmp_path: Path, used: int) -> None:
    """None left is 0, and never less."""
    files = v2_host("app") | v2("sys/fs/cgroup/app", 400 * MIB, used)
    root = system(tmp_path, files | {"sys/fs/cgroup/app/memory.stat": "anon 419430400\nfile 0\n"})
    assert ram(root).available == 0


def test_docker_without_a_namespace_shows_its_own_group_at_the_mount(tmp_path: Path) -> None:
    """And says itself what the groups above allow, which cannot be seen."""
    of = "docker/0123abcd"
    files = v1_host(of, in_docker_v1(of)) | v1(MEMORY_V1, 400 * MIB, 260 * MIB)
    assert ram(system(tmp_path / "plain", files)) == Ram(400 * MIB, 140 * MIB + CLEAN, CONTAINER)
    files |= v1(MEMORY_V1, NO_LIMIT, 260 * MIB, 300 * MIB)
    assert ram(system(tmp_path / "above", files)) == Ram(300 * MIB, 40 * MIB + CLEAN, CONTAINER)


def test_docker_in_docker(tmp_path: Path) -> None:
    """The inner container's group is below what the outer one has mounted."""
    files = v1_host("docker/outer/docker/inner", in_docker_v1("docker/outer"))
    files |= v1(MEMORY_V1, 500 * MIB, 350 * MIB) | v1(f"{MEMORY_V1}/docker/inner", 450 * MIB, 200 * MIB)
    assert ram(system(tmp_path, files)) == Ram(450 * MIB, 150 * MIB + CLEAN, CONTAINER)


@pytest.mark.parametrize("of", ["", "below/one"])
def test_a_namespace_of_v2_has_limits_at_its_top(tmp_path: Path, of: str) -> None:
    files = v2_host(of) | v2("sys/fs/cgroup", 400 * MIB, 260 * MIB)
    if of:  # a group without the memory controller has none of its files
        files |= {f"sys/fs/cgroup/{of}/cgroup.procs": "1"}
    assert ram(system(tmp_path, files)) == Ram(400 * MIB, 140 * MIB + CLEAN, CONTAINER)


@pytest.mark.parametrize(
    ("of", "mounted"),
    [("docker/abc", "/docker/xyz"), ("", "/.."), ("../../other", "/"), ("docker/ab", "/docker/a")],
)
def test_a_group_that_no_mount_shows_has_the_limits_of_the_mount(
    tmp_path: Path, of: str, mounted: str
) -> None:
    files = v2_host(of, mount(31, mounted, "/sys/fs/cgroup", "cgroup2", ""))
    files |= v2("sys/fs/cgroup", 400 * MIB, 260 * MIB) | v2("sys/fs/other", 1, 1)
    assert ram(system(tmp_path, files)).total == 400 * MIB


@pytest.mark.parametrize(("one", "two"), [(300, 400), (400, 300)])
def test_v1_and_v2_at_the_same_time(tmp_path: Path, one: int, two: int) -> None:
    mounts = V1_MOUNTS + mount(36, "/", "/sys/fs/cgroup/unified", "cgroup2", "")
    files = v1_host("app", mounts) | v1(f"{MEMORY_V1}/app", one * MIB, 260 * MIB)
    files |= {"proc/self/cgroup": V1_GROUPS.format(of="app") + "0::/app2\n"}
    files |= v2("sys/fs/cgroup/unified/app2", two * MIB, 260 * MIB)
    assert ram(system(tmp_path, files)) == Ram(300 * MIB, 40 * MIB + CLEAN, CONTAINER)


def test_a_mount_hides_the_one_before_it_at_the_same_place(tmp_path: Path) -> None:
    mounts = mount(30, "/docker/abc/gone", "/sys/fs/cgroup", "cgroup2", "")
    files = v2_host("docker/abc", mounts + mount(31, "/docker", "/sys/fs/cgroup", "cgroup2", ""))
    files |= v2("sys/fs/cgroup/abc", 400 * MIB, 260 * MIB)
    assert ram(system(tmp_path, files)).total == 400 * MIB


def test_places_with_spaces(tmp_path: Path) -> None:
    mounts = mount(31, "/my\\040group", "/mnt/control\\040groups", "cgroup2", "")
    files = v2_host("my group/one", mounts) | v2("mnt/control groups/one", 400 * MIB, 260 * MIB)
    assert ram(system(tmp_path, files)).total == 400 * MIB


def test_usage_that_is_not_told(tmp_path: Path) -> None:
    files = v2_host("app") | {"sys/fs/cgroup/app/memory.max": 400 * MIB}
    assert ram(system(tmp_path, files)) == Ram(400 * MIB, 400 * MIB, CONTAINER)


def test_linux_before_3_14_does_not_sum_up_what_is_available(tmp_path: Path) -> None:
    text = MEMINFO["proc/meminfo"].replace("MemAvailable:   20000000 kB\n", "")
    root = system(tmp_path, {"proc/meminfo": text})
    assert ram(root) == Ram(TOTAL, (200000 + 700000 + 1300000) * 1024)


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """What sysconf knows of the machine's RAM: 8 GB, or nothing once it is cleared."""
    known = {"SC_PAGE_SIZE": 16384, "SC_PHYS_PAGES": (8 << 30) // 16384}

    def sysconf(name: str) -> int:
        if name not in known:
            raise ValueError("unrecognized configuration name")
        return known[name]

    monkeypatch.setattr(os, "sysconf", sysconf)
    return known


def test_macos_has_no_procfs(tmp_path: Path, pages: dict[str, int]) -> None:
    assert ram(tmp_path) == Ram(8 << 30, None)
    assert ram(tmp_path).estimate == (8 << 30) // 3


@pytest.mark.parametrize("answer", [{}, {"SC_PAGE_SIZE": 4096}, {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": -1}])
def test_nothing_is_known(tmp_path: Path, pages: dict[str, int], answer: dict[str, int]) -> None:
    pages.clear()
    pages.update(answer)
    assert (ram(tmp_path), ram(tmp_path).estimate) == (Ram(None, None), None)


def test_an_android_that_hides_meminfo(tmp_path: Path, pages: dict[str, int]) -> None:
    """A directory cannot be read as a file, which no user's rights change."""
    for name in ("proc/meminfo", "proc/self/mountinfo", "sys/devices/system/cpu/cpu0/cpu_capacity"):
        (tmp_path / name).mkdir(parents=True)
    system(tmp_path, {"proc/self/cgroup": "4:memory:/\n3:cpuset:/top-app\n0::/uid_10123/pid_4567\n"})
    assert ram(tmp_path) == Ram(8 << 30, None)
    assert cpu_quota(tmp_path) is None


def test_a_container_where_the_machine_does_not_say_what_is_available(
    tmp_path: Path, pages: dict[str, int]
) -> None:
    """What the container has left, the machine need not have."""
    files = v2_host("app") | v2("sys/fs/cgroup/app", 300 * MIB, 160 * MIB)
    del files["proc/meminfo"]
    found = ram(system(tmp_path, files))
    assert (found, found.estimate) == (Ram(300 * MIB, None, CONTAINER), 100 * MIB)


@pytest.mark.parametrize(
    ("kind", "used", "option"), [(resource.RLIMIT_AS, 300, "-v"), (resource.RLIMIT_DATA, 100, "-d")]
)
def test_limits_of_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: int, used: int, option: str
) -> None:
    def limits(asked: int) -> tuple[int, int]:
        return (1000 * MIB if asked == kind else resource.RLIM_INFINITY, resource.RLIM_INFINITY)

    monkeypatch.setattr(resource, "getrlimit", limits)
    page = os.sysconf("SC_PAGE_SIZE")
    sizes = [n * MIB // page for n in (300, 50, 10, 1, 0, 100, 0)]
    root = system(tmp_path, {**MEMINFO, "proc/self/statm": " ".join(map(str, sizes))})
    bound = f"that this process may use (ulimit {option})"
    assert ram(root) == Ram(1000 * MIB, (1000 - used) * MIB, bound)


def test_ram_here() -> None:
    found = ram()
    assert found.total is not None and found.available is not None
    assert 0 < found.available <= found.total
    assert 5e6 < host.resident_bytes() < 5e9


def cpu_v1(folder: str, quota: int, period: int = 100000) -> dict[str, object]:
    top = f"sys/fs/cgroup/cpu,cpuacct/{folder}"
    return {f"{top}/cpu.cfs_quota_us": quota, f"{top}/cpu.cfs_period_us": period}


@pytest.mark.parametrize(
    ("groups", "quota"),
    [
        ({"a/b": -1, "a": -1}, None),
        ({"a/b": 100000, "a": -1}, 1.0),
        ({"a/b": 400000, "a": 150000}, 1.5),
        ({"a/b": 50000, "a": 150000}, 0.5),
    ],
)
def test_quotas_of_v1(tmp_path: Path, groups: dict[str, int], quota: float | None) -> None:
    files = v1_host("a/b")
    for folder, value in groups.items():
        files |= cpu_v1(folder, value)
    assert cpu_quota(system(tmp_path, files)) == quota


@pytest.mark.parametrize(
    ("groups", "quota"),
    [
        ({"a/b": "max 100000", "a": "max 100000"}, None),
        ({"a/b": "100000 100000", "a": "max 100000"}, 1.0),
        ({"a/b": "max 100000", "a": "125000 50000"}, 2.5),
        ({"a/b": "20000 100000", "a": "125000 50000", "": "200000 100000"}, 0.2),
        ({"a/b": "", "a": "max"}, None),
    ],
)
def test_quotas_of_v2(tmp_path: Path, groups: dict[str, str], quota: float | None) -> None:
    files = v2_host("a/b") | {f"sys/fs/cgroup/{folder}/cpu.max": text for folder, text in groups.items()}
    assert cpu_quota(system(tmp_path, files)) == quota


def test_quotas_in_a_container(tmp_path: Path) -> None:
    files = v1_host("docker/abc", in_docker_v1("docker/abc")) | cpu_v1("", 250000)
    assert cpu_quota(system(tmp_path / "one", files)) == 2.5
    assert (
        cpu_quota(system(tmp_path / "two", v2_host("") | {"sys/fs/cgroup/cpu.max": "250000 100000"})) == 2.5
    )


@pytest.mark.parametrize(
    ("quota", "most", "default"),
    [("max", 6, 4), ("50000", 1, 1), ("100000", 1, 1), ("199000", 1, 1), ("300000", 3, 3), ("6400000", 6, 4)],
)
def test_no_more_threads_than_a_quota_keeps_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str, most: int, default: int
) -> None:
    monkeypatch.setattr(host, "usable_cpus", lambda: frozenset(range(6)))
    root = system(tmp_path, v2_host("") | {"sys/fs/cgroup/cpu.max": f"{quota} 100000"})
    assert (most_threads(root), default_threads(root)) == (most, default)


@pytest.mark.parametrize(
    ("quota", "before", "after"), [(None, None, None), (1.5, None, "1"), (1.5, "7", "7")]
)
def test_libraries_of_numpy_keep_to_a_quota(
    monkeypatch: pytest.MonkeyPatch, quota: float | None, before: str | None, after: str | None
) -> None:
    monkeypatch.setattr(host, "cpu_quota", lambda *_: quota)
    monkeypatch.setattr(os, "environ", {} if before is None else {"OMP_NUM_THREADS": before})
    host.limit_libraries()
    assert os.environ.get("OMP_NUM_THREADS") == after


def speeds(root: Path, name: str, values: dict[int, object]) -> Path:
    return system(root, {f"sys/devices/system/cpu/cpu{cpu}/{name}": value for cpu, value in values.items()})


def test_a_phone(tmp_path: Path) -> None:
    """Four small cores, three middle ones, one that is faster still."""
    mhz = dict(enumerate([1600, 1600, 1600, 1600, 2400, 2400, 2400, 3000]))
    speeds(tmp_path, "cpufreq/cpuinfo_max_freq", {cpu: value * 1000 for cpu, value in mhz.items()})
    assert big_cores(range(8), tmp_path) == {4, 5, 6, 7}
    assert big_cores({0, 1, 2}, tmp_path) == {0, 1, 2}
    assert big_cores({0, 4}, tmp_path) == {4}


def test_capacity_counts_before_frequency(tmp_path: Path) -> None:
    """A small core may run at the frequency of a big one and do a third of its work."""
    speeds(tmp_path, "cpufreq/cpuinfo_max_freq", dict.fromkeys(range(4), 2000000))
    speeds(tmp_path, "cpu_capacity", {0: 300, 1: 300, 2: 1024, 3: 1024})
    assert big_cores(range(4), tmp_path) == {2, 3}


@pytest.mark.parametrize("values", [{}, {0: 2000000}, {0: 2000000, 1: "?"}])
def test_all_where_nothing_is_known(tmp_path: Path, values: dict[int, object]) -> None:
    speeds(tmp_path, "cpufreq/cpuinfo_max_freq", values)
    assert big_cores({0, 1}, tmp_path) == {0, 1}


def test_cpus_here() -> None:
    assert big_cores() <= usable_cpus()
    assert 1 <= default_threads() <= 4


def test_pinned_for_a_while() -> None:
    before = os.sched_getaffinity(0)
    one = {min(before)}
    with pinned(one):
        assert os.sched_getaffinity(0) == one
        assert usable_cpus() == one and most_threads() == 1
    assert os.sched_getaffinity(0) == before
