"""`shoal verify`: compares every file of a model with the hash in its index."""

from __future__ import annotations

import argparse

from ..arguments import Commands, add_command, add_model
from ..imports import quick_imports


def add_parser(commands: Commands) -> None:
    add_model(add_command(commands, "verify", "check every file of a model against its SHA-256"))


def run(args: argparse.Namespace) -> int:
    """Prints the number of files. ModelFileError: a file differs from the index."""
    with quick_imports():
        from ..engine.model_directory import Model
        from ..progress import Progress
        from ..store import resolve

    model = Model.open(resolve(args.model))
    total = sum(entry.size for entry in model.index.files.values())
    done = count = 0
    with Progress(f"verifying {model.path.name}") as bar:
        for _, size in model.verify():
            done, count = done + size, count + 1
            bar.update(done, total)
    print(f"{model.path}: all {count} files match the index; model hash {model.hash}")
    return 0
