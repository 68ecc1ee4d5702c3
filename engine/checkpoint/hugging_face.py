"""A Hugging Face directory as a checkpoint: config.json, safetensors (one file, or several with an index),
tokenizer."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import F32
from ..errors import ModelFileError, UnsupportedModelError, Warn, ignore
from ..files import is_inside, parse_json, refuse_pointer
from ..packing import Quantised
from ..safetensors_file import SafetensorsFile, open_file
from . import hugging_face_chat
from .files import INDEX, SINGLE

_HEAD, _EMBEDDING, _PREFIX = "lm_head.weight", "model.embed_tokens.weight", "model."
_ROWS = 1024  # rows of a table that are compared at a time
_FLOATS = ("F64", "F32", "F16", "BF16")  # F64 is rounded to f32, as in transformers


class HuggingFaceCheckpoint:
    """A checkpoint in a Hugging Face directory; see `Checkpoint`."""

    def __init__(self, path: Path, warn: Warn = ignore) -> None:
        self.path, self._warn = path, warn
        self.config = _json_object(path / "config.json")
        _check_quantisation(path, self.config)
        # End tokens are often in generation_config.json only, or more of them than in config.json.
        generation = path / "generation_config.json"
        if generation.exists():
            eos = _json_object(generation).get("eos_token_id")
            self.config["eos_token_id"] = _joined(self.config.get("eos_token_id"), eos)
        stored = _stored(path, warn)
        self._stored = {_full_name(name, stored): (file, name) for name, file in stored.items()}
        if self.config.get("tie_word_embeddings") is True:
            self._settle_head()

    def _settle_head(self) -> None:
        """Resolves a tied LM head: the table may be stored under either name, or, contrary to config.json, as
        two different tables."""
        if _EMBEDDING not in self._stored and _HEAD in self._stored:
            self._stored[_EMBEDDING] = self._stored[_HEAD]
        elif _HEAD in self._stored and not self._equal(_HEAD, _EMBEDDING):
            self.config["tie_word_embeddings"] = False
            self._warn(
                f"{self.path}: config.json has tie_word_embeddings, but {_HEAD} differs from {_EMBEDDING}: "
                f"{_HEAD} is used, as by transformers; set tie_word_embeddings to false if that is right"
            )

    def _equal(self, one: str, other: str) -> bool:
        """Whether two matrices are stored with the same type and values."""
        (a, a_type), (b, b_type) = self._values(one), self._values(other)
        return (a.shape, a_type) == (b.shape, b_type) and all(
            np.array_equal(a[i : i + _ROWS], b[i : i + _ROWS]) for i in range(0, len(a), _ROWS)
        )

    @cached_property
    def names(self) -> frozenset[str]:
        return frozenset(self._stored)

    @property
    def license(self) -> str | None:
        """The license in the front matter of README.md."""
        try:
            head = (self.path / "README.md").read_text(encoding="utf-8", errors="replace")[:4096]
        except OSError:
            return None
        match = re.match(r"---\n(?:.*\n)*?license: *(\S+)\n", head)
        return match.group(1) if match else None

    @cached_property
    def chat_template(self) -> str | None:
        return hugging_face_chat.chat_template(self.path, _json_object, self._warn)

    @property
    def special_tokens(self) -> dict[str, str | None]:
        return hugging_face_chat.special_tokens(self.path, _json_object)

    def tensor(self, name: str) -> F32:
        values, dtype = self._values(name)
        if dtype not in _FLOATS:
            raise UnsupportedModelError(
                f"{self._where(name)} is {dtype}, which is not supported: fetch the model in F32, F16 or BF16"
            )
        if dtype == "BF16":  # the upper half of an f32
            return (values.astype(np.uint32) << 16).view(np.float32)
        with np.errstate(over="ignore"):
            rounded = values.astype(np.float32, copy=False)
        if dtype == "F64" and np.any(np.isinf(rounded) & np.isfinite(values)):
            raise UnsupportedModelError(
                f"{self._where(name)} is F64 with values beyond the range of f32, to which F64 is rounded"
            )
        return rounded

    def type_of(self, name: str) -> str:
        file, stored = self._stored[name]
        return file.tensors[stored].dtype

    def quantised(self, name: str) -> Quantised | None:
        return None

    def _values(self, name: str) -> tuple[NDArray[Any], str]:
        """A tensor in its stored type, and the name of the type."""
        if name not in self._stored:
            raise ModelFileError(f"{self.path}: no file has the tensor {name!r}: fetch the checkpoint again")
        file, stored = self._stored[name]
        return file.tensor(stored), file.tensors[stored].dtype

    def _where(self, name: str) -> str:
        file, stored = self._stored[name]
        return f"{file.path}: tensor {stored!r}"

    def tokenizer_json(self) -> bytes | None:
        return hugging_face_chat.tokenizer_json(self.path, self._warn)


def _check_quantisation(path: Path, config: Mapping[str, Any]) -> None:
    """UnsupportedModelError: the weights are in the format of a quantisation library for GPUs."""
    packed = config.get("quantization_config")
    if packed:
        method = packed.get("quant_method") if isinstance(packed, dict) else None
        raise UnsupportedModelError(
            f"{path}: its weights are quantised already ({method or packed!r} by quantization_config in "
            "config.json) and cannot be converted: use the original checkpoint, or a GGUF file"
        )


def shard_names(index: object, where: str) -> list[str]:
    """Names of the files that the index of a checkpoint lists. ModelFileError: it is not such an index, or a
    name is outside the checkpoint's directory."""
    weights = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weights, dict) or not weights:
        raise ModelFileError(f"{where} has no weight_map: fetch it again")
    for name, file in weights.items():
        if not is_inside(file) or not file.endswith(".safetensors"):
            raise ModelFileError(
                f"{where} has {name!r} in {file!r}, which is not the name of a .safetensors file"
            )
    return sorted(set(weights.values()))


def _stored(path: Path, warn: Warn) -> dict[str, SafetensorsFile]:
    """The file of each tensor, from the headers of the files; an index is only used for the files' names."""
    if (path / SINGLE).exists():
        file = _open(path / SINGLE)
        return dict.fromkeys(file.tensors, file)
    if not (path / INDEX).exists():
        raise ModelFileError(f"{path} has neither {SINGLE} nor {INDEX}{_instead(path)}")
    index = _json_object(path / INDEX)
    stored: dict[str, SafetensorsFile] = {}
    names = shard_names(index, str(path / INDEX))
    if missing := [name for name in names if not (path / name).exists()]:
        raise ModelFileError(
            f"{path / missing[0]} is missing ({len(missing)} of {len(names)} files are), which {INDEX} "
            "lists: fetch the missing files"
        )
    for name in names:
        file = _open(path / name)
        for tensor in file.tensors:
            if tensor in stored:
                raise ModelFileError(
                    f"{path}: the tensor {tensor!r} is in {stored[tensor].path.name} and in {name}: remove "
                    "the file that does not belong to the checkpoint from its index"
                )
            stored[tensor] = file
    listed = index["weight_map"]
    if absent := sorted(listed.keys() - stored.keys()):
        raise ModelFileError(
            f"{path / INDEX} has {absent[0]!r} in {listed[absent[0]]!r}, which does not have it "
            f"({len(absent)} such tensors in all): index and files are of different checkpoints; fetch one"
        )
    if unlisted := sorted(stored.keys() - listed.keys()):
        warn(
            f"{path / INDEX} does not list {unlisted[0]!r}, which {stored[unlisted[0]].path.name} has "
            f"({len(unlisted)} such tensors in all): it is used, as by transformers"
        )
    return stored


def _open(path: Path) -> SafetensorsFile:
    refuse_pointer(path)
    return open_file(path)


def _instead(path: Path) -> str:
    """The weights in other formats or under other names that a directory has instead, as the rest of an error
    message with a remedy."""
    names = sorted(file.name for file in path.iterdir())
    other = [name for name in names if name.endswith(".safetensors")]
    pickled = [name for name in names if name.endswith((".bin", ".pth", ".pt"))]
    if other:
        return f"; it has {', '.join(other)}: one file must be called {SINGLE}, and several need an index"
    if pickled:
        return f"; {pickled[0]} is a PyTorch file, which is not supported: save the model as safetensors"
    return ": fetch the checkpoint again"


def _full_name(name: str, names: Collection[str]) -> str:
    """The name of a tensor in a model with an LM head: with the prefix that tensors of a base model lack."""
    return _PREFIX + name if _EMBEDDING.removeprefix(_PREFIX) in names and name != _HEAD else name


def _json_object(path: Path) -> dict[str, Any]:
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise ModelFileError(f"{path} cannot be read as JSON: {e}") from e
    if not isinstance(value, dict):
        raise ModelFileError(f"{path} is not a JSON object")
    return value


def _joined(*values: object) -> list[object]:
    """Distinct token ids from ids and lists of ids."""
    ids: list[object] = []
    for value in values:
        ids += [i for i in (value if isinstance(value, list) else [value]) if i is not None and i not in ids]
    return ids
