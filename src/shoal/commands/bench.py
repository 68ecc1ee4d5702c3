"""`shoal bench`: tokens/s of a whole model on this device, or over nodes, with llama-bench's flags, table and
field names.

Rows are `pp512` (a prompt of 512 tokens) and `tg128` (128 tokens, generated one by one), with `@ d2048` if
the context held 2048 tokens before. What the columns mean: docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, TypeVar

from ..arguments import (
    Commands,
    add_command,
    add_insecure,
    add_kernels,
    add_layers,
    add_model,
    add_nodes,
    check_nodes,
    listed,
    positive,
    whole,
)
from ..engine.errors import ShoalError
from ..imports import quick_imports

if TYPE_CHECKING:
    from ..benchmark import Case, Row
    from ..chain_benchmark import ChainRow
    from ..engine.model_directory import Model

_COLUMNS = {
    "model": 20, "size": 10, "params": 8, "backend": 7, "isa": 6, "threads": 7, "batch": 5, "test": 13,
    "t/s": 17, "GB/s": 5, "read loop": 9, "of it": 5, "GMAC/s": 6, "dot loop": 8, "of that": 7, "load s": 6,
    "peak MB": 7,
}  # fmt: skip
"""Columns of the table, with their least width."""
_CHAIN_COLUMNS = {
    "model": 20, "size": 10, "params": 8, "layers": 8, "batch": 5, "test": 13, "t/s": 17, "predicted": 9,
    "off by": 6, "lap ms": 7, "compute": 7, "wire": 6, "waiting": 7, "rows": 5, "open s": 6,
}  # fmt: skip
"""Columns of the table over nodes."""
_NO_CELLS = ("samples_ns", "samples_ts", "nodes")  # a CSV has no lists
AnyRow = TypeVar("AnyRow", "Row", "ChainRow")


def add_parser(commands: Commands) -> None:
    parser = add_command(
        commands,
        "bench",
        "measure tokens/s on this device, or over nodes",
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
    nodes = parser.add_argument_group("nodes")
    add_nodes(nodes, "measure a chain of these nodes (default: this device alone)")
    add_insecure(nodes)
    add_layers(nodes)


def run(args: argparse.Namespace) -> int:
    """Prints each row as soon as it is measured; JSON at the end."""
    with quick_imports():
        from ..benchmark import Row, all_cases, check, measure
        from ..engine.backends import choose
        from ..engine.model_directory import Model
        from ..engine.threads import chosen
        from ..store import resolve

    _check_options(args)
    path = resolve(args.model)
    model = Model.open(path)
    model.check_generates()
    if args.nodes:
        from ..chain_benchmark import ChainRow, check_chain

        cases = all_cases((1,), args.n_depth, args.n_prompt, args.n_gen, args.batch)
        check_chain(cases, model)
        _print(args, _over_nodes(args, model, cases), ChainRow, _CHAIN_COLUMNS, chain_cells)
    else:
        threads = args.threads or (chosen(None, choose(args.backend)[0], args.isa)[0],)  # as `shoal run` does
        cases = all_cases(threads, args.n_depth, args.n_prompt, args.n_gen, args.batch)
        check(cases, model)
        rows = measure(path, cases, args.repetitions, args.backend, args.isa, args.resident)
        _print(args, rows, Row, _COLUMNS, cells)
    return 0


def _check_options(args: argparse.Namespace) -> None:
    """ShoalError: options that contradict each other."""
    check_nodes(args.nodes)
    given = {
        "--threads": args.threads is not None,
        "--backend": args.backend != "auto",
        "--isa": args.isa != "auto",
        "--resident": args.resident is not None,
    }
    for flag, is_given in given.items():
        if args.nodes and is_given:
            raise ShoalError(f"{flag} does not go with --nodes, which compute: give it to `shoal node`")
    if args.layers and not args.nodes:
        raise ShoalError("--layers says how many layers each node has, so it needs --nodes")


def _over_nodes(args: argparse.Namespace, model: Model, cases: Sequence[Case]) -> Iterator[ChainRow]:
    """Rows of a chain for each number of concurrent sequences; its plan is printed on standard error."""
    from ..chain_benchmark import ChainBenchmark
    from ..plan_report import render

    for sequences in sorted({case.sequences for case in cases}):
        alike = [case for case in cases if case.sequences == sequences]
        chain = ChainBenchmark(model, alike, args.layers, insecure=args.insecure)
        for i, row in enumerate(chain.rows(args.nodes, args.repetitions)):
            if i == 0:
                print(render(chain.plan), file=sys.stderr, flush=True)
            yield row


def _print(
    args: argparse.Namespace,
    rows: Iterable[AnyRow],
    kind: type[AnyRow],
    columns: Mapping[str, int],
    cells: Callable[[AnyRow], tuple[str, ...]],
) -> None:
    if args.output == "json":
        print(json.dumps([asdict(row) for row in rows], indent=2))
    elif args.output == "csv":
        _print_csv(rows, kind)
    else:
        print(_line(columns, tuple(columns)))
        print("|" + "|".join("-" * (width + 1) + ":" for width in columns.values()) + "|", flush=True)
        for row in rows:
            print(_line(columns, cells(row)), flush=True)


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


def chain_cells(row: ChainRow) -> tuple[str, ...]:
    """The cells of a row of the table over nodes."""
    predicted, last = row.predicted_ts, len(row.nodes) - 1
    # The embedding is the first unit and the LM head the last one: they are no layers.
    layers = (n.last - n.first - (i == 0) - (i == last) for i, n in enumerate(row.nodes))
    return (
        row.model_type,
        f"{row.model_size / (1 << 20):.2f} MiB",
        f"{row.model_n_params / 1e6:.2f} M",
        "+".join(map(str, layers)),
        str(row.n_sequences),
        row.test,
        f"{row.avg_ts:.2f} ± {row.stddev_ts:.2f}",
        f"{predicted:.2f}" if predicted else "",
        f"{predicted / row.avg_ts - 1:+.0%}" if predicted else "",
        f"{row.lap_ns / 1e6:.2f}",
        f"{row.compute_ns / 1e6:.2f}",
        "" if row.wire_ns is None else f"{row.wire_ns / 1e6:.2f}",
        "" if row.waiting_ns is None else f"{row.waiting_ns / 1e6:.2f}",
        f"{max(node.rows_per_call for node in row.nodes):.1f}",
        f"{row.open_ns / 1e9:.2f}",
    )


def _line(columns: Mapping[str, int], texts: tuple[str, ...]) -> str:
    padded = (text.rjust(width) for text, width in zip(texts, columns.values(), strict=True))
    return f"| {' | '.join(padded)} |"


def _print_csv(rows: Iterable[AnyRow], kind: type[AnyRow]) -> None:
    import csv

    names = [name for name in kind.__dataclass_fields__ if name not in _NO_CELLS]
    writer = csv.DictWriter(sys.stdout, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow(asdict(row))
        sys.stdout.flush()
