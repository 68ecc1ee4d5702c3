"""python -m bench.lab LAB.toml MODEL [--streams 1,4] [--repeats 5]: our plan against the equal split;
python -m bench.lab clean: removes what a killed lab left behind. As root on Linux."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from shoal.engine.errors import ShoalError
from shoal.engine.model_directory import Model
from shoal.store import resolve

from . import ground
from .compare import Row, compare, render
from .lab import CONTEXT, Lab
from .spec import read_spec


def main(arguments: Sequence[str]) -> int:
    """Exit code 0 when the table was made."""
    if list(arguments) == ["clean"]:
        os.close(ground.locked())
        return 0
    parser = argparse.ArgumentParser(prog="python -m bench.lab", description=__doc__)
    parser.add_argument("lab", type=Path, help="a TOML file, such as bench/lab/phones.toml")
    parser.add_argument("model", help="a name from `shoal ls`, or a path")
    parser.add_argument("--streams", default="1,4", help="answers at a time (default 1,4)")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each, for the median (default 5)")
    parser.add_argument("--context", type=int, default=CONTEXT, help=f"positions (default {CONTEXT})")
    args = parser.parse_args(arguments)
    path, rows = resolve(args.model), list[Row]()
    streams = [int(count) for count in args.streams.split(",")]
    with Lab.open(read_spec(args.lab), path, context=args.context, sequences=max(streams)) as lab:
        for row in compare(lab, Model.open(path), streams, args.repeats, args.context):
            rows.append(row)
            print(
                f"{row.name}, {row.streams}: {row.measured:.2f} t/s, predicted {row.predicted:.2f}",
                file=sys.stderr,
            )
        print(render(rows))
        print(
            "| device | cap MB | peak MB by cgroup | peak MB resident | times at the cap |\n|-|-:|-:|-:|-:|"
        )
        for node in lab.nodes:
            peak, resident = node.peak_bytes() / 1e6, node.status("VmHWM") / 1e6
            print(f"| {node.spec.name} | {node.cap_mb} | {peak:.0f} | {resident:.0f} | {node.failcnt()} |")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ShoalError as error:
        sys.exit(f"bench.lab: {error}")
