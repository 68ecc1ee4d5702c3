"""Model families. Each module has `program(config) -> Program`, which builds the float program, and `GGUF`,
the names of its tensors in GGUF files. No code outside this package names a family. docs/architecture.md says
how to add one."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from ..checkpoint.gguf_names import GgufNames
from ..config import Config
from ..errors import UnsupportedModelError
from ..program import Program

_MODULES = {"llama": "llama", "mistral": "mistral", "qwen2": "qwen2", "qwen3": "qwen3"}
"""Modules by `model_type` of config.json, and by a GGUF file's architecture where the two are equal."""


def names() -> list[str]:
    """Names of the supported families, sorted."""
    return sorted(_MODULES)


def build(config: Config) -> Program:
    """The float program of a model.

    UnsupportedModelError: the family, or a feature of it, is not supported. ModelFileError: the configuration
    contradicts itself."""
    program: Program = _module(config.family, config.where).program(config)
    return program


def gguf_names(architecture: str, where: str) -> GgufNames:
    """The names of a family's tensors in GGUF files; `where` names the file in errors. UnsupportedModelError:
    the family is not supported."""
    spelling: GgufNames = _module(architecture, where).GGUF
    return spelling


def _module(family: str, where: str) -> Any:
    if family not in _MODULES:
        raise UnsupportedModelError(
            f"{where}: the model's family {family!r} is not supported; supported are {', '.join(names())}"
        )
    return import_module(f".{_MODULES[family]}", __name__)
