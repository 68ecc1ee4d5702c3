"""What stands in each file of dist/: names, tags, and how the libraries are linked, as readelf sees it."""

from __future__ import annotations

import re
import subprocess
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from shoal import __version__
from shoal.engine.source_hash import source_hash

from .conftest import DIST, ROOT

pytestmark = pytest.mark.dist

INFO = f"shoal-{__version__}.dist-info"
EXPORTS = {
    *re.findall(
        r"\b(shoal_\w+)\(",
        re.sub(r"/\*.*?\*/", "", (ROOT / "csrc" / "kernels.h").read_text(), flags=re.DOTALL),
    )
}


@dataclass(frozen=True, slots=True)
class Built:
    """A wheel with a library: where it is, for which machine, what it may need, the versions of symbols."""

    folder: str
    platform: str
    machine: str
    needed: frozenset[str]
    versions: str


GLIBC = frozenset({"libc.so.6", "libm.so.6", "libpthread.so.0"})
AARCH64 = "AArch64"
ALL = (
    Built(
        "", "manylinux_2_17_x86_64", "Advanced Micro Devices X86-64", GLIBC, r"GLIBC_2\.(\d|1[0-7])(\.\d+)?"
    ),
    Built("", "manylinux_2_17_aarch64", AARCH64, GLIBC, r"GLIBC_2\.17"),
    Built("", "android_24_arm64_v8a", AARCH64, frozenset({"libc.so"}), "LIBC"),
    Built("termux-old", "linux_aarch64", AARCH64, frozenset({"libc.so"}), "LIBC"),
)


def wheel_of(folder: str, platform: str) -> Path:
    return DIST / folder / f"shoal-{__version__}-py3-none-{platform}.whl"


def read_elf(library: Path, option: str) -> str:
    return subprocess.run(
        ["readelf", "-W", option, library], check=True, capture_output=True, text=True
    ).stdout


def package_files() -> set[str]:
    """What git holds of the package, by the names that it has when installed."""
    listing = subprocess.run(
        ["git", "ls-files", "engine", "net", "planner", "src/shoal"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    paths = [path for path in map(Path, listing.stdout.splitlines()) if not (ROOT / path).is_dir()]
    return {str(Path("shoal", path) if path.parts[0] != "src" else path.relative_to("src")) for path in paths}


@pytest.fixture(params=ALL, ids=lambda built: built.platform)
def built(request: pytest.FixtureRequest) -> Built:
    value: Built = request.param
    return value


@pytest.fixture
def library(built: Built, tmp_path: Path) -> Path:
    with zipfile.ZipFile(wheel_of(built.folder, built.platform)) as archive:
        return Path(archive.extract("shoal/libshoal.so", tmp_path))


def test_dist_holds_these_files_and_no_others() -> None:
    wheels = {wheel_of(built.folder, built.platform) for built in ALL} | {wheel_of("", "any")}
    sdist = DIST / f"shoal-{__version__}.tar.gz"
    assert {path for path in DIST.rglob("*") if path.is_file()} == {*wheels, sdist}


def test_a_wheel_holds_the_package_and_its_library(built: Built) -> None:
    check_wheel(built.folder, built.platform, {"shoal/libshoal.so"})


def test_the_pure_wheel_holds_no_library() -> None:
    check_wheel("", "any", set())


def check_wheel(folder: str, platform: str, libraries: set[str]) -> None:
    with zipfile.ZipFile(wheel_of(folder, platform)) as archive:
        names = {*archive.namelist()}
        tags = archive.read(f"{INFO}/WHEEL").decode()
    records = ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "top_level.txt", "licenses/LICENSE")
    assert names == package_files() | libraries | {f"{INFO}/{name}" for name in records}
    assert re.findall(r"^Tag: (.*)$", tags, re.MULTILINE) == [f"py3-none-{platform}"]
    assert f"Root-Is-Purelib: {'false' if libraries else 'true'}\n" in tags


def test_the_sdist_holds_what_a_build_needs() -> None:
    with tarfile.open(DIST / f"shoal-{__version__}.tar.gz") as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    csrc = {f"csrc/{path.name}" for path in (ROOT / "csrc").iterdir() if path.suffix in {".c", ".h", ".inc"}}
    files = {"pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md"}
    assert csrc | files | {f"src/{name}" for name in package_files()} <= names
    assert [name for name in names if name.endswith((".so", ".o", ".pyc"))] == []


def test_what_the_library_is_linked_with(built: Built, library: Path) -> None:
    header, dynamic = read_elf(library, "-h"), read_elf(library, "-d")
    assert re.findall(r"Machine: +(.*)", header) == [built.machine]
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic)
    assert {*needed} <= built.needed
    assert {"libc.so.6", "libc.so"} & {*needed}  # bionic refuses a library that needs nothing
    assert re.findall(r"TEXTREL|RPATH|RUNPATH|RELR\b", dynamic) == []


def test_the_symbols(built: Built, library: Path) -> None:
    """Exported: the functions of kernels.h, and no others. Taken: old versions, and nothing of Python's."""
    exported, taken, versions = set(), set(), set()
    for line in read_elf(library, "--dyn-syms").splitlines():
        words = line.split()
        if len(words) < 8 or not words[0].rstrip(":").isdigit():
            continue
        name, _, version = words[7].partition("@")
        if words[6] != "UND":
            exported.add(name)
        else:
            taken.add(name)
            versions.add(version)
    assert exported == EXPORTS
    assert {"malloc", "pthread_create", "syscall"} <= taken
    assert [name for name in taken if name.startswith(("Py", "_Py", "__aarch64_"))] == []
    assert [version for version in versions if not re.fullmatch(built.versions, version)] == []


def test_segments_suit_pages_of_16_kib(library: Path) -> None:
    segments = [line.split() for line in read_elf(library, "-l").splitlines()]
    loads = [words for words in segments if words[:1] == ["LOAD"]]
    assert len(loads) >= 2
    assert {words[-1] for words in loads} == {"0x4000"}
    (stack,) = [words for words in segments if words[:1] == ["GNU_STACK"]]
    assert stack[-2] == "RW"
    assert ["GNU_RELRO"] in [words[:1] for words in segments]


def test_the_library_is_of_these_sources(library: Path) -> None:
    expected = source_hash()
    assert expected is not None
    assert expected.encode() in library.read_bytes()
