"""What the operating system refuses: one line with the culprit and what to do, and exit code 16."""

from __future__ import annotations

import argparse
import ctypes
import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.system.conftest import TINY, environment

from shoal import store
from shoal.cli import main
from shoal.download import download
from shoal.engine.convert import convert
from shoal.engine.errors import ModelFileError, OperatingSystemError
from shoal.engine.os_errors import translated


def raising(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Let `shoal ls` fail with the error."""

    def run(args: argparse.Namespace) -> int:
        raise error

    monkeypatch.setattr("shoal.commands.ls.run", run)


def os_error(number: int, path: str | bytes | None = "/somewhere/file") -> OSError:
    return OSError(number, os.strerror(number), *([] if path is None else [path]))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (os_error(errno.ENOSPC), "/somewhere/file: No space left on device: free space there"),
        (os_error(errno.ENOSPC, None), "No space left on device: free space there"),
        (os_error(errno.EDQUOT), "/somewhere/file: Disk quota exceeded: free space there"),
        (os_error(errno.EROFS), "/somewhere/file: Read-only file system: make it writable"),
        (
            os_error(errno.EACCES, b"/some/where"),
            "/some/where: Permission denied: change its permissions",
        ),
        (os_error(errno.ENOENT), "/somewhere/file: No such file or directory: check the path"),
        (os_error(errno.EIO), "/somewhere/file: Input/output error: check the disk"),
        (os_error(errno.EMFILE, None), "Too many open files: close other programs, or raise the limit"),
        (os_error(errno.ENOMEM, None), "Cannot allocate memory: close other programs, or take a smaller"),
        (os_error(errno.EAGAIN, None), "Resource temporarily unavailable: try again"),
        (MemoryError(), "Cannot allocate memory: close other programs, or take a smaller model"),
        (ExceptionGroup("nursery", [os_error(errno.EIO)]), "/somewhere/file: Input/output error"),
        (os_error(errno.ENOPROTOOPT), "/somewhere/file: Protocol not available: check the path"),
    ],
)
def test_each_is_one_line(
    error: Exception, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raising(monkeypatch, error)
    assert main(["ls"]) == 16
    said = capsys.readouterr().err
    assert said.startswith(f"shoal: error: {message}") and said.count("\n") == 1


@pytest.mark.parametrize(
    "error", [os_error(errno.EBADF, None), os_error(errno.EINVAL, None), OSError("no number"), ValueError()]
)
def test_mistakes_of_this_program_are_not_hidden(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    raising(monkeypatch, error)
    with pytest.raises(type(error)):
        main(["ls"])


def test_another_place_is_proposed_for_models_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    hint = ", or set XDG_CACHE_HOME to another directory\n"
    for path, number, proposed in (
        (tmp_path / "cache" / "shoal" / "models" / "x", errno.ENOSPC, True),
        (tmp_path / "cache", errno.EACCES, True),
        (tmp_path, errno.EACCES, True),
        (tmp_path / "other", errno.EACCES, False),
        (tmp_path / "cache" / "shoal" / "models" / "x", errno.EMFILE, False),
    ):
        raising(monkeypatch, os_error(number, str(path)))
        assert main(["ls"]) == 16
        assert capsys.readouterr().err.endswith(hint) == proposed, path


def test_a_cache_that_is_no_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cache").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert main(["pull", str(TINY)]) == 16
    assert f"{tmp_path}/cache/shoal/models: Not a directory: check the path" in capsys.readouterr().err
    assert main(["ls"]) == 0


def test_no_home(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", home)
    for line in (["ls"], ["run", "tiny", "hi"], ["pull", str(TINY)]):
        assert main(line) == 16
        assert capsys.readouterr().err == (
            "shoal: error: this user has no home directory to keep models in: "
            "set XDG_CACHE_HOME to a directory for them\n"
        )
    # A model at a path needs no home.
    convert(TINY, tmp_path / "tiny")
    assert main(["verify", str(tmp_path / "tiny")]) == 0
    monkeypatch.chdir(tmp_path)
    assert main(["verify", "tiny"]) == 0
    with pytest.raises(
        ModelFileError, match=r"there is no model '\./x'; models cannot be kept on this device"
    ):
        store.resolve("./x")


def test_a_user_that_does_not_exist(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "~no-such-user/model", "hi"]) == 3
    assert "there is no model '~no-such-user/model'" in capsys.readouterr().err
    assert main(["pull", "~no-such-user/model"]) == 11
    assert "'~no-such-user/model' is not a source" in capsys.readouterr().err


def test_a_name_that_no_file_can_have(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "what is " * 100, "hi"]) == 3
    assert "there is no model 'what is what" in capsys.readouterr().err


def obey_permissions() -> None:
    """In the child: root without the capabilities by which it may read and write any file."""
    if os.geteuid() == 0:
        for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
            ctypes.CDLL(None).prctl(24, capability)  # PR_CAPBSET_DROP


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs capabilities that can be dropped")
@pytest.mark.parametrize("line", ["ls", "run tiny hi", f"pull {TINY}", "verify tiny"])
def test_a_cache_without_permission(line: str, tmp_path: Path) -> None:
    (tmp_path / "shoal" / "models" / "tiny").mkdir(parents=True)
    (tmp_path / "shoal" / "models").chmod(0)
    done = subprocess.run(
        [sys.executable, "-m", "shoal", *line.split()],
        env=environment(XDG_CACHE_HOME=str(tmp_path)),
        preexec_fn=obey_permissions,
        capture_output=True,
        text=True,
        check=False,
    )
    (tmp_path / "shoal" / "models").chmod(0o755)
    assert done.returncode == 16
    assert done.stderr.startswith(f"shoal: error: {tmp_path}/shoal/models") and done.stderr.count("\n") == 1
    assert "Permission denied: change its permissions, or set XDG_CACHE_HOME" in done.stderr


class Disk:
    """shutil.disk_usage of a disk with so many bytes free."""

    def __init__(self, free: int, total: int = 1 << 40) -> None:
        self.free, self.total = free, total

    def __call__(self, path: object) -> Disk:
        return self


def test_a_model_that_does_not_fit_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", Disk(1000))
    assert main(["convert", str(TINY), str(tmp_path / "out")]) == 16
    said = capsys.readouterr().err
    assert "too little space on the disk: the model needs 0." in said and said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(shutil, "disk_usage", Disk(0, 0))  # a file system that does not say
    convert(TINY, tmp_path / "out")
    size = sum(path.stat().st_size for path in (tmp_path / "out").glob("unit-*"))
    monkeypatch.setattr(shutil, "disk_usage", Disk(size // 2))
    with pytest.raises(OperatingSystemError):
        convert(TINY, tmp_path / "second")


def get(target: Path) -> None:
    download("http://127.0.0.1:9/f", target, size=10_000_000, sha256="", progress=lambda done, total: None)


def test_a_download_that_does_not_fit_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", Disk(4_000_000))
    with pytest.raises(OperatingSystemError, match=r"f needs 10\.0 MB and 4\.0 MB are free: free space"):
        get(tmp_path / "f")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "f.part").write_bytes(bytes(3_000_000))
    message = r"the rest of f needs 7\.0 MB .*3\.0 MB that have arrived are kept in .*f\.part for the next"
    with pytest.raises(OperatingSystemError, match=message):
        get(tmp_path / "f")
    assert (tmp_path / "f.part").stat().st_size == 3_000_000


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
def test_a_disk_that_fails_during_a_download(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrived = [2_000_000]

    def fetch(url: str, part: Path, have: int, size: int, progress: object) -> None:
        part.write_bytes(bytes(arrived[0]))
        raise os_error(number, None)

    monkeypatch.setattr("shoal.download._fetch", fetch)
    message = rf"{os.strerror(number)}: .*2\.0 MB that have arrived are kept in .*f\.part for the next"
    with pytest.raises(OperatingSystemError, match=message):
        get(tmp_path / "f")
    assert (tmp_path / "f.part").stat().st_size == 2_000_000
    arrived[0] = 0
    with pytest.raises(OperatingSystemError, match=rf"^{tmp_path}: {os.strerror(number)}"):
        get(tmp_path / "f")
    assert not (tmp_path / "f.part").exists()


def test_translated_says_what_was_refused() -> None:
    said = translated(os_error(errno.ENOSPC, "/a/.b.xyz.part"), Path("/a/b"), "could not be written")
    assert str(said) == "/a/b could not be written: No space left on device: free space there"
