"""Where the time of a step and of a prompt goes, operation by operation:

    python -m bench.ops MODEL [-p 512] [-d 0,2048] [-t 1,2] [-r 30]

Medians over `-r` decode steps at each depth, and over a fifth as many prompts. Of matmuls it gives what they
read and multiply a second and how much of the dot loop's rate that is (csrc/peak.c), of attention what it
reads of keys and values."""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from shoal.engine.batch import Run, Sampling, Want
from shoal.engine.generate import prompt_runs
from shoal.engine.kv_page import page_bytes
from shoal.engine.layout import PAGE
from shoal.engine.model_directory import Model
from shoal.engine.program import Attend, Matmul
from shoal.engine.stage import Stage, StageOptions
from shoal.peaks import arrays_of, peaks_of
from shoal.text_table import table

from .models import model_path

HEADER = ("threads", "work", "operation", "ms", "of all", "GB/s", "GMAC/s", "of the dot loop")


class Clocked:
    """A stage whose operations are timed, a sum for each name."""

    def __init__(self, stage: Stage, model: Model) -> None:
        self.stage, self.model = stage, model
        self.names = [_name(op) for _, op in stage.bound.ops]
        self._taken = stage.clock_ops()

    def run(self, runs: Sequence[Run]) -> dict[str, float]:
        """Seconds of each operation over some runs, one after the other."""
        total: NDArray[np.float64] = np.zeros(len(self.names))
        for run in runs:
            self.stage.run([run])
            total += self._taken
        return {name: sum(total[[n == name for n in self.names]]) / 1e9 for name in dict.fromkeys(self.names)}

    def weights(self, name: str) -> tuple[int, int]:
        """(bytes, numbers) of the weights of all operations of that name."""
        weights = [
            self.stage.bound.weights[unit, weight]
            for unit, op in self.stage.bound.ops
            if isinstance(op, Matmul) and _name(op) == name
            for weight in op.weights
        ]
        return sum(array.nbytes for array in arrays_of(weights)), sum(w.rows * w.cols for w in weights)


def _name(op: object) -> str:
    kind = type(op).__name__.lower()
    if not isinstance(op, Matmul):
        return kind
    return f"{kind} {', '.join(weight.removesuffix('.weight') for weight in op.weights)}"


Samples = Sequence[dict[str, float]]


def lines(
    clocked: Clocked, work: str, samples: Samples, rows: int, depth: int, peak: float | None
) -> list[list[str]]:
    """Of the table, for work that is a step at `depth` or a prompt of `rows` tokens; slowest first."""
    medians = {name: statistics.median(sample[name] for sample in samples) for name in samples[0]}
    everything = sum(medians.values())
    states = [state for _, state in clocked.stage.bound.states]
    result = []
    for name, seconds in sorted(medians.items(), key=lambda item: -item[1]):
        read = macs = 0.0
        if name.startswith(Matmul.__name__.lower()):
            read, numbers = clocked.weights(name)
            last = _name(clocked.stage.bound.ops[-2][1]) == name  # logits, which only the last row wants
            macs = numbers * (1 if last else rows)
        elif name == Attend.__name__.lower() and rows == 1:
            per_page = sum(page_bytes(state, clocked.model.kv_dtype) for state in states)
            read = per_page * (depth + 1) / PAGE
        columns = [f"{seconds * 1e3:.3f}", f"{seconds / everything:.0%}"]
        columns += [f"{read / seconds / 1e9:.1f}" if read and rows == 1 else ""]
        columns += [f"{macs / seconds / 1e9:.0f}" if macs and rows > 1 else ""]
        columns += [f"{macs / seconds / peak:.0%}" if macs and rows > 1 and peak else ""]
        result.append([str(clocked.stage.threads), work, name, *columns])
    return result


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.ops", description=__doc__)
    parser.add_argument("model")
    parser.add_argument("-p", "--prompt", type=int, default=512, help="tokens; 0: none (default 512)")
    for flags, default in ((("-d", "--depths"), "0,2048"), (("-t", "--threads"), "1,2")):
        parser.add_argument(*flags, default=default, type=lambda text: [int(n) for n in text.split(",")])
    parser.add_argument("-r", "--repetitions", type=int, default=30)
    args = parser.parse_args(argv)
    model = Model.open(model_path(args.model))
    rng, found = np.random.default_rng(0), list[list[str]]()
    tokens = [int(t) for t in rng.integers(0, model.program.vocab, max(args.prompt, *args.depths, 1))]
    for threads in args.threads:
        with Stage(model, 0, model.n_units, StageOptions(threads=threads)) as stage, peaks_of(stage) as peaks:
            clocked, most = Clocked(stage, model), stage.options.max_rows
            for depth in args.depths:
                stage.open_sequence(0, Sampling(), depth + 1)
                for run in prompt_runs(0, 0, tokens[:depth], most):
                    stage.run([run])
                step = Run(0, depth, tokens[:1], Want.TOKEN)
                samples = [clocked.run([step]) for _ in range(args.repetitions)]
                found += lines(clocked, f"tg @ d{depth}", samples, 1, depth, None)
                stage.close_sequence(0)
            samples = []
            for _ in range(max(args.repetitions // 5, 1) if args.prompt else 0):
                stage.open_sequence(0, Sampling(), args.prompt)
                samples.append(clocked.run(list(prompt_runs(0, 0, tokens[: args.prompt], most))))
                stage.close_sequence(0)
            if samples:
                found += lines(clocked, f"pp{args.prompt}", samples, args.prompt, 0, peaks.macs_per_s())
    print(table(HEADER, found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
