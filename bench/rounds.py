"""Samples of several programs that took turns: medians, and ratios of what ran in the same round."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from shoal.text_table import table


@dataclass(frozen=True, slots=True)
class Sample:
    """A figure, such as "decode, tokens/s", of a program in one round."""

    figure: str
    program: str
    round: int
    value: float


@dataclass(slots=True)
class Samples:
    """All samples of a run, in their order; each is printed as it comes."""

    taken: list[Sample] = field(default_factory=list)

    def add(self, figure: str, program: str, number: int, value: float) -> None:
        """Keeps and prints one."""
        self.taken.append(Sample(figure, program, number, value))
        print(f"round {number + 1}: {figure}: {program} {value:.3f}", flush=True)

    def of(self, figure: str, program: str) -> dict[int, float]:
        """By round."""
        return {s.round: s.value for s in self.taken if (s.figure, s.program) == (figure, program)}

    def median(self, figure: str, program: str) -> float:
        """Over the rounds. StatisticsError: there is no such sample."""
        return statistics.median(self.of(figure, program).values())

    def ratio(self, figure: str, program: str, other: str) -> tuple[float, float, float] | None:
        """The median, the smallest and the largest of program over other, pair by pair; None without a
        pair."""
        ours, theirs = self.of(figure, program), self.of(figure, other)
        pairs = [ours[n] / theirs[n] for n in ours.keys() & theirs.keys() if theirs[n]]
        return (statistics.median(pairs), min(pairs), max(pairs)) if pairs else None

    def report(self, program: str) -> str:
        """A table of medians, a line for each figure and program, with the ratio of `program` to each
        other."""
        rows = []
        for figure in dict.fromkeys(s.figure for s in self.taken):
            for name in dict.fromkeys(s.program for s in self.taken if s.figure == figure):
                found = None if name == program else self.ratio(figure, program, name)
                ratio = (
                    ["", ""] if found is None else [f"{found[0]:.2f}", f"{found[1]:.2f} to {found[2]:.2f}"]
                )
                rounds = str(len(self.of(figure, name)))
                rows.append([figure, name, f"{self.median(figure, name):.3f}", rounds, *ratio])
        return table(
            ["figure", "program", "median", "rounds", f"{program} / it", "smallest to largest"], rows
        )

    def save(self, path: Path | None, what: Mapping[str, Any]) -> None:
        """Writes `what` was measured, and every sample, as JSON; does nothing without a path."""
        if path is not None:
            document = {**what, "samples": [asdict(sample) for sample in self.taken]}
            path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
