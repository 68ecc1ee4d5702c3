"""A Hugging Face model directory: config.json, safetensors (one file, or an index of several), tokenizer."""

from __future__ import annotations

import json
import re
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ModelFileError, UnsupportedModelError, Warn, ignore
from ..files import read_bytes, read_text
from ..safetensors_file import SafetensorsFile, open_file
from . import F32

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_FLOATS = ("F64", "F32", "F16", "BF16")  # F64 is rounded to f32, as transformers does
_ROWS = 1024  # rows of a table that are compared at once


class HuggingFaceCheckpoint:
    """See Checkpoint."""

    def __init__(self, path: Path, warn: Warn = ignore) -> None:
        self.path, self._warn = path, warn
        self.config = _json_object(path / "config.json")
        # The tokens that end an answer often stand in generation_config.json only, or there as a longer list.
        generation = path / "generation_config.json"
        if generation.exists():
            eos = _json_object(generation).get("eos_token_id")
            self.config["eos_token_id"] = _joined(self.config.get("eos_token_id"), eos)
        if "eos_token" in (self.chat_template or ""):  # the template's is the first of them
            self.config["eos_token_id"] = _joined(self._eos_token(), self.config.get("eos_token_id"))
        self._file_of = _weight_map(path)
        self._open: dict[str, SafetensorsFile] = {}
        if self.config.get("tie_word_embeddings") and self._has_own_head():
            self.config["tie_word_embeddings"] = False
            warn(
                f"{path}: config.json says tie_word_embeddings, and {_HEAD} differs from {_EMBEDDING}: "
                f"{_HEAD} is used, as by transformers; set tie_word_embeddings to false if that is right"
            )

    def _eos_token(self) -> int | None:
        """The id of the end token that tokenizer_config.json names."""
        settings, tokenizer = self.path / "tokenizer_config.json", self.path / "tokenizer.json"
        if not (settings.exists() and tokenizer.exists()):
            return None
        text = _json_object(settings).get("eos_token")
        text = text.get("content") if isinstance(text, dict) else text
        added = _json_object(tokenizer).get("added_tokens")
        tokens = [token for token in added if isinstance(token, dict)] if isinstance(added, list) else []
        ids = [token.get("id") for token in tokens if token.get("content") == text]
        return ids[0] if ids and type(ids[0]) is int else None

    def _has_own_head(self) -> bool:
        """Whether the files hold an LM head whose values are not those of the embedding."""
        if _HEAD not in self._file_of or _EMBEDDING not in self._file_of:
            return _HEAD in self._file_of
        (head, head_type), (table, table_type) = map(self._stored, (_HEAD, _EMBEDDING))
        if head.shape != table.shape or head.ndim != 2:
            return True
        rows = range(0, len(head), _ROWS)
        return head_type != table_type or any(
            not np.array_equal(head[i : i + _ROWS], table[i : i + _ROWS]) for i in rows
        )

    @cached_property
    def names(self) -> frozenset[str]:
        return frozenset(self._file_of)

    @property
    def license(self) -> str | None:
        """As the front matter of README.md says."""
        try:
            head = (self.path / "README.md").read_text(encoding="utf-8", errors="replace")[:4096]
        except OSError:
            return None
        match = re.match(r"---\n(?:.*\n)*?license: *(\S+)\n", head)
        return match.group(1) if match else None

    @property
    def chat_template(self) -> str | None:
        file = self.path / "chat_template.jinja"
        if file.exists():
            return read_text(file)
        settings = self.path / "tokenizer_config.json"
        template = _json_object(settings).get("chat_template") if settings.exists() else None
        if isinstance(template, list):  # several, by name
            named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
            template = named.get("default")
        return template if isinstance(template, str) else None

    def tensor(self, name: str) -> F32:
        values, dtype = self._stored(name)
        if dtype not in _FLOATS:
            raise UnsupportedModelError(
                f"{self.path / self._file_of[name]}: tensor {name!r} is {dtype}; {', '.join(_FLOATS)} can be "
                "converted"
            )
        if dtype == "BF16":  # the upper half of an f32
            return (values.astype(np.uint32) << 16).view(np.float32)
        with np.errstate(over="ignore"):
            rounded = values.astype(np.float32, copy=False)
        if dtype == "F64" and np.any(np.isinf(rounded) & np.isfinite(values)):
            raise UnsupportedModelError(
                f"{self.path / self._file_of[name]}: tensor {name!r} is F64 with values beyond the range of "
                "f32, to which F64 is rounded"
            )
        return rounded

    def _stored(self, name: str) -> tuple[NDArray[Any], str]:
        """A tensor as its file holds it, and its type."""
        file = self._file(name)
        values = file.tensor(name)
        return values, file.tensors[name].dtype

    def tokenizer_json(self) -> bytes | None:
        file = self.path / "tokenizer.json"
        return read_bytes(file) if file.exists() else None

    def _file(self, name: str) -> SafetensorsFile:
        file = self._file_of.get(name)
        if file is None:
            raise ModelFileError(
                f"{self.path}: no file holds the tensor {name!r}; fetch the checkpoint again"
            )
        if file not in self._open:
            self._open[file] = open_file(self.path / file)
        return self._open[file]


def _weight_map(path: Path) -> dict[str, str]:
    """File of each tensor."""
    if (path / _SINGLE).exists():
        return dict.fromkeys(open_file(path / _SINGLE).tensors, _SINGLE)
    if not (path / _INDEX).exists():
        raise ModelFileError(f"{path} has neither {_SINGLE} nor {_INDEX}: fetch the checkpoint again")
    weights = _json_object(path / _INDEX).get("weight_map")
    if not isinstance(weights, dict) or not weights:
        raise ModelFileError(f"{path / _INDEX} has no weight_map")
    for name, file in weights.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise ModelFileError(f"{path / _INDEX} puts {name!r} in {file!r}, which is no file name")
    return weights


def _json_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise ModelFileError(f"{path} cannot be read as JSON: {e}") from e
    if not isinstance(value, dict):
        raise ModelFileError(f"{path} must hold a JSON object")
    return value


def _joined(*values: object) -> list[object]:
    """Token ids out of ids and lists of ids, each once."""
    ids: list[object] = []
    for value in values:
        ids += [i for i in (value if isinstance(value, list) else [value]) if i is not None and i not in ids]
    return ids
