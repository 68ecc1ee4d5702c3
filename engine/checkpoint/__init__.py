"""Other people's weight files: one interface over Hugging Face directories and GGUF files.

Tensors come one at a time, as float32, under Hugging Face's names, so that converting holds a few of them and
never a model."""

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
        """`config.json` in Hugging Face's spelling."""

    @property
    def names(self) -> Collection[str]:
        """Names of all tensors, in Hugging Face's spelling."""

    @property
    def license(self) -> str | None: ...
    @property
    def chat_template(self) -> str | None: ...
    @property
    def special_tokens(self) -> dict[str, str | None]:
        """Spellings of special tokens by the names that templates use, such as bos_token, where they are
        given by spelling and not by id; None: the model has no such token."""

    def tensor(self, name: str) -> F32:
        """A tensor as float32. ModelFileError: no such tensor, or its file is damaged."""

    def type_of(self, name: str) -> str:
        """The type in which the file holds a tensor, by the name that its format has for it: BF16, Q4_0."""

    def quantised(self, name: str) -> Quantised | None:
        """A matrix as the quantised values that the file holds; None: it holds no groups like ours."""

    def tokenizer_json(self) -> bytes | None:
        """A `tokenizer.json` for the `tokenizers` package; None when the checkpoint has no tokenizer."""


_SAFETENSORS = (".safetensors", ".safetensors.index.json")


def open_checkpoint(path: Path, warn: Warn = ignore) -> Checkpoint:
    """Opens a directory with config.json and safetensors, or a .gguf file (or a directory with one of
    those). `warn` is called with what is odd about it, here or when a property is read.

    ModelFileError: neither, or damaged. UnsupportedModelError: of a kind that is not here."""
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
        raise ModelFileError(f"{path} is missing")
    if path.name.endswith((*_SAFETENSORS, ".json")):
        raise ModelFileError(f"{path} is one file of a checkpoint: name the directory that it is in")
    from .gguf_checkpoint import GgufCheckpoint

    return GgufCheckpoint(path, warn)


def _no_checkpoint(names: list[str], models: list[str]) -> str:
    """Why a directory is not a checkpoint. The text continues a sentence whose subject is the directory."""
    if models:
        return f"has {len(models)} .gguf files ({', '.join(models)}): name one of them"
    if "adapter_config.json" in names:
        return "is an adapter (LoRA) and no whole model: merge it into its base model, and convert that"
    return (
        "has no config.json and 0 .gguf files: name a directory with config.json and *.safetensors, or one "
        ".gguf file"
    )
