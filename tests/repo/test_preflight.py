"""The check before the first `make`: silence, or the one line that installs what is missing."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def preflight(
    folder: Path, python: str, compiler: str, managers: tuple[str, ...] = (), **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs the script where PATH holds the given package managers and what a shell script needs."""
    folder.mkdir(exist_ok=True)
    for tool in ("mktemp", "rm", "sh"):
        (folder / tool).symlink_to(str(shutil.which(tool)))
    script(folder / "id", "echo 1000")
    for manager in managers:
        script(folder / manager, "exit 1")
    return subprocess.run(
        [folder / "sh", ROOT / "scripts/preflight.sh", python],
        env={"PATH": str(folder), "CC": compiler, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def script(path: Path, line: str) -> str:
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(0o755)
    return str(path)


def test_silence_when_all_is_there(tmp_path: Path) -> None:
    compiler = script(tmp_path / "compiler", "exit 0")
    result = preflight(tmp_path / "bin", sys.executable, compiler)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("managers", "line"),
    [
        (("apt-get",), "sudo apt-get install -y gcc libc6-dev"),
        (("dnf",), "sudo dnf install -y gcc glibc-devel"),
        (("brew",), "brew install llvm"),
        ((), "your system's package manager: Python 3.11 or newer with venv, and a C compiler"),
    ],
)
def test_no_compiler(tmp_path: Path, managers: tuple[str, ...], line: str) -> None:
    result = preflight(tmp_path / "bin", sys.executable, "no-such-compiler", managers)
    assert result.returncode == 1
    assert "there is no working C compiler (no-such-compiler)" in result.stderr
    assert result.stderr.splitlines()[-1].strip() == line


def test_termux_is_known_by_its_prefix(tmp_path: Path) -> None:
    prefix = "/data/data/com.termux/files/usr"
    result = preflight(tmp_path / "bin", "no-such-python", "no-such-compiler", ("apt-get",), PREFIX=prefix)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].strip() == "pkg install python python-ensurepip-wheels clang"


def test_no_venv(tmp_path: Path) -> None:
    # Python without ensurepip, as Debian has it: it runs every other line.
    line = f'case "$*" in *ensurepip*) exit 1 ;; esac; exec {sys.executable} "$@"'
    python = script(tmp_path / "python", line)
    compiler = script(tmp_path / "compiler", "exit 0")
    result = preflight(tmp_path / "bin", python, compiler, ("apt-get",))
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].strip() == "sudo apt-get install -y python3-venv"


def test_an_old_python(tmp_path: Path) -> None:
    python = script(tmp_path / "python", 'case "$*" in --version) echo Python 3.9.2 ;; *) exit 1 ;; esac')
    compiler = script(tmp_path / "compiler", "exit 0")
    result = preflight(tmp_path / "bin", python, compiler, ("apt-get",))
    assert result.returncode == 1
    assert "Python 3.9.2 is too old, 3.11 is the first that will do" in result.stderr
    assert "    sudo apt-get install -y python3.11 python3.11-venv\n" in result.stderr
    assert "make PYTHON=python3.11" in result.stderr
