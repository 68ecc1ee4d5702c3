"""What a call costs by its number of rows, against one of 8 rows:

    python -m bench.rows MODEL [--sets avx2,avx512] [-t 1,2] [-r 9] [--most 32]

`batch` is a decode step of so many sequences, each of which draws a token; `slice` is a part of a prompt, of
one sequence. All numbers of rows take turns, once in each of `-r` rounds; times are medians. With one thread
they are CPU time, so that other programs change little; with more they are the clock's. Below each table are
the ratios that have a bound, and the pair of neighbours that differs least: below 1, the larger one costs
less. That is noise where reading the weights is the limit (1 to 6 rows), and a fault elsewhere."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence

from shoal.engine.backends.native import isa_names
from shoal.engine.batch import Run, Sampling, Want
from shoal.engine.model_directory import Model
from shoal.engine.stage import Stage, StageOptions
from shoal.text_table import table

from .models import model_path

HEADER = ("rows", "batch ms", "a row", "of 8", "slice ms", "a row", "of 8")
BASE, LIMITS = 8, {9: 1.25, 16: 2.0}
"""The number of rows that others are compared with, and the most that some of them may take in proportion."""

Times = Mapping[int, float]
"""Seconds of a call by its number of rows."""


def batch(rows: int) -> list[Run]:
    """A row of each of so many sequences."""
    return [Run(sequence, 0, [1 + sequence], Want.TOKEN) for sequence in range(rows)]


def slice_of_prompt(rows: int) -> list[Run]:
    """So many rows of one sequence, of which no logits are wanted."""
    return [Run(0, 0, list(range(1, rows + 1)), Want.NOTHING)]


def measure(stage: Stage, work: Callable[[int], list[Run]], most: int, rounds: int) -> Times:
    """Median seconds of a call with 1 to `most` rows. A round before those that count warms up."""
    clock = time.thread_time if stage.threads == 1 else time.perf_counter
    taken: dict[int, list[float]] = {rows: [] for rows in range(1, most + 1)}
    for number in range(rounds + 1):
        for rows, times in taken.items():
            runs = work(rows)
            start = clock()
            stage.run(runs)
            if number:
                times.append(clock() - start)
    return {rows: statistics.median(times) for rows, times in taken.items()}


def lines(batches: Times, slices: Times) -> list[list[str]]:
    """Of the table."""
    result = []
    for rows in batches:
        line = [str(rows)]
        for times in (batches, slices):
            of_base = times[rows] / times[BASE]
            line += [f"{times[rows] * 1e3:.2f}", f"{times[rows] / rows * 1e3:.3f}", f"{of_base:.2f}"]
        result.append(line)
    return result


def verdict(name: str, times: Times) -> str:
    """The ratios that have a bound, and the least growth from one number of rows to the next."""
    ratios = [
        f"{rows} rows {times[rows] / times[BASE]:.2f} (at most {limit})" for rows, limit in LIMITS.items()
    ]
    least, rows = min((times[rows] / times[rows - 1], rows) for rows in times if rows > 1)
    return f"{name}: {', '.join(ratios)}; least growth {least:.2f}, to {rows} rows"


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a table for each set and number of threads."""
    parser = argparse.ArgumentParser(prog="python -m bench.rows", description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--sets", help="default: all of this CPU but scalar, which takes minutes")
    parser.add_argument(
        "-t", "--threads", default=[1, 2], type=lambda text: [int(n) for n in text.split(",")]
    )
    parser.add_argument("-r", "--rounds", type=int, default=9)
    parser.add_argument("--most", type=int, default=32, help="rows of the largest call (default 32)")
    args = parser.parse_args(argv)
    if args.most < max(LIMITS):
        parser.error(f"--most must be at least {max(LIMITS)}, which others are compared with")
    sets = args.sets.split(",") if args.sets else [name for name in isa_names() if name != "scalar"]
    model = Model.open(model_path(args.model))
    for name in sets:
        for threads in args.threads:
            options = StageOptions(backend="native", isa=name, threads=threads, max_rows=args.most)
            with Stage(model, 0, model.n_units, options) as stage:
                for sequence in range(args.most):
                    stage.open_sequence(sequence, Sampling(), args.most)
                batches, slices = (
                    measure(stage, work, args.most, args.rounds) for work in (batch, slice_of_prompt)
                )
            print(f"{args.model}, {name}, {threads} {'thread' if threads == 1 else 'threads'}\n")
            print(table(HEADER, lines(batches, slices)))
            print(f"\n{verdict('batch', batches)}\n{verdict('slice', slices)}\n", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
