"""Debian's Pythons for arm64, run by qemu."""

from __future__ import annotations

import fcntl
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .conftest import ROOT, pip, run

# The suites of Debian that have these. Termux has 3.14, and had 3.13 until July 2026.
SUITES = {"3.11": "bookworm", "3.13": "trixie", "3.14": "sid"}
# `max` has all that qemu knows, pointer authentication cheap.
CPUS = {"cortex-a53": "neon", "cortex-a76": "neon_dot", "max,pauth-impdef=on": "neon_i8mm"}


@dataclass(frozen=True, slots=True)
class Arm64:
    """A Python of Debian's, and a folder of packages beside it."""

    version: str
    root: Path
    packages: Path

    def command(self, cpu: str, *paths: Path, libraries: Path | None = None) -> list[str]:
        """What runs this Python on an emulated `cpu`, with `paths` before its packages."""
        settings = {
            "PYTHONHOME": f"{self.root}/usr",
            "PYTHONPATH": ":".join(map(str, (*paths, self.packages))),
            **({} if libraries is None else {"LD_LIBRARY_PATH": str(libraries)}),
        }
        options = [word for name, value in settings.items() for word in ("-E", f"{name}={value}")]
        python = self.root / "usr" / "bin" / f"python{self.version}"
        return ["qemu-aarch64-static", "-cpu", cpu, "-L", str(self.root), *options, str(python)]

    def run(self, cpu: str, shoal: Path, *arguments: str | Path, libraries: Path | None = None) -> str:
        """What `python ARGUMENTS` prints on an emulated `cpu`, with shoal as it is installed in `shoal`."""
        return run(*self.command(cpu, shoal, libraries=libraries), *arguments).stdout

    def install(self, target: Path, *arguments: str | Path, platforms: Sequence[str]) -> None:
        """What the pip of a machine that takes these platforms' wheels would install."""
        where = [f"--platform={platform}_aarch64" for platform in platforms]
        which = ["--implementation=cp", f"--python-version={self.version}", "--only-binary=:all:"]
        pip(sys.executable, f"--target={target}", *where, *which, *arguments)


def unpacked(version: str, packages: Path, requirements: Sequence[str]) -> Arm64:
    """A Python with the wheels for Linux of these requirements in `packages`, an empty folder. Python itself
    is unpacked once per checkout; `make clean` removes it."""
    folder = ROOT / "build" / f"arm64-python{version}"
    folder.parent.mkdir(exist_ok=True)
    with open(Path(f"{folder}.lock"), "w") as lock:  # another process of these tests may unpack it
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            run("sh", ROOT / "scripts" / "arm64-python", version, SUITES[version], folder)
    python = Arm64(version, folder / "root", packages)
    python.install(packages, *requirements, platforms=("manylinux_2_28", "manylinux_2_17"))
    return python
