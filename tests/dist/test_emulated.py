"""The wheels for Arm in Debian's Pythons for arm64, under qemu: the bits of x86 on CPUs of three generations."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from .conftest import DEPENDENCIES, DIST, LOGITS, ROOT, pip, run

pytestmark = [pytest.mark.dist, pytest.mark.slow]

# 3.14 is Termux's. The suites of Debian that have these.
SUITES = {"3.11": "bookworm", "3.14": "sid"}
# `max` has all that qemu knows, pointer authentication cheap.
CPUS = {"cortex-a53": "neon", "cortex-a76": "neon_dot", "max,pauth-impdef=on": "neon_i8mm"}


@dataclass(frozen=True, slots=True)
class Arm64:
    """A Python of Debian's with NumPy and the other dependencies of a node, and folders of packages beside."""

    version: str
    root: Path
    packages: Path

    def run(self, cpu: str, shoal: Path, *arguments: str | Path, libraries: Path | None = None) -> str:
        """What `python ARGUMENTS` prints on an emulated `cpu`, with shoal as it is installed in `shoal`."""
        environment = [f"PYTHONHOME={self.root}/usr", f"PYTHONPATH={shoal}:{self.packages}"]
        if libraries is not None:
            environment.append(f"LD_LIBRARY_PATH={libraries}")
        options = [option for setting in environment for option in ("-E", setting)]
        python = self.root / "usr" / "bin" / f"python{self.version}"
        return run("qemu-aarch64-static", "-cpu", cpu, "-L", self.root, *options, python, *arguments).stdout

    def install(self, target: Path, *arguments: str | Path, platforms: tuple[str, ...]) -> None:
        """What the pip of a machine that takes these platforms' wheels would install."""
        where = [f"--platform={platform}_aarch64" for platform in platforms]
        which = ["--implementation=cp", f"--python-version={self.version}", "--only-binary=:all:"]
        pip(sys.executable, f"--target={target}", *where, *which, *arguments)


@pytest.fixture(scope="module", params=SUITES)
def arm64(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Arm64:
    """Unpacked once per checkout; `make clean` removes it."""
    version: str = request.param
    folder = ROOT / "build" / f"arm64-python{version}"
    if not folder.exists():
        run("sh", ROOT / "scripts" / "arm64-python", version, SUITES[version], folder)
    python = Arm64(version, folder / "root", tmp_path_factory.mktemp("packages"))
    python.install(python.packages, *DEPENDENCIES, platforms=("manylinux_2_28", "manylinux_2_17"))
    return python


@pytest.fixture(scope="module")
def installed(arm64: Arm64, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """shoal, as the wheel that pip chooses for an arm64 Linux among all in dist/."""
    target = tmp_path_factory.mktemp("shoal")
    ours = ("--no-index", "--no-deps", f"--find-links={DIST}", "shoal")
    arm64.install(target, *ours, platforms=("manylinux_2_28", "manylinux_2_17", "linux"))
    return target


@pytest.fixture(scope="module")
def like_bionic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a C library that calls itself bionic."""
    folder = tmp_path_factory.mktemp("like_bionic")
    source, versions = (Path(__file__).with_name(f"like_bionic.{suffix}") for suffix in ("c", "map"))
    compiler = (sys.executable, "-m", "ziglang", "cc", "-target", "aarch64-linux-gnu.2.17")
    flags = (
        "-O2",
        "-fPIC",
        "-shared",
        f"-Wl,--version-script={versions}",
        "-Wl,-soname,libc.so",
        "-lpthread",
    )
    run(*compiler, *flags, source, "-o", folder / "libc.so")
    return folder


@pytest.mark.parametrize("cpu", CPUS)
def test_the_bits_of_x86(arm64: Arm64, installed: Path, model: Path, expected: str, cpu: str) -> None:
    assert arm64.run(cpu, installed, LOGITS, model) == f"native ({CPUS[cpu]}): {expected}\n"


@pytest.mark.parametrize("arm64", ["3.14"], indirect=True)
@pytest.mark.parametrize("cpu", CPUS)
def test_the_code_for_android(
    arm64: Arm64, model: Path, expected: str, cpu: str, like_bionic: Path, tmp_path: Path
) -> None:
    """There is no Android here. But its library runs on a C library that calls itself bionic, glibc beneath."""
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
