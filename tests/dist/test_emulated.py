"""The wheels for Arm in Debian's Pythons for arm64, and without Python, under qemu: the bits of x86 on CPUs
of three generations."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

import pytest

from shoal.engine.export_c import export_c
from shoal.engine.generate import generate
from shoal.engine.model_directory import Model
from shoal.engine.stage import Stage

from .arm64 import CPUS, Arm64, unpacked
from .conftest import DEPENDENCIES, DIST, LAYERS, LOGITS, ROOT, run

pytestmark = [pytest.mark.dist, pytest.mark.slow]

TOKENS = [(7919 * i + 13) % 40000 for i in range(40)]


@pytest.fixture(scope="module", params=["3.11", "3.14"])
def arm64(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Arm64:
    """A Python with the dependencies of a node."""
    return unpacked(request.param, tmp_path_factory.mktemp("packages"), DEPENDENCIES)


@pytest.fixture(scope="module")
def installed(arm64: Arm64, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """shoal, as the wheel that pip chooses for an arm64 Linux among all in dist/."""
    target = tmp_path_factory.mktemp("shoal")
    ours = ("--no-index", "--no-deps", f"--find-links={DIST}", "shoal")
    arm64.install(target, *ours, platforms=("manylinux_2_28", "manylinux_2_17", "linux"))
    return target


@pytest.mark.parametrize("cpu", CPUS)
def test_the_bits_of_x86(arm64: Arm64, installed: Path, model: Path, expected: str, cpu: str) -> None:
    assert arm64.run(cpu, installed, LOGITS, model) == f"native ({CPUS[cpu]}): {expected}\n"


@pytest.mark.parametrize("arm64", ["3.14"], indirect=True)
@pytest.mark.parametrize("cpu", CPUS)
def test_the_code_for_android(
    arm64: Arm64, model: Path, expected: str, cpu: str, like_bionic: Path, tmp_path: Path
) -> None:
    """There is no Android here. Its library runs on a C library that calls itself bionic, glibc beneath."""
    (wheel,) = (DIST / "termux-old").glob("*.whl")
    arm64.install(tmp_path / "shoal", "--no-index", "--no-deps", wheel, platforms=("linux",))
    got = arm64.run(cpu, tmp_path / "shoal", LOGITS, model, libraries=like_bionic)
    assert got == f"native ({CPUS[cpu]}): {expected}\n"


@pytest.mark.parametrize("arm64", ["3.14"], indirect=True)
def test_a_glibc_refuses_the_library_for_android(arm64: Arm64, model: Path, tmp_path: Path) -> None:
    """And says so, instead of computing something else."""
    (wheel,) = (DIST / "termux-old").glob("*.whl")
    arm64.install(tmp_path, "--no-index", "--no-deps", wheel, platforms=("linux",))
    code = "from shoal.engine.backends import choose; print(*choose())"
    said = arm64.run("cortex-a76", tmp_path, "-c", code)
    assert said.startswith("numpy the C library cannot be loaded (cannot load library")
    assert "libc.so" in said


@pytest.fixture(scope="module")
def in_c(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `shoal export-c` writes of the model."""
    folder = tmp_path_factory.mktemp("c") / "export"
    export_c(Model.open(model), folder)
    return folder


@pytest.mark.parametrize("arm64", ["3.14"], indirect=True)
@pytest.mark.parametrize("cpu", CPUS)
@pytest.mark.parametrize("wheel", ["manylinux_2_17_aarch64.whl", "android_24_arm64_v8a.whl"])
def test_the_example_in_c(
    arm64: Arm64, model: Path, in_c: Path, like_bionic: Path, cpu: str, wheel: str, tmp_path: Path
) -> None:
    """A program without Python, linked with the library of a wheel for arm64, gives the tokens of x86-64."""
    (path,) = DIST.glob(f"*{wheel}")
    with zipfile.ZipFile(path) as archive:
        library = archive.extract("shoal/libshoal.so", tmp_path)
    program = tmp_path / "generate"
    compiler = (sys.executable, "-m", "ziglang", "cc", "-target", "aarch64-linux-gnu.2.17", "-std=c11", "-O2")
    sources = (f"-I{in_c}", ROOT / "examples" / "c" / "generate.c", in_c / "model.c", library)
    # The library for Android takes its symbols from bionic, which is there only at the start.
    run(*compiler, *sources, "-Wl,--allow-shlib-undefined", "-o", program)
    where = f"LD_LIBRARY_PATH={Path(library).parent}:{like_bionic}"
    arguments = (in_c, 8, 0, 0, *TOKENS)
    emulator = ("qemu-aarch64-static", "-cpu", cpu, "-L", arm64.root, "-E", where)
    said = run(*emulator, program, *map(str, arguments)).stdout
    with Stage(Model.open(model), 0, LAYERS + 2) as stage:
        assert [int(line) for line in said.split()] == list(generate(stage, TOKENS, max_tokens=8))
