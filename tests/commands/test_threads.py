"""The number of threads that `shoal profile` found fastest is what `run`, `node` and a program's Stage use
from then on."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from tests.patience import LIMIT

from shoal.arguments import build_parser
from shoal.cli import main
from shoal.commands import profile, run
from shoal.engine import host, threads
from shoal.engine.batch import Run, Want
from shoal.engine.convert import convert
from shoal.engine.host import default_threads
from shoal.engine.model_directory import Model
from shoal.engine.stage import Stage, StageOptions

TINY = Path(__file__).parents[1] / "fixtures" / "tiny-llama"
FOUND = (3, "the fastest by shoal profile")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache directory of this test's own, on a device with four CPUs."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(4)))
    return tmp_path / "shoal" / "threads.json"


def test_what_was_found_is_taken_unless_another_is_given() -> None:
    assert threads.chosen(None, "numpy", "auto") == (default_threads(), "by the number of cores")
    assert threads.keep(3, "numpy", "auto")
    assert threads.chosen(None, "numpy", "auto") == FOUND
    assert threads.chosen(2, "numpy", "auto") == (2, "")


def test_it_holds_for_its_backend_kernels_build_and_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    native = "shoal.engine.backends.native.build_hash"
    monkeypatch.setattr(native, lambda: "one")
    threads.keep(3, "native", "auto")
    assert threads.chosen(None, "native", "auto") == FOUND
    assert threads.chosen(None, "native", "scalar") != FOUND
    assert threads.chosen(None, "numba", "auto") != FOUND
    with monkeypatch.context() as other:
        other.setattr(native, lambda: "another")
        assert threads.chosen(None, "native", "auto") != FOUND
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(1, 5)))
    assert threads.chosen(None, "native", "auto") != FOUND


@pytest.mark.parametrize(
    "text", ["", "[1]", "{", "[" * 100_000, '{"KEY": "3"}', '{"KEY": true}', '{"KEY": 0}', '{"KEY": 5}']
)
def test_a_damaged_file_is_as_none(cache: Path, text: str) -> None:
    cache.parent.mkdir()
    cache.write_text(text.replace("KEY", threads.device_key("numpy", "auto")))
    assert threads.chosen(None, "numpy", "auto") == (default_threads(), "by the number of cores")


def test_where_nothing_can_be_written(cache: Path) -> None:
    cache.parent.write_text("a file where the directory would be")
    assert not threads.keep(3, "numpy", "auto")


@pytest.mark.parametrize(("quota", "number"), [(1.0, 1), (1.5, 1), (2.5, 2), (0.2, 1)])
def test_a_quota_of_cpus_limits_the_threads(
    monkeypatch: pytest.MonkeyPatch, quota: float, number: int
) -> None:
    """And what was found without one is not taken with one, nor the other way round."""
    assert threads.keep(3, "numpy", "auto")
    with monkeypatch.context() as limited:
        for module in (host, threads):
            limited.setattr(module, "cpu_quota", lambda *_: quota)
        assert threads.chosen(None, "numpy", "auto") == (number, f"by the CPU quota of {quota:g}")
        assert threads.keep(1, "numpy", "auto")
        assert threads.chosen(None, "numpy", "auto") == (1, "the fastest by shoal profile")
    assert threads.chosen(None, "numpy", "auto") == FOUND


def test_nothing_is_kept_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    assert not threads.keep(3, "numpy", "auto")
    assert threads.chosen(None, "numpy", "auto") == (4, "by the number of cores")


@pytest.fixture
def tiny(tmp_path: Path) -> Model:
    convert(TINY, tmp_path / "tiny", dtype="int8")
    return Model.open(tmp_path / "tiny")


def test_a_program_gets_as_many_as_the_command_line(tiny: Model) -> None:
    with Stage(tiny, 0, tiny.n_units) as stage:
        assert stage.threads == stage.options.threads == 4
    threads.keep(3, "native", "auto")
    with Stage(tiny, 0, tiny.n_units) as stage:
        assert stage.threads == stage.options.threads == 3
    with Stage(tiny, 0, tiny.n_units, StageOptions(threads=1)) as stage:
        assert stage.threads == stage.options.threads == 1


def test_a_forked_process_computes_on(tiny: Model) -> None:
    """It has none of the threads that its parent started."""
    with Stage(tiny, 0, tiny.n_units) as stage:
        stage.open_sequence(0)
        expected = stage.run([Run(0, 0, [3, 1, 4, 1, 5], Want.TOKEN)])[0].token
        child = os.fork()
        if child == 0:
            code = 1
            try:
                code = int(stage.run([Run(0, 0, [3, 1, 4, 1, 5], Want.TOKEN)])[0].token != expected)
                stage.close()
            finally:
                os._exit(code)
        until = time.monotonic() + LIMIT
        ended, status = os.waitpid(child, os.WNOHANG)
        while not ended and time.monotonic() < until:
            time.sleep(0.01)
            ended, status = os.waitpid(child, os.WNOHANG)
        if not ended:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        assert (ended, status) == (child, 0)


@pytest.mark.slow
def test_a_profile_is_kept_and_named_by_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(TINY, tmp_path / "tiny", dtype="int8")
    model = str(tmp_path / "tiny")

    def best(*_: Any) -> tuple[int, dict[int, float]]:
        return 2, {1: 1e9, 2: 2e9}

    monkeypatch.setattr("shoal.engine.measure.best_threads", best)
    line = ["run", model, "text", "--stats", "--backend", "numpy"]

    for least, said in ((1 << 40, "by the number of cores"), (1, "2 threads (the fastest by shoal profile)")):
        monkeypatch.setattr(profile, "_TELLING", least)
        assert main(["profile", model, "--backend", "numpy"]) == 0
        args, opened = build_parser().parse_args(line), Model.open(model)
        with run.open_llm(args, opened, 64):
            pass
        assert said in capsys.readouterr().err
