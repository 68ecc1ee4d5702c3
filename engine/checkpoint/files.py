"""Lists the files of a checkpoint: those that the readers of this package may open."""

from __future__ import annotations

import json
from pathlib import Path

from ..files import is_inside
from .gguf_names import models_of, part_names

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
BESIDE_WEIGHTS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "README.md",
    INDEX,
)
"""Patterns of the files of a Hugging Face directory other than weights."""


def checkpoint_files(path: Path) -> dict[str, Path]:
    """The existing files of the checkpoint at `path`: by name in a directory, by part number in a GGUF
    checkpoint."""
    if not path.is_dir():
        return _parts(path.parent, path.name)
    names = [file.name for file in path.iterdir()]
    weights = [SINGLE] if SINGLE in names else _shards(path / INDEX)
    weights = weights or [name for name in names if name.endswith(".safetensors")]
    models = models_of(names)
    if not weights and len(models) == 1:
        return _parts(path, next(iter(models)))
    beside = [file for pattern in BESIDE_WEIGHTS for file in path.glob(pattern)]
    found = [*beside, *(path / name for name in weights)]
    return {str(file.relative_to(path)): file for file in sorted(found) if file.is_file()}


def _parts(directory: Path, name: str) -> dict[str, Path]:
    parts = enumerate(part_names(name))
    return {str(number): directory / part for number, part in parts if (directory / part).is_file()}


def _shards(index: Path) -> list[str]:
    """Names of the files that an index lists; empty if it is damaged, which a reader reports."""
    try:
        listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return []
    return sorted({name for name in listed if is_inside(name)})
