"""`shoal bench`: tokens/s of a whole model on this device, with llama-bench's flags, table and field names.

Rows are `pp512` (a prompt of 512 tokens) and `tg128` (128 tokens, one by one), `@ d2048` when the context
held 2048 tokens before. What the columns mean: docs/performance.md.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Iterable
from dataclasses import asdict

from ..benchmark import Row, check, measure, plan
from ..engine.backends import choose
from ..engine.model_directory import Model
from ..engine.threads import chosen
from ..store import resolve

# Heads of the table and the least width of their columns.
_COLUMNS = {
    "model": 20,
    "size": 10,
    "params": 8,
    "backend": 7,
    "isa": 6,
    "threads": 7,
    "batch": 5,
    "test": 13,
    "t/s": 17,
    "GB/s": 5,
    "read loop": 9,
    "of it": 5,
    "GMAC/s": 6,
    "dot loop": 8,
    "of that": 7,
    "load s": 6,
    "peak MB": 7,
}
_SAMPLES = ("samples_ns", "samples_ts")  # a CSV has no lists


def run(args: argparse.Namespace) -> int:
    """Prints each row as soon as it is measured; JSON in the end."""
    path = resolve(args.model)
    threads = args.threads or (chosen(None, choose(args.backend)[0], args.isa)[0],)  # as `shoal run` takes
    cases = plan(threads, args.n_depth, args.n_prompt, args.n_gen, args.batch)
    check(cases, Model.open(path))
    rows = measure(path, cases, args.repetitions, args.backend, args.isa, args.resident)
    if args.output == "json":
        print(json.dumps([asdict(row) for row in rows], indent=2))
    elif args.output == "csv":
        _print_csv(rows)
    else:
        print(_line(tuple(_COLUMNS)))
        print("|" + "|".join("-" * (width + 1) + ":" for width in _COLUMNS.values()) + "|", flush=True)
        for row in rows:
            print(_line(cells(row)), flush=True)
    return 0


def cells(row: Row) -> tuple[str, ...]:
    """The row as the table shows it, in the order of its columns."""
    read, loop, peak = row.read_bytes_per_s, row.loop_bytes_per_s, row.peak_macs_per_s
    return (
        row.model_type,
        f"{row.model_size / (1 << 20):.2f} MiB",
        f"{row.model_n_params / 1e6:.2f} M",
        row.backends,
        row.isa,
        str(row.n_threads),
        str(row.n_sequences),
        row.test,
        f"{row.avg_ts:.2f} ± {row.stddev_ts:.2f}",
        f"{read / 1e9:.1f}" if read else "",
        f"{loop / 1e9:.1f}" if loop else "",
        f"{read / loop:.0%}" if read and loop else "",
        f"{row.macs_per_s / 1e9:.1f}",
        f"{peak / 1e9:.1f}" if peak else "",
        f"{row.macs_per_s / peak:.0%}" if peak else "",
        f"{row.load_ns / 1e9:.2f}",
        f"{row.peak_rss / 1e6:.0f}",
    )


def _line(texts: tuple[str, ...]) -> str:
    padded = (text.rjust(width) for text, width in zip(texts, _COLUMNS.values(), strict=True))
    return f"| {' | '.join(padded)} |"


def _print_csv(rows: Iterable[Row]) -> None:
    names = [name for name in Row.__dataclass_fields__ if name not in _SAMPLES]
    writer = csv.DictWriter(sys.stdout, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow(asdict(row))
        sys.stdout.flush()
