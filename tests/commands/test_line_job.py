"""Jobs over lines: killed at any point and continued, the output is that of an undisturbed run."""

from __future__ import annotations

import argparse
import io
import json
import random
import resource
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from shoal import line_commands, line_job
from shoal.engine.errors import ContextError, OperatingSystemError, ShoalError
from shoal.line_commands import SOME_FAILED, run_lines
from shoal.line_job import EMPTY, open_sink
from shoal.lines import Lines

LINES = b"".join(b"%d: %s\n" % (i, b"x" * (i * 7 % 50)) for i in range(1, 41)) + b"\n\xff\n" + b"y" * 80
"""Of 43 lines three have no result: one is empty, one is not UTF-8, one is too long for `compute`."""


class Killed(BaseException):
    """The process ends here."""


class Killer:
    """Raises Killed at the step with a number. Nothing is written after that."""

    def __init__(self, at: int | None = None) -> None:
        self.steps, self.at = 0, at

    def step(self) -> None:
        if self.at is not None and self.steps >= self.at:
            raise Killed
        self.steps += 1


def compute(llm: Any, texts: Sequence[str]) -> list[dict[str, Any]]:
    if max(map(len, texts)) > 70:
        raise ContextError(f"{max(map(len, texts))} characters are too many")
    return [{"length": len(text)} for text in texts]


@contextmanager
def steps(killer: Killer) -> Iterator[None]:
    """Every effect on the disk is a few steps of the killer, before, in the middle and after."""
    write = line_job._write

    def slow_write(path: Path, file: io.FileIO, data: bytes) -> None:
        for part in (data[:3], data[3 : len(data) // 2], data[len(data) // 2 :]):
            killer.step()
            write(path, file, part)
        killer.step()

    def no_fsync(descriptor: int) -> None:
        killer.step()

    def slow_write_whole(path: Path, text: str) -> None:
        part = path.with_name(f"{path.name}.{killer.steps}.part")  # as of another process each time
        killer.step()
        part.write_text(text)
        killer.step()
        part.replace(path)
        killer.step()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(line_job, "_write", slow_write)
        patch.setattr(line_job.os, "fsync", no_fsync)
        patch.setattr(line_job, "write_whole", slow_write_whole)
        yield


@pytest.fixture(autouse=True)
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = SimpleNamespace(model=SimpleNamespace(hash="abc"), context=70)
    monkeypatch.setattr(line_commands, "_open", lambda args: nullcontext(model))


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., int]:
    """Runs a job over LINES with `-o out`."""
    (tmp_path / "lines").write_bytes(LINES)

    def run(*, resume: bool = True, batch: int = 4, file: str = "lines", **options: Any) -> int:
        args = argparse.Namespace(
            command="test", file=str(tmp_path / file), output=tmp_path / "out", resume=resume, batch=batch
        )
        return run_lines(args, options, compute)

    return run


@pytest.fixture
def undisturbed(run: Callable[..., int], tmp_path: Path) -> Iterator[bytes]:
    """The output of an undisturbed run."""
    assert run(resume=False) == SOME_FAILED
    made = (tmp_path / "out").read_bytes()
    clean(tmp_path)
    yield made
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lines", "out", "out.job"]


def clean(directory: Path) -> None:
    (directory / "out").unlink()
    (directory / "out.job").unlink()


def test_an_undisturbed_run(undisturbed: bytes, run: Callable[..., int], tmp_path: Path) -> None:
    made = [json.loads(line) for line in undisturbed.splitlines()]
    assert [one["line"] for one in made] == list(range(1, 44))
    assert [one.get("length") for one in made[:40]] == [
        len(line) for line in LINES.decode("latin-1").split("\n")[:40]
    ]
    assert [one["error"] for one in made[40:]] == [
        "the line is empty",
        "the line is not UTF-8: byte 0 is 0xff",
        "80 characters are too many",
    ]
    for batch in (1, 43, 1000):
        assert run(batch=batch) == SOME_FAILED
        assert (tmp_path / "out").read_bytes() == undisturbed
        clean(tmp_path)
    assert run() == run() == SOME_FAILED  # nothing is left to do for the second


@pytest.mark.slow
@pytest.mark.parametrize("save_s", [0.0, 3600.0])
def test_killed_at_every_step(
    save_s: float,
    undisturbed: bytes,
    run: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(line_job, "_SAVE_S", save_s)
    count, generator = Killer(), random.Random(1)
    with steps(count):
        run()
    assert count.steps > 40
    for at in range(count.steps):
        clean(tmp_path)
        with steps(Killer(at)), pytest.raises(Killed):
            run()
        again = Killer(generator.randrange(count.steps))  # and often once more
        try:
            with steps(again):
                assert run(batch=generator.randint(1, 9)) == SOME_FAILED
        except Killed:
            assert run(batch=generator.randint(1, 9)) == SOME_FAILED
        assert (tmp_path / "out").read_bytes() == undisturbed, at


def test_lines_that_are_done_are_not_computed_again(
    undisturbed: bytes, run: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(line_job, "_SAVE_S", 0.0)
    with steps(Killer(30)), pytest.raises(Killed):
        run()
    done = json.loads((tmp_path / "out.job").read_text())["state"]["lines"]
    assert done >= 8
    count, original = 0, compute

    def counted(llm: Any, texts: Sequence[str]) -> list[dict[str, Any]]:
        nonlocal count
        made = original(llm, texts)
        count += len(texts)
        return made

    monkeypatch.setattr(f"{__name__}.compute", counted)
    run()
    assert count == 40 - done
    assert (tmp_path / "out").read_bytes() == undisturbed


def test_lines_may_be_added_and_those_that_are_done_may_not_change(
    run: Callable[..., int], tmp_path: Path
) -> None:
    (tmp_path / "lines").write_bytes(b"one\ntwo\n")
    assert run() == 0
    (tmp_path / "lines").write_bytes(b"one\ntwo\nthree\n")
    assert run() == 0
    assert [json.loads(line)["length"] for line in (tmp_path / "out").read_bytes().splitlines()] == [3, 3, 5]
    before = (tmp_path / "out").read_bytes(), (tmp_path / "out.job").read_bytes()
    for changed in (b"one\nTWO\nthree\n", b"one\ntwo\n", b"", b"one\n\ntwo\nthree\n"):
        (tmp_path / "lines").write_bytes(changed)
        with pytest.raises(
            ShoalError, match=r"its first 3 lines differ. Give the same lines, or name another"
        ):
            run()
    assert ((tmp_path / "out").read_bytes(), (tmp_path / "out.job").read_bytes()) == before


def test_another_job_is_refused(run: Callable[..., int], tmp_path: Path) -> None:
    run(prompt="a")
    with pytest.raises(ShoalError, match='begun with prompt "a", and this is "b": use the same prompt'):
        run(prompt="b")
    with pytest.raises(ShoalError, match='begun with prompt "a", and this is null'):
        run()
    with pytest.raises(ShoalError, match="begun with labels null, and this is"):
        run(prompt="a", labels=["x"])
    with pytest.raises(ShoalError, match="exists: give --resume to continue it"):
        run(prompt="a", resume=False)
    assert run(prompt="a") == SOME_FAILED


def test_a_file_that_is_not_of_this_job_is_not_touched(run: Callable[..., int], tmp_path: Path) -> None:
    (tmp_path / "out").write_bytes(b"mine")
    with pytest.raises(ShoalError, match=r"has no out.job beside it"):
        run()
    assert (tmp_path / "out").read_bytes() == b"mine"
    (tmp_path / "out").unlink()
    run()
    made = (tmp_path / "out").read_bytes()
    for changed in (made[:-1], b"[" + made[1:], b""):
        (tmp_path / "out").write_bytes(changed)
        with pytest.raises(ShoalError, match=r"was changed since the job wrote it: remove it and out\.job"):
            run()
        assert (tmp_path / "out").read_bytes() == changed
    (tmp_path / "out").write_bytes(made + b'{"half a li')
    assert run() == SOME_FAILED
    assert (tmp_path / "out").read_bytes() == made


@pytest.mark.parametrize(
    "change",
    [
        lambda saved: {"state": saved["state"]},
        lambda saved: saved | {"more": 1},
        lambda saved: saved | {"state": saved["state"] | {"lines": -1}},
        lambda saved: saved | {"state": saved["state"] | {"lines": True}},
        lambda saved: saved | {"state": saved["state"] | {"version": 2}},
        lambda saved: saved | {"state": saved["state"] | {"output_bytes": 1 << 70}},
        lambda saved: [],
    ],
)
def test_a_damaged_state(change: Callable[[Any], Any], run: Callable[..., int], tmp_path: Path) -> None:
    run()
    saved = json.loads((tmp_path / "out.job").read_text())
    (tmp_path / "out.job").write_text(json.dumps(change(saved)))
    with pytest.raises(ShoalError, match=r"out.job is damaged \(.*\): remove it and .*out to begin anew"):
        run()


def test_two_at_once(run: Callable[..., int], tmp_path: Path) -> None:
    with (
        open_sink(tmp_path / "out", {}, Lines(io.BytesIO(), "none"), resume=False),
        pytest.raises(ShoalError, match="being written by another process"),
    ):
        run()
    assert run(resume=False) == SOME_FAILED


def test_a_full_disk(undisturbed: bytes, run: Callable[..., int], tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        for limit in (900, 1000, 1100):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            with pytest.raises(OperatingSystemError, match=r"out cannot be written: File too large: raise"):
                run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert len(undisturbed) > 1100
    assert (tmp_path / "out").stat().st_size == 1100  # with half a line
    state = json.loads((tmp_path / "out.job").read_text())["state"]
    assert 20 < state["lines"] < 43
    assert run() == SOME_FAILED
    assert (tmp_path / "out").read_bytes() == undisturbed


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_device_has_no_state(tmp_path: Path) -> None:
    none = Lines(io.BytesIO(), "none")
    with (
        pytest.raises(OperatingSystemError, match="/dev/full cannot be written: No space left"),
        open_sink(Path("/dev/full"), {}, none, resume=False) as sink,
    ):
        sink.write([{}], none)
    with (
        pytest.raises(ShoalError, match="/dev/full is not a file"),
        open_sink(Path("/dev/full"), {}, none, resume=True),
    ):
        pass
    with open_sink(Path("/dev/null"), {}, none, resume=False) as sink:
        sink.write([{}, {"error": "x"}], none)
    assert (sink.state.lines, sink.state.errors) == (2, 1)
    assert not Path("/dev/null.job").exists()


def test_standard_output_cannot_be_continued(capsys: pytest.CaptureFixture[str]) -> None:
    none = Lines(io.BytesIO(), "none")
    with (
        pytest.raises(ShoalError, match="give its name with -o FILE"),
        open_sink(None, {}, none, resume=True),
    ):
        pass
    with open_sink(None, {}, none, resume=False) as sink:
        assert sink.state == EMPTY
        sink.write([{"text": "ü"}], none)
    assert capsys.readouterr().out == '{"text": "\\u00fc"}\n'
