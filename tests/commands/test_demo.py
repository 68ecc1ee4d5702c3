"""The part of the demo in which a device gets hot, on a chain that is played."""

from __future__ import annotations

import time
from collections.abc import Generator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from shoal.answering import Settings
from shoal.commands import demo
from shoal.engine.batch import Sampling
from shoal.net.slow import Slowness, set_factor
from shoal.planner import Assignment

COOL = (Assignment("laptop", 0, 4), Assignment("phone", 4, 9))
MOVED = (Assignment("laptop", 0, 7), Assignment("phone", 7, 9))
SETTINGS = Settings(512, Sampling(), 96)


class Chain:
    """A chain of which a token takes 20 ms, five times as long when the phone is hot, and 40 ms when layers
    have left it, which happens `after` so many tokens."""

    def __init__(self, slow: Path, after: int, moves: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self.plan = SimpleNamespace(assignments=COOL)
        self.now = 0.0
        self._slow, self._after, self._moves = Slowness(1.0, slow), after, moves
        monkeypatch.setattr(time, "monotonic", lambda: self.now)

    def session(self, settings: Settings) -> Chain:
        return self

    def close(self) -> None:
        pass

    def answer(self, prompt: list[int], *, max_tokens: int, end: object) -> Generator[int, None, None]:
        for token in range(max_tokens):
            hot = self._slow.factor() > 2.0
            self.now += 0.02 if not hot else 0.1 if self.plan.assignments == COOL else 0.04
            if token == self._after:
                self.plan.assignments = MOVED
                self._moves += ["moved units 4-6 from phone to laptop (it is hot)", "after it: 25 tokens/s"]
            yield token


def hot(
    tmp_path: Path, after: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int, list[str]]:
    """The number of tokens, and the lines."""
    slow, moves = tmp_path / "phone.slow", ["moved something before"]
    set_factor(slow, 2.0)
    chain = Chain(slow, after, moves, monkeypatch)
    heat = partial(set_factor, slow, 10.0)
    played = demo._Hot(chain, [1, 2], SETTINGS, heat, moves)  # type: ignore[arg-type]
    played.run()
    assert played.tokens == list(range(len(played.tokens)))
    return len(played.tokens), capsys.readouterr().out.splitlines()


def test_layers_that_leave_a_hot_device_are_told_with_the_speed_before_and_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    count, lines = hot(tmp_path, 84, monkeypatch, capsys)
    assert lines == [
        "   before    50.0 tokens/s   units: laptop 4, phone 5",
        "   hot       10.0 tokens/s   units: laptop 4, phone 5",
        "   moved units 4-6 from phone to laptop (it is hot)",
        "   then      25.0 tokens/s   units: laptop 7, phone 2",
    ]
    assert count == pytest.approx(84 + demo.MOVED_SECONDS / 0.04, abs=2)


def test_layers_that_stay_end_the_answer_after_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    count, lines = hot(tmp_path, 10_000, monkeypatch, capsys)
    assert lines[1] == "   hot       10.0 tokens/s   units: laptop 4, phone 5"
    assert lines[2].startswith("   No layers have left it") and len(lines) == 3
    assert count == pytest.approx(demo.COOL_TOKENS + demo.MOVING_SECONDS / 0.1, abs=2)


def test_the_device_that_gets_hot_is_the_one_that_takes_longest_beside_the_quickest() -> None:
    stages = (Assignment("laptop", 0, 22), Assignment("phone", 22, 23), Assignment("old-phone", 23, 32))
    assert demo.busiest(stages) == ("old-phone", 3.0)
    assert demo.busiest((Assignment("tablet", 0, 2), *stages[:1])) == ("tablet", 2.0)
