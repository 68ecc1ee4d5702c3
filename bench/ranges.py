"""How long a stage takes to change its range of units, with the weights of both ranges loaded:

    python -m bench.ranges [MODEL] [-t THREADS] [-n CHANGES]

Medians: a stage of all layers gives up the last one and takes it back; keys and values of 1,000 positions of
that layer are exported and imported; and one step before and after all that, for comparison."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence

from shoal.engine.batch import Run, Want
from shoal.engine.model_directory import Model
from shoal.engine.stage import Stage, StageOptions
from shoal.store import resolve
from shoal.text_table import table

_POSITIONS = 1000


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.ranges", description=__doc__)
    parser.add_argument("model", nargs="?", default="smollm2-135m", help="(default smollm2-135m)")
    parser.add_argument("-t", "--threads", type=int, default=1, help="(default 1)")
    parser.add_argument("-n", "--changes", type=int, default=20, help="(default 20)")
    args = parser.parse_args(argv)
    model = Model.open(resolve(args.model))
    last = model.n_units - 1  # the LM head is in neither range
    layer, step = last - 1, [Run(0, _POSITIONS - 1, [1], Want.NOTHING)]
    found: dict[str, list[float]] = {}

    def clocked(what: str, call: Callable[[], object]) -> None:
        start = time.perf_counter()
        call()
        found.setdefault(what, []).append(time.perf_counter() - start)

    with Stage(model, 0, last, StageOptions(threads=args.threads, resident=True)) as stage:
        stage.open_sequence(0)
        for first in range(0, _POSITIONS, stage.options.max_rows):
            rows = min(stage.options.max_rows, _POSITIONS - first)
            stage.run([Run(0, first, [1] * rows, Want.NOTHING)])
        data = stage.export_positions(0, layer, 0, _POSITIONS)
        for _ in range(args.changes):
            clocked("a step before", lambda: stage.run(step))
            clocked("export", lambda: stage.export_positions(0, layer, 0, _POSITIONS))
            clocked("give up a layer", lambda: stage.set_range(0, layer))
            stage.load(layer, last)
            clocked("take it back", lambda: stage.set_range(0, last))
            clocked("import", lambda: stage.import_positions(0, layer, 0, _POSITIONS, data))
            clocked("a step after", lambda: stage.run(step))
    print(f"{len(data) / 1e6:.2f} MB are exported and imported")
    print(table(("what", "ms"), [(what, f"{1e3 * statistics.median(t):.2f}") for what, t in found.items()]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
