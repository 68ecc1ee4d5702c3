"""What a decode step costs at other depths and for more sequences, against one of the first case:

    python -m bench.turns MODEL [--depths 0,2048] [--batch 1] [--threads 1,2] [--seconds 10]

All cases take turns in one process, a few steps each, and each round gives a ratio to the first case: what
neighbours on the same machine take changes within seconds, and is in all of a round alike. `shoal bench`
measures one case after the other."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence

import numpy as np

from shoal.engine.batch import Run, Sampling, Want
from shoal.engine.generate import prompt_runs
from shoal.engine.model_directory import Model
from shoal.engine.stage import Stage, StageOptions
from shoal.text_table import table

from .models import model_path

STEPS, WARM = 16, 2  # of a turn; the first ones find the caches as another case left them
Case = tuple[int, int]
"""Depth, and sequences of a step."""


class _Turn:
    """Sequences of a case, filled to its depth."""

    def __init__(self, stage: Stage, case: Case, first: int, rng: np.random.Generator) -> None:
        depth, self.count = case
        self._stage, self._first, self._depth = stage, first, depth
        self._tokens = [int(t) for t in rng.integers(0, stage.model.program.vocab, max(depth, STEPS))]
        for sequence in range(first, first + self.count):
            stage.open_sequence(sequence, Sampling(), depth + STEPS)
            for run in prompt_runs(sequence, 0, self._tokens[:depth], stage.options.max_rows):
                stage.run([run])

    def seconds(self) -> float:
        """Of a step, the mean of a turn's."""
        for step in range(STEPS):
            if step == WARM:
                start = time.perf_counter()
            sequences = range(self._first, self._first + self.count)
            token = [self._tokens[step]]
            self._stage.run([Run(s, self._depth + step, token, Want.TOKEN) for s in sequences])
        return (time.perf_counter() - start) / (STEPS - WARM)


def compare(stage: Stage, cases: Sequence[Case], seconds: float) -> list[list[float]]:
    """Seconds of a step of each case, round by round, for about so long and at least 3 rounds."""
    rng, turns = np.random.default_rng(0), list[_Turn]()
    for case in cases:
        turns.append(_Turn(stage, case, sum(turn.count for turn in turns), rng))
    rounds: list[list[float]] = []
    until = time.perf_counter() + seconds
    while len(rounds) < 3 or time.perf_counter() < until:
        rounds.append([turn.seconds() for turn in turns])
    return rounds


def rows(cases: Sequence[Case], threads: int, rounds: Sequence[Sequence[float]]) -> list[list[str]]:
    """Lines of the table: medians, and ratios to the first case with their quartiles."""
    lines = []
    for i, (depth, count) in enumerate(cases):
        ratios = [each[i] / each[0] for each in rounds]
        low, middle, high = statistics.quantiles(ratios, n=4)
        step = statistics.median(each[i] for each in rounds)
        lines.append(
            [
                str(threads),
                str(depth),
                str(count),
                f"{step * 1e3:.2f}",
                f"{count / step:.1f}",
                f"{middle:.2f} ({low:.2f} to {high:.2f})",
                f"{1 / middle:.2f}",
                str(len(rounds)),
            ]
        )
    return lines


HEADER = [
    "threads",
    "depth",
    "sequences",
    "ms/step",
    "tokens/s",
    "cost of the first",
    "speed of it",
    "rounds",
]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("model")
    for name, default in (("--depths", "0,2048"), ("--batch", "1"), ("--threads", "1,2")):
        parser.add_argument(name, default=default, type=lambda text: [int(n) for n in text.split(",")])
    parser.add_argument("--seconds", type=float, default=10.0)
    args = parser.parse_args()
    model = Model.open(model_path(args.model))
    cases = [(depth, count) for depth in args.depths for count in args.batch]
    lines = []
    for threads in args.threads:
        with Stage(model, 0, model.n_units, StageOptions(threads=threads)) as stage:
            print(f"{args.model}, {threads} threads: {stage.backend}", file=sys.stderr)
            lines += rows(cases, threads, compare(stage, cases, args.seconds))
    print(table(HEADER, lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
