"""`shoal export-c`: writes a model's tables as C source, for programs that use libshoal without Python."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..arguments import Commands, add_command, add_model, positive
from ..imports import quick_imports


def add_parser(commands: Commands) -> None:
    parser = add_command(
        commands,
        "export-c",
        "write a model as C source and weight files, for apps in C",
        "The directory gets model.c and model.h, the library's header shoal.h, and the model's files (hard "
        "links where the file system allows). docs/embedding-c.md explains how an app uses them.",
    )
    add_model(parser)
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="DIR",
        help="directory to write; it must not exist yet",
    )
    parser.add_argument(
        "--rows", type=positive, default=256, metavar="N", help="the most rows of one call (default 256)"
    )


def run(args: argparse.Namespace) -> int:
    """Prints the directory."""
    with quick_imports():
        from ..engine.export_c import export_c
        from ..engine.model_directory import Model
        from ..engine.stage import StageOptions
        from ..store import resolve

    export_c(Model.open(resolve(args.model)), args.output, StageOptions(max_rows=args.rows))
    print(args.output)
    return 0
