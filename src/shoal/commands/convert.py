"""`shoal convert`: converts a checkpoint to a model directory in a place of the user's choice."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..arguments import Commands, add_command, add_types
from ..imports import quick_imports


def add_parser(commands: Commands) -> None:
    parser = add_command(
        commands,
        "convert",
        "convert a checkpoint to a model directory",
        "`shoal pull PATH` does the same, and keeps the model under a name.",
    )
    parser.add_argument(
        "source",
        metavar="SRC",
        type=Path,
        help="directory with config.json and *.safetensors, or a .gguf file",
    )
    parser.add_argument(
        "destination", metavar="DST", type=Path, help="model directory to write; it must not exist yet"
    )
    add_types(parser)
    parser.add_argument(
        "--no-equalise",
        dest="equalise",
        action="store_false",
        help="with int8 and int4: do not balance the channels before rounding (a little less exact)",
    )


def run(args: argparse.Namespace) -> int:
    """Converts, with progress on standard error; prints the directory."""
    with quick_imports():
        from ..engine.convert import convert
        from ..engine.memory import return_large_frees
        from ..progress import Progress

    return_large_frees()
    with Progress(f"converting {args.source.name}", unit="units") as bar:
        convert(
            args.source,
            args.destination,
            dtype=args.dtype,
            head_dtype=args.head_dtype,
            has_min=args.has_min,
            kv_dtype=args.kv_dtype,
            equalise=args.equalise,
            progress=bar.update,
            warn=bar.warn,
        )
    print(args.destination)
    return 0
