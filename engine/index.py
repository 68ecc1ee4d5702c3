"""`index.json` of a model directory: what the model is, which files hold it, and their hashes.

The parser is strict: unknown keys and values are refused, so that an old version never misreads a new
directory. The SHA-256 of the file's bytes is the model hash that nodes compare."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .errors import ModelFileError, UnsupportedModelError
from .kv_page import KV_TYPES
from .layout import GROUP, LAYOUT_VERSION
from .program import WeightType

FORMAT = "shoal-model"
FORMAT_VERSION = 1
INDEX = "index.json"
CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
CHAT_TEMPLATE = "chat_template.jinja"
SPECIAL_TOKENS = "special_tokens_map.json"
COMMON = "common.safetensors"
KV_DTYPES = {"int8": "f16", "int4": "f16", "f32": "f32"}
"""Type of keys and values, by type of weights."""
KEEP = "keep"
"""Asks a conversion for the types that hold the values of the file as they are."""

LOCAL = "local"
"""The `source` of a model that was converted from a local checkpoint. It is not a path, so that devices which
convert the same checkpoint write equal indexes."""

_MAX_INDEX = 16 << 20
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A file of the directory: its size in bytes, and its SHA-256 in hexadecimal."""

    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class UnitEntry:
    """A unit: its name and its files, its own file first. A tied LM head also lists the embedding's file."""

    name: str
    files: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Index:
    """The whole of index.json."""

    dtype: str
    family: str
    source: str
    license: str | None
    files: dict[str, FileEntry]
    common: tuple[str, ...]
    units: tuple[UnitEntry, ...]
    cut_dtype: str = "f32"
    kv_dtype: str = "f16"
    group_size: int = GROUP
    has_min: bool = False
    """Whether groups of int4 matrices have a minimum."""
    head_dtype: str | None = None
    """Type of the LM head, and of an embedding tied to it, if it differs from `dtype`. None is not written
    to the file."""
    format: str = FORMAT
    format_version: int = FORMAT_VERSION
    layout_version: int = LAYOUT_VERSION
    numerics_version: int = 1
    """See the function `numerics_version`."""

    def to_json(self) -> bytes:
        """The file's bytes. Equal directories give equal bytes, so that their hashes are equal."""
        values = asdict(self)
        if self.head_dtype is None:
            del values["head_dtype"]
        return (json.dumps(values, indent=1, sort_keys=True) + "\n").encode()

    @property
    def types(self) -> tuple[WeightType, WeightType]:
        """Types of the matrices and of the LM head."""
        names: dict[str, WeightType] = {
            "f32": "f32",
            "int8": "q8",
            "int4": "q4_min" if self.has_min else "q4",
        }
        return names[self.dtype], names[self.head_dtype or self.dtype]

    @property
    def weights(self) -> str:
        """The types for display, such as "int4 with minima, head int8"."""
        minima = " with minima" if self.has_min else ""
        head = f", head {self.head_dtype}" if self.head_dtype else ""
        return f"{self.dtype}{minima}{head}"


def numerics_version(kv_dtype: object) -> int:
    """The version of docs/numerics.md that a model with keys and values of this type depends on: the last one
    that changed its results. Version 2 changed int8 keys and values only, so model directories with other
    types stay valid with version 1."""
    return 2 if kv_dtype == "int8" else 1


def read_index(path: Path) -> tuple[Index, bytes]:
    """The index at `path` and the file's bytes. ModelFileError: unreadable or invalid. UnsupportedModelError:
    another format version."""
    try:
        if path.stat().st_size > _MAX_INDEX:
            raise ModelFileError(f"{path} is too large to be an index")
        data = path.read_bytes()
    except FileNotFoundError:
        raise ModelFileError(
            f"{path} is missing: {path.parent} is not a model directory; `shoal convert` makes one"
        ) from None
    except OSError as e:
        raise ModelFileError(f"{path} cannot be read: {e.strerror}") from e
    return parse_index(data, str(path)), data


def parse_index(data: bytes, where: str) -> Index:
    """The Index in the bytes of index.json; `where` names the file in errors. Errors: see `read_index`."""
    refuse = _Refuse(where)
    try:
        values = json.loads(data.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as e:
        raise refuse(f"is not valid JSON ({e})") from e
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise refuse("does not describe a shoal model")
    _check_versions(values, where)
    fields = Index.__dataclass_fields__
    for key in sorted((fields.keys() ^ values.keys()) - {"head_dtype"}):
        raise refuse(f"{'lacks' if key in fields else 'has the unknown key'} {key!r}")
    for key in ("dtype", "kv_dtype", "cut_dtype", "family", "source"):
        if not isinstance(values[key], str):
            raise refuse(f"has a value of {key!r} that is not a string")
    if values["dtype"] not in KV_DTYPES or values["kv_dtype"] not in KV_TYPES:
        raise refuse(f"has the unknown types {values['dtype']!r}, {values['kv_dtype']!r}")
    group = type(values["group_size"]) is int and values["group_size"] == GROUP
    minima = values["has_min"] is False or (values["has_min"] is True and values["dtype"] == "int4")
    head = "head_dtype" not in values or (values["dtype"] == "int4" and values["head_dtype"] == "int8")
    if values["cut_dtype"] != "f32" or not group or not minima or not head:
        raise refuse("describes weights that this version cannot read")
    if not isinstance(values["license"], str | None):
        raise refuse("has a value of 'license' that is neither a string nor null")
    files = _files(values["files"], refuse)
    index = Index(
        **{
            **values,
            "files": files,
            "common": _names(values["common"], files, refuse),
            "units": _units(values["units"], files, refuse),
        }
    )
    for name in (CONFIG, *index.common):
        if name not in files:
            raise refuse(f"does not list the file {name}")
    return index


class _Refuse:
    """Makes errors that name the index and the remedy."""

    def __init__(self, where: str) -> None:
        self.where = where

    def __call__(self, what: str) -> ModelFileError:
        return ModelFileError(f"{self.where} {what}: pull or convert the model again")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("duplicate key")
    return result


def _check_versions(values: dict[str, Any], where: str) -> None:
    known = {
        "format_version": FORMAT_VERSION,
        "layout_version": LAYOUT_VERSION,
        "numerics_version": numerics_version(values.get("kv_dtype")),
    }
    for key, version in known.items():
        if type(values.get(key)) is not int or values[key] != version:
            raise UnsupportedModelError(
                f"{where}: {key} is {values.get(key)!r}, and this version of shoal reads {version}: "
                "remove the model, and pull or convert it again with this version"
            )


def _files(value: object, refuse: _Refuse) -> dict[str, FileEntry]:
    if not isinstance(value, dict):
        raise refuse("has a value of 'files' that is not an object")
    files = {}
    for name, entry in value.items():
        if not _NAME.fullmatch(name) or name == INDEX:
            raise refuse(f"lists the file {name!r}, which is not a plain file name")
        if not isinstance(entry, dict) or set(entry) != {"size", "sha256"}:
            raise refuse(f"has an entry for {name} without exactly 'size' and 'sha256'")
        size, digest = entry["size"], entry["sha256"]
        if type(size) is not int or not 0 <= size < 1 << 62:
            raise refuse(f"has an invalid size for {name}, {size!r}")
        if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
            raise refuse(f"has an invalid sha256 for {name}")
        files[name] = FileEntry(size, digest)
    return files


def _names(value: object, files: dict[str, FileEntry], refuse: _Refuse) -> tuple[str, ...]:
    if not isinstance(value, list) or not value or not all(isinstance(name, str) for name in value):
        raise refuse("lacks a list of file names for a unit or for 'common'")
    for name in value:
        if name not in files:
            raise refuse(f"lists {name!r}, which is missing from its 'files'")
    return tuple(value)


def _units(value: object, files: dict[str, FileEntry], refuse: _Refuse) -> tuple[UnitEntry, ...]:
    if not isinstance(value, list):
        raise refuse("has a value of 'units' that is not a list")
    units = []
    for entry in value:
        if (
            not isinstance(entry, dict)
            or set(entry) != {"name", "files"}
            or not isinstance(entry["name"], str)
        ):
            raise refuse("has a unit without exactly 'name' and 'files'")
        units.append(UnitEntry(entry["name"], _names(entry["files"], files, refuse)))
    return tuple(units)
