"""What an install gives, with a compiler and without: setup.py on a copy with a tiny library."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from shoal.engine.source_hash import source_hash

ROOT = Path(__file__).resolve().parents[2]
TINY_C = """
__attribute__((visibility("default"))) const char *shoal_source_hash(void);
const char *shoal_source_hash(void) { return SHOAL_SOURCE_HASH; }
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    folder.mkdir()
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md"):
        shutil.copy(ROOT / name, folder)
    leave = shutil.ignore_patterns("*.so", "__pycache__")
    for name in ("engine", "net", "planner", "src"):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=leave)
    (folder / "csrc").mkdir()
    (folder / "csrc" / "tiny.c").write_text(TINY_C)
    (folder / "csrc" / "tiny.h").write_text("")
    return folder


def build(project: Path, what: str, compiler: str | None = None) -> Path:
    """Calls the build backend as pip does, and returns the file that it made."""
    environment = {
        name: value for name, value in os.environ.items() if name not in {"CC", "CFLAGS", "LDFLAGS"}
    }
    if compiler is not None:
        environment["CC"] = compiler
    code = f"from setuptools import build_meta; print('made', build_meta.build_{what}('dist'))"
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=project,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    made = [line.split()[1] for line in result.stdout.splitlines() if line.startswith("made ")]
    return project / "dist" / made[0]


@pytest.mark.slow
def test_a_wheel_with_the_library_serves_every_python(project: Path) -> None:
    wheel = build(project, "wheel")
    assert wheel.name.startswith("shoal-0.1.0-py3-none-")
    assert not wheel.name.endswith("-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        library = archive.read("shoal/libshoal.so")
        metadata = archive.read("shoal-0.1.0.dist-info/WHEEL").decode()
    assert {
        "shoal/cli.py",
        "shoal/engine/errors.py",
        "shoal/net/__init__.py",
        "shoal/planner/__init__.py",
    } <= {*names}
    assert {name.split("/")[0] for name in names} == {"shoal", "shoal-0.1.0.dist-info"}
    assert "Root-Is-Purelib: false" in metadata
    # The hash that the sources have now is inside; no trace of the Python that built it is.
    expected = source_hash(project / "csrc")
    assert expected is not None
    assert expected.encode() in library
    assert b"PyInit" not in library
    assert b"libpython" not in library


@pytest.mark.slow
def test_without_a_compiler_the_wheel_is_pure(project: Path) -> None:
    build(project, "wheel")  # leaves a library in build/, which must not be taken for this one
    (project / "csrc" / "tiny.h").write_text("/* newer */")
    wheel = build(project, "wheel", compiler="no-such-compiler")
    assert wheel.name == "shoal-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        assert [name for name in archive.namelist() if name.endswith(".so")] == []
        assert "Root-Is-Purelib: true" in archive.read("shoal-0.1.0.dist-info/WHEEL").decode()


@pytest.mark.slow
def test_an_sdist_builds_the_same_wheel(project: Path, tmp_path: Path) -> None:
    wheel = build(project, "wheel")
    shutil.unpack_archive(build(project, "sdist"), tmp_path)
    again = build(tmp_path / "shoal-0.1.0", "wheel")
    assert again.name == wheel.name
    with zipfile.ZipFile(wheel) as first, zipfile.ZipFile(again) as second:
        assert sorted(first.namelist()) == sorted(second.namelist())
