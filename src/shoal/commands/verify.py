"""`shoal verify`: reads every file of a model again and compares its hash with the index."""

from __future__ import annotations

import argparse

from ..engine.model_directory import Model
from ..progress import Progress
from ..store import resolve


def run(args: argparse.Namespace) -> int:
    """Prints the number of good files. ModelFileError: the first that is not as the index says."""
    model = Model.open(resolve(args.model))
    total = sum(entry.size for entry in model.index.files.values())
    done = count = 0
    with Progress(f"verifying {model.path.name}") as bar:
        for _, size in model.verify():
            done, count = done + size, count + 1
            bar.update(done, total)
    print(f"{model.path}: all {count} files are as the index says; model hash {model.hash}")
    return 0
