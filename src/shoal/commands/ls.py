"""`shoal ls`: the models on this device, and where they are kept."""

from __future__ import annotations

import argparse
import os
from contextlib import suppress
from pathlib import Path

from ..arguments import Commands, add_command
from ..engine.errors import ShoalError


def add_parser(commands: Commands) -> None:
    add_command(
        commands,
        "ls",
        "list the models on this device",
        "Downloaded checkpoints are counted below the table.",
    )


def run(args: argparse.Namespace) -> int:
    """Prints the directory of the models, and a table."""
    from ..store import downloads_directory, models_directory, names
    from ..text_table import table

    print(f"models in {models_directory()}")
    rows = [_row(models_directory() / name) for name in names()]
    if rows:
        print(table(("name", "weights", "MB", "family", "origin", "license"), rows))
    else:
        print("none yet: `shoal pull smollm2-135m` downloads a small one")
    downloads = downloads_directory()
    if size := _size(downloads):
        print(f"downloaded checkpoints: {size / 1e6:.1f} MB in {downloads} (may be deleted)")
    return 0


def _size(directory: Path) -> int:
    """Bytes of the files in a directory, without those that cannot be seen."""
    size = 0
    for folder, _, files in os.walk(directory):
        for file in files:
            with suppress(OSError):
                size += os.lstat(os.path.join(folder, file)).st_size
    return size


def _row(path: Path) -> tuple[str, ...]:
    from ..engine.index import INDEX, LOCAL, read_index
    from ..origin import read_origin

    try:
        index, data = read_index(path / INDEX)
    except ShoalError as e:
        return path.name, "?", "", "", str(e), ""
    size = len(data) + sum(entry.size for entry in index.files.values())
    origin = read_origin(path, index)
    # The index names the revision too, but not the path of a local checkpoint.
    source = index.source if origin is None or index.source != LOCAL else origin.where
    return path.name, index.dtype, f"{size / 1e6:.1f}", index.family, source, index.license or ""
