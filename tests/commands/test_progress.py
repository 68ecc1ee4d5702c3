"""Progress of jobs whose end is known, and of those where it is not."""

from __future__ import annotations

import io

from shoal.progress import Progress


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def said(stream: io.StringIO, steps: list[tuple[float, int]], total: int | None) -> list[str]:
    """What is written when `done` is reported at each time."""
    clock = Clock()
    with Progress("score", unit="lines", stream=stream, clock=clock) as progress:
        for clock.now, done in steps:
            progress.update(done, total)
    return stream.getvalue().replace("\r", "\n").split("\n")


def test_a_line_for_every_tenth() -> None:
    steps = [(0.0, 0), (1.0, 50), (2.0, 100), (3.0, 120), (4.0, 1000)]
    assert said(io.StringIO(), steps, 1000) == [
        "score:   0 %  0/1000 lines",
        "score:  10 %  100/1000 lines  50.0 lines/s  0:18 left",
        "score: 100 %  1000/1000 lines  250.0 lines/s",
        "",
    ]


def test_a_job_that_is_continued_has_the_speed_of_this_run() -> None:
    assert said(io.StringIO(), [(0.0, 430), (2.0, 500)], 1000) == [
        "score:  50 %  500/1000 lines  35.0 lines/s  0:14 left",
        "",
    ]


def test_a_line_for_every_minute_where_nobody_knows_the_end() -> None:
    steps = [(0.0, 0), (30.0, 30), (60.0, 60), (61.0, 62), (119.0, 200), (121.0, 206), (130.0, 210)]
    assert said(io.StringIO(), steps, None) == [
        "score: 60 lines  1.0 lines/s",
        "score: 206 lines  2.4 lines/s",
        "",
    ]


def test_no_bar_where_nobody_knows_the_end() -> None:
    steps = [(0.0, 0), (0.05, 1), (1.0, 32), (2.0, 64)]
    drawn = said(Terminal(), steps, None)
    assert [text.rstrip() for text in drawn] == [
        "", "score 0 lines", "score 32 lines  32.0 lines/s", "score 64 lines  32.0 lines/s", "",
    ]  # fmt: skip
    assert "[" in said(Terminal(), steps, 64)[2]
