"""Real limits of control groups: a node promises and holds less, a run maps its files, a conversion that
cannot end does not begin, and no more threads compute than a CPU quota keeps running."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from bench.lab import ground
from tests.models import smollm2_gguf
from tests.patience import LIMIT

from shoal.engine.model_directory import Model

pytestmark = [pytest.mark.lab, pytest.mark.whole_lab, pytest.mark.slow]

MIB = 1 << 20
SHOAL = (sys.executable, "-m", "shoal")
ASKED = ("Say hi.", "-n", "20", "--context", "256")

Started = Callable[..., "subprocess.Popen[str]"]
Limited = Callable[[int | None, int | None], Started]


@contextmanager
def group(controller: str, limits: Mapping[str, int]) -> Iterator[Path]:
    """A control group below this process's own, with these limits."""
    above = ground.own_cgroup(controller)
    assert above is not None, "the tests of the lab are left out where there is none"
    path = above / f"shoal-limits-{os.getpid()}"
    path.mkdir()
    try:
        for name, value in limits.items():
            (path / name).write_text(str(value))
        yield path
    finally:
        until = time.monotonic() + 10
        while path.exists():  # a process needs a moment to leave
            try:
                path.rmdir()
            except OSError:
                assert time.monotonic() < until
                time.sleep(0.02)


@pytest.fixture
def limited() -> Iterator[Limited]:
    """Starts a process with MiB of memory and CPU microseconds in 100 ms at most."""
    with ExitStack() as stack:

        def limits(memory: int | None, quota: int | None) -> Started:
            paths = []
            if memory is not None:
                values = {"memory.limit_in_bytes": memory * MIB}
                paths.append(stack.enter_context(group("memory", values)))
            if quota is not None:
                values = {"cpu.cfs_quota_us": quota}
                paths.append(stack.enter_context(group("cpu", values)))

            def enter() -> None:
                for path in paths:
                    (path / "cgroup.procs").write_text("0")

            def start(*command: str) -> subprocess.Popen[str]:
                pipe = subprocess.PIPE
                process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, preexec_fn=enter)
                stack.enter_context(process)
                stack.callback(process.kill)
                return process

            return start

        yield limits


def answer(model: Model, *options: str) -> str:
    """What a process without limits says."""
    done = subprocess.run(
        [*SHOAL, "run", str(model.path), *ASKED, *options], check=True, capture_output=True, text=True
    )
    return done.stdout


def test_a_node_offers_what_its_container_has_and_answers(limited: Limited, smollm2: Model) -> None:
    node = limited(400, None)(*SHOAL, "node", str(smollm2.path), "--listen", "127.0.0.1:0")
    assert node.stdout is not None
    said = node.stdout.readline()
    address, offered = said.split()[2], int(said.split()[-2])
    assert 200 < offered < 400 * MIB / 1e6
    assert answer(smollm2, "--nodes", address) == answer(smollm2)
    assert node.poll() is None


def test_a_promise_beyond_the_container_is_refused(limited: Limited, smollm2: Model) -> None:
    node = limited(400, None)(*SHOAL, "node", str(smollm2.path), "--listen", "127.0.0.1:0", "--ram", "500")
    _, err = node.communicate(timeout=LIMIT)
    assert node.returncode == 1
    assert "--ram 500 is more than the 419 MB that this container may use" in err


def test_a_run_maps_what_its_container_cannot_hold(limited: Limited, smollm2: Model) -> None:
    run = limited(120, None)(*SHOAL, "run", str(smollm2.path), *ASKED)
    out, err = run.communicate(timeout=LIMIT)
    assert run.returncode == 0, err
    assert out == answer(smollm2)


@pytest.mark.parametrize(("limit", "code"), [(300, 0), (150, 1)])
def test_a_conversion_ends_or_does_not_begin(limited: Limited, tmp_path: Path, limit: int, code: int) -> None:
    target = tmp_path / "model"
    process = limited(limit, None)(*SHOAL, "convert", str(smollm2_gguf()), str(target))
    _, err = process.communicate(timeout=300)
    assert process.returncode == code, err
    assert (list(tmp_path.iterdir()) == [target]) is (code == 0)
    if code:
        assert "MB are available of the 157 MB that this container may use" in err


@pytest.mark.parametrize("quota", [100000, 150000])
def test_one_thread_computes_where_a_quota_keeps_no_second_running(
    limited: Limited, smollm2: Model, quota: int
) -> None:
    start = limited(None, quota)
    run = start(*SHOAL, "run", str(smollm2.path), *ASKED, "--stats")
    _, err = run.communicate(timeout=LIMIT)
    assert f", 1 thread (by the CPU quota of {quota / 100000:g})]" in err


def test_numpys_libraries_start_no_threads_that_would_wait(
    limited: Limited,
) -> None:
    program = """
import numpy
from pathlib import Path
a = numpy.ones((1000, 1000))
a @ a
print(len(list(Path("/proc/self/task").iterdir())))"""
    within = f"from shoal.engine.host import limit_libraries; limit_libraries(){program}"
    assert limited(None, 100000)(sys.executable, "-c", within).communicate(timeout=LIMIT)[0] == "1\n"
