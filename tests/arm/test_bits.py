"""The Arm kernels under qemu give the bits of x86: the driver's hashes are equal line by line. Needs what
`make check-arm` installs: qemu-user-static and an AArch64 cross compiler.
"""

from __future__ import annotations

import os
import platform
import subprocess
from functools import cache
from pathlib import Path

import pytest

pytestmark = [pytest.mark.arm, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ("-std=c11", "-O3", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror")
SEEDS = 5
ARM_SETS = ("neon", "neon_dot", "neon_i8mm")
# What each CPU must be found to have, and what of it is run there: qemu stops at an instruction a CPU lacks.
# `max` has all that qemu knows, pointer authentication cheap.
CPUS = (
    ("cortex-a53", {"neon"}, {"neon"}),
    ("cortex-a76", {"neon", "neon_dot"}, {"neon_dot"}),
    ("max,pauth-impdef=on", {"neon", "neon_dot", "neon_i8mm"}, {"neon_dot", "neon_i8mm"}),
)


def build(compiler: str, output: Path, *flags: str) -> Path:
    sources = [str(Path(__file__).with_name("driver.c")), *map(str, sorted((ROOT / "csrc").glob("*.c")))]
    subprocess.run([compiler, *FLAGS, *flags, *sources, "-o", str(output), "-lpthread", "-lm"], check=True)
    return output


@pytest.fixture(scope="module")
def drivers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("arm")
    return build("cc", folder / "native"), build("aarch64-linux-gnu-gcc", folder / "arm", "-static")


@cache
def lines(command: tuple[str, ...], isa: str, threads: int, flush: int, seeds: int = SEEDS) -> str:
    done = subprocess.run(
        [*command, isa, str(threads), str(flush), "0", str(seeds)], check=True, capture_output=True, text=True
    )
    return done.stdout


@pytest.fixture(scope="module")
def expected(drivers):
    """The definition's lines, from this machine's own CPU."""
    text = lines((str(drivers[0]),), "scalar", 1, 0)
    assert text.count("\n") > 300
    return text


def available(command, isa):
    return subprocess.run([*command, isa], check=False).returncode == 0


def test_every_native_set(drivers, expected):
    command = (str(drivers[0]),)
    sets = [isa for isa in ("avx2", "avxvnni", "avx512", *ARM_SETS) if available(command, isa)]
    assert sets or platform.machine() not in ("x86_64", "aarch64")
    for isa in sets:
        assert lines(command, isa, 1, 0) == expected, isa
        assert lines(command, isa, 3, 1) == expected, isa


@pytest.mark.parametrize(("cpu", "has", "run"), CPUS)
def test_every_arm_set(drivers, expected, cpu, has, run):
    command = ("qemu-aarch64-static", "-cpu", cpu, str(drivers[1]))
    assert {isa for isa in ARM_SETS if available(command, isa)} == has
    for isa in run:
        assert lines(command, isa, min(2, os.cpu_count() or 1), 1) == expected, isa


def test_the_definition_on_arm(drivers, expected):
    got = lines(("qemu-aarch64-static", "-cpu", "cortex-a53", str(drivers[1])), "scalar", 1, 0, seeds=2)
    assert got.count("\n") > 100
    assert expected.startswith(got)
