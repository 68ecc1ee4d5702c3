"""Checkpoints: one interface to Hugging Face directories and GGUF files.

Tensors are read one at a time, as float32, by Hugging Face's names, so that a conversion never has a whole
model in memory."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any, Protocol

from ..arrays import F32
from ..errors import ModelFileError, Warn, ignore
from ..packing import Quantised
from .gguf_names import models_of


class Checkpoint(Protocol):
    """A model as its makers published it."""

    @property
    def path(self) -> Path: ...
    @property
    def config(self) -> dict[str, Any]:
        """`config.json` with Hugging Face's keys."""

    @property
    def names(self) -> Collection[str]:
        """Hugging Face names of all tensors."""

    @property
    def license(self) -> str | None: ...
    @property
    def chat_template(self) -> str | None: ...
    @property
    def special_tokens(self) -> dict[str, str | None]:
        """Spellings of special tokens by the names that templates use, such as bos_token, if the checkpoint
        has spellings rather than ids; None: the model has no such token."""

    def tensor(self, name: str) -> F32:
        """A tensor as float32. ModelFileError: it is missing, or its file is damaged. UnsupportedModelError:
        its type is not supported."""

    def type_of(self, name: str) -> str:
        """The type of a tensor in its file, by its format's name for it, such as BF16 or Q4_0."""

    def quantised(self, name: str) -> Quantised | None:
        """The quantised values of a matrix as in the file; None: its type has no groups of 32 with one
        scale."""

    def tokenizer_json(self) -> bytes | None:
        """A `tokenizer.json` for the `tokenizers` package; None if the checkpoint has no tokenizer."""


_SAFETENSORS = (".safetensors", ".safetensors.index.json")


def open_checkpoint(path: Path, warn: Warn = ignore) -> Checkpoint:
    """Opens a directory with config.json and safetensors, or a .gguf file, or a directory with one .gguf
    model. `warn` is called for each oddity, now or when a property is read.

    ModelFileError: it is neither, or damaged. UnsupportedModelError: the kind of checkpoint is not
    supported."""
    if path.is_dir():
        names = [file.name for file in path.iterdir()]
        found = models_of(names)
        if "config.json" in names and (not found or any(name.endswith(_SAFETENSORS) for name in names)):
            from .hugging_face import HuggingFaceCheckpoint

            return HuggingFaceCheckpoint(path, warn)
        if len(found) != 1:
            raise ModelFileError(f"{path} {_no_checkpoint(names, list(found))}")
        (parts,) = found.values()
        path /= next(name for name in parts if name in names)
    if not path.exists():
        raise ModelFileError(f"{path} is missing: check the path")
    if not path.is_file():
        raise ModelFileError(f"{path} is a pipe or a device: name a file or a directory")
    if path.name.endswith((*_SAFETENSORS, ".json")):
        raise ModelFileError(f"{path} is one file of a checkpoint: name the directory that it is in")
    from .gguf_checkpoint import GgufCheckpoint

    return GgufCheckpoint(path, warn)


def _no_checkpoint(names: list[str], models: list[str]) -> str:
    """Why a directory is not a checkpoint. The text continues a sentence whose subject is the directory."""
    if models:
        return f"has {len(models)} .gguf files ({', '.join(models)}): name one of them"
    if "adapter_config.json" in names:
        return "is an adapter (LoRA), not a whole model: merge it into its base model, and convert that"
    return (
        "has no config.json and 0 .gguf files: name a directory with config.json and *.safetensors, or one "
        ".gguf file"
    )
