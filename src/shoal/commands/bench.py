"""`shoal bench`: tokens/s of a whole model on this device, with llama-bench's flags, table and field names.

Rows are `pp512` (a prompt of 512 tokens) and `tg128` (128 tokens, generated one by one), with `@ d2048` if
the context held 2048 tokens before. What the columns mean: docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING

from ..arguments import Commands, add_command, add_kernels, add_model, listed, positive, whole
from ..imports import quick_imports

if TYPE_CHECKING:
    from ..benchmark import Row

_COLUMNS = {
    "model": 20, "size": 10, "params": 8, "backend": 7, "isa": 6, "threads": 7, "batch": 5, "test": 13,
    "t/s": 17, "GB/s": 5, "read loop": 9, "of it": 5, "GMAC/s": 6, "dot loop": 8, "of that": 7, "load s": 6,
    "peak MB": 7,
}  # fmt: skip
"""Columns of the table, with their least width."""
_SAMPLES = ("samples_ns", "samples_ts")  # a CSV has no lists


def add_parser(commands: Commands) -> None:
    parser = add_command(
        commands,
        "bench",
        "measure tokens/s on this device",
        "Measures prompts (pp) and generated tokens (tg). N may be a list, except for -r: `-t 1,2` measures "
        "with one thread and then with two.",
    )
    add_model(parser)
    for flags, kind, default, text in (
        ("-p --n-prompt", whole, (512,), "prompt length in tokens; 0: none (default 512)"),
        ("-n --n-gen", whole, (128,), "tokens to generate, one by one; 0: none (default 128)"),
        ("-d --n-depth", whole, (0,), "tokens that are in the context before (default 0)"),
        ("-t --threads", positive, None, "threads to compute with (default: as `shoal run`)"),
        ("--batch", positive, (1,), "concurrent sequences that generate (default 1)"),
    ):
        parser.add_argument(*flags.split(), type=listed(kind), metavar="N", default=default, help=text)
    parser.add_argument(
        "-r",
        "--repetitions",
        type=positive,
        default=5,
        metavar="N",
        help="repetitions of each test (default 5)",
    )
    parser.add_argument(
        "-o",
        "--output",
        choices=("md", "json", "csv"),
        default="md",
        help="md: a table; json, csv: all figures (default md)",
    )
    add_kernels(parser.add_argument_group("engine"))


def run(args: argparse.Namespace) -> int:
    """Prints each row as soon as it is measured; JSON at the end."""
    with quick_imports():
        from ..benchmark import all_cases, check, measure
        from ..engine.backends import choose
        from ..engine.model_directory import Model
        from ..engine.threads import chosen
        from ..store import resolve

    path = resolve(args.model)
    threads = args.threads or (chosen(None, choose(args.backend)[0], args.isa)[0],)  # as `shoal run` does
    cases = all_cases(threads, args.n_depth, args.n_prompt, args.n_gen, args.batch)
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
    """The cells of a row of the table."""
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
    import csv

    from ..benchmark import Row

    names = [name for name in Row.__dataclass_fields__ if name not in _SAMPLES]
    writer = csv.DictWriter(sys.stdout, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow(asdict(row))
        sys.stdout.flush()
