"""Signals that end a process: it leaves nothing, and says which it was."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.patience import LIMIT
from tests.system.conftest import TINY, environment

from shoal import store
from shoal.cli import main
from shoal.engine.convert import convert

WAITS = f"""
import sys, time
from shoal.cli import main
from shoal.progress import Progress
def update(self, done, total):
    if done == 3:
        print("here", flush=True)
        time.sleep(60)
Progress.update = update
sys.exit(main([{{command}}, {str(TINY)!r}, *sys.argv[1:]]))
"""


@contextmanager
def waiting(program: str, *arguments: str, home: Path, ignored: int = 0) -> Iterator[subprocess.Popen[bytes]]:
    """A process that has said "here" and now sleeps; killed at the end, if it still runs."""

    def prepare() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if ignored:
            signal.signal(ignored, signal.SIG_IGN)

    with subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        env=environment(XDG_CACHE_HOME=str(home)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=prepare,
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"here\n"
            yield process
        finally:
            process.kill()


def files(directory: Path) -> list[str]:
    return [path.name for path in directory.rglob("*") if path.is_file() and path.suffix != ".lock"]


@pytest.mark.slow
@pytest.mark.parametrize("command", ["convert", "pull"])
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_conversion_that_is_ended_leaves_nothing(
    command: str, number: int, code: int, tmp_path: Path
) -> None:
    more = [str(tmp_path / "out")] if command == "convert" else []
    with waiting(WAITS.replace("{command}", repr(command)), *more, home=tmp_path) as process:
        assert files(tmp_path)
        process.send_signal(number)
        _, errors = process.communicate(timeout=LIMIT)
    assert (process.returncode, b"Traceback" in errors) == (code, False)
    assert files(tmp_path) == []
    assert not list(tmp_path.glob(".*"))


@pytest.mark.slow
def test_what_a_killed_pull_left_goes_with_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    program = WAITS.replace("{command}", "'pull'")
    with waiting(program, "--name", "two", home=tmp_path):
        with waiting(program, "--name", "one", home=tmp_path):
            pass
        assert len(list(store.models_directory().glob(".*.part"))) == 2
        assert main(["pull", str(TINY), "--name", "three"]) == 0
        assert [path.name.split(".")[1] for path in store.models_directory().glob(".*.part")] == ["two"]
    assert main(["pull", str(TINY), "--name", "two"]) == 0
    assert not list(store.models_directory().glob(".*.part"))
    assert store.names() == ["three", "two"]


@pytest.mark.slow
def test_what_a_killed_conversion_left_goes_with_the_next_one(tmp_path: Path) -> None:
    for name in ("out", "out.2", "*"):
        with waiting(WAITS.replace("{command}", "'convert'"), str(tmp_path / name), home=tmp_path):
            pass
    (tmp_path / ".out.else").mkdir()
    assert len(list(tmp_path.glob(".*.part"))) == 3
    convert(TINY, tmp_path / "out")
    names = sorted(path.name.rsplit(".", 2)[0] for path in tmp_path.glob(".*.part"))
    assert names == [".*", ".out.2"]
    assert (tmp_path / ".out.else").exists()


@pytest.mark.slow
def test_a_process_that_ignores_hanging_up_goes_on(tmp_path: Path) -> None:
    with waiting(WAITS.replace("{command}", "'pull'"), home=tmp_path, ignored=signal.SIGHUP) as process:
        process.send_signal(signal.SIGHUP)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.2)
        process.terminate()
        assert process.wait(60) == 143


@pytest.mark.slow
def test_a_job_in_the_background_is_ended_too(tmp_path: Path) -> None:
    """A shell lets it ignore SIGINT."""
    with waiting(WAITS.replace("{command}", "'pull'"), home=tmp_path, ignored=signal.SIGINT) as process:
        process.terminate()
        assert process.wait(60) == 143
    assert files(tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("ignored", [0, signal.SIGINT])
def test_an_event_loop_is_ended_in_good_order(ignored: int, tmp_path: Path) -> None:
    program = """
import sys, trio
from shoal.cli import main
from shoal.commands import ls
async def sleep():
    try:
        print("here", flush=True)
        await trio.sleep_forever()
    finally:
        print("in order", flush=True)
ls.run = lambda args: trio.run(sleep)
if main(["ls"]) != 143:
    sys.exit("another code")
"""
    with waiting(program, home=tmp_path, ignored=ignored) as process:
        if ignored:
            process.send_signal(ignored)
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.2)
        process.terminate()
        assert process.communicate(timeout=LIMIT) == (b"in order\n", b"")
        assert process.returncode == 0


def test_handlers_are_put_back() -> None:
    assert main(["ls"]) == 0
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_an_ignored_interrupt_is_ignored_again() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert main(["ls"]) == 0
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    finally:
        signal.signal(signal.SIGINT, before)
