"""`shoal convert`: a checkpoint into a model directory at a place of one's choice."""

from __future__ import annotations

import argparse

from ..engine.convert import convert
from ..engine.memory import return_large_frees
from ..progress import Progress


def run(args: argparse.Namespace) -> int:
    """Converts, with progress on standard error; prints the directory."""
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
