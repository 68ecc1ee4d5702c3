"""`shoal ls`: the models on this device, and where they are kept."""

from __future__ import annotations

import argparse
import os
from contextlib import suppress
from pathlib import Path

from ..arguments import Commands, add_command
from ..engine.errors import ShoalError

SHOWN = 12
"""Characters of the hash that names a fetched model."""


def add_parser(commands: Commands) -> None:
    add_command(
        commands,
        "ls",
        "list the models on this device",
        "Downloaded checkpoints are counted below the table. A model that other devices gave has the first "
        "characters of its hash for a name, and is marked as a part if files of layers are missing.",
    )


def run(args: argparse.Namespace) -> int:
    """Prints the directory of the models, and a table."""
    from ..held_files import fetched_models
    from ..store import downloads_directory, models_directory, names
    from ..text_table import table

    print(f"models in {models_directory()}")
    rows = [_row(models_directory() / name) for name in names()]
    rows += [_row(path, fetched=True) for path in fetched_models()]
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


def _row(path: Path, *, fetched: bool = False) -> tuple[str, ...]:
    from ..engine.index import INDEX, LOCAL, read_index
    from ..origin import read_origin

    name = path.name[:SHOWN] if fetched else path.name
    try:
        index, data = read_index(path / INDEX)
    except ShoalError as e:
        return name, "?", "", "", str(e), ""
    size = len(data) + sum(entry.size for entry in index.files.values())
    weights, here = index.dtype, f"{size / 1e6:.1f}"
    if fetched and any(not (path / file).exists() for unit in index.units for file in unit.files):
        found = sum(entry.size for file, entry in index.files.items() if (path / file).exists())
        weights, here = f"{weights}, part", f"{found / 1e6:.1f} of {here}"
    origin = read_origin(path, index)
    # The index names the revision too, but not the path of a local checkpoint.
    source = index.source if origin is None or index.source != LOCAL else origin.where
    return name, weights, here, index.family, source, index.license or ""
