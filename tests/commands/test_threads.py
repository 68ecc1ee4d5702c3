"""The number of threads that `shoal profile` found fastest is what `run` and `node` take from then on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shoal import threads
from shoal.answering import finish
from shoal.arguments import build_parser
from shoal.cli import main
from shoal.commands import profile, run
from shoal.engine.convert import convert
from shoal.engine.cores import default_threads
from shoal.engine.shards import Model

TINY = Path(__file__).parents[1] / "fixtures" / "tiny-llama"
FOUND = (3, "the fastest by shoal profile")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache directory of this test's own, on a device with four CPUs."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(threads, "usable_cores", lambda: frozenset(range(4)))
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
    monkeypatch.setattr(threads, "usable_cores", lambda: frozenset(range(1, 5)))
    assert threads.chosen(None, "native", "auto") != FOUND


@pytest.mark.parametrize(
    "text", ["", "[1]", "{", "[" * 100_000, '{"KEY": "3"}', '{"KEY": true}', '{"KEY": 0}', '{"KEY": 5}']
)
def test_a_damaged_file_is_as_none(cache: Path, text: str) -> None:
    cache.parent.mkdir()
    cache.write_text(text.replace("KEY", threads._key("numpy", "auto")))
    assert threads.chosen(None, "numpy", "auto") == (default_threads(), "by the number of cores")


def test_where_nothing_can_be_written(cache: Path) -> None:
    cache.parent.write_text("a file where the directory would be")
    assert not threads.keep(3, "numpy", "auto")


@pytest.mark.slow
def test_a_profile_is_kept_and_named_by_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(TINY, tmp_path / "tiny", dtype="int8")
    model = str(tmp_path / "tiny")

    def best(*_: Any) -> tuple[int, dict[int, float]]:
        return 2, {1: 1e9, 2: 2e9}

    monkeypatch.setattr(profile, "best_threads", best)
    line = ["run", model, "text", "--stats", "--backend", "numpy"]

    async def start() -> None:
        async with run.open_engine(build_parser().parse_args(line), Model.open(model), 64):
            pass

    for least, said in ((1 << 40, "by the number of cores"), (1, "2 threads (the fastest by shoal profile)")):
        monkeypatch.setattr(profile, "_TELLING", least)
        assert main(["profile", model, "--backend", "numpy"]) == 0
        finish(start())
        assert said in capsys.readouterr().err
