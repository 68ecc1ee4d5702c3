"""`shoal ls`: the models on this device, and where they are kept."""

from __future__ import annotations

import argparse
import os
from contextlib import suppress
from pathlib import Path

from ..engine.errors import ShoalError
from ..engine.index import INDEX, LOCAL, Index, read_index
from ..origin import read_origin
from ..store import downloads_directory, models_directory, names
from ..text_table import table


def run(args: argparse.Namespace) -> int:
    """Prints the directory and a table."""
    print(f"models in {models_directory()}")
    rows = [_row(name) for name in names()]
    if rows:
        print(table(("name", "weights", "MB", "family", "origin", "license"), rows))
    else:
        print("none yet: `shoal pull smollm2-135m` fetches a small one")
    downloads = downloads_directory()
    if size := _size(downloads):
        print(f"checkpoints as fetched: {size / 1e6:.1f} MB in {downloads} (may be deleted)")
    return 0


def _size(directory: Path) -> int:
    """Bytes of the files in it, as far as they can be seen."""
    size = 0
    for folder, _, files in os.walk(directory):
        for file in files:
            with suppress(OSError):
                size += os.lstat(os.path.join(folder, file)).st_size
    return size


def _row(name: str) -> tuple[str, ...]:
    try:
        index, data = read_index(models_directory() / name / INDEX)
    except ShoalError as e:
        return name, "?", "", "", str(e), ""
    size = len(data) + sum(entry.size for entry in index.files.values())
    return name, index.dtype, f"{size / 1e6:.1f}", index.family, _origin(name, index), index.license or ""


def _origin(name: str, index: Index) -> str:
    """What the index says, which has the revision too; of a local checkpoint its path."""
    origin = read_origin(models_directory() / name, index)
    return index.source if origin is None or index.source != LOCAL else origin.where
