"""Model families: one module each, with `program(config) -> Program`, in floats, and with `GGUF`, how GGUF
files spell it. Nothing outside this folder names a family. docs/architecture.md says how to add one."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from ..checkpoint.gguf_names import GgufNames
from ..config import Config
from ..errors import UnsupportedModelError
from ..program import Program

_MODULES = {"llama": "llama", "mistral": "mistral", "qwen2": "qwen2", "qwen3": "qwen3"}
"""By `model_type` of config.json, the module; by architecture of a GGUF file too, where they are equal."""


def names() -> list[str]:
    """The families that there are, sorted."""
    return sorted(_MODULES)


def build(config: Config) -> Program:
    """The program of a model, in floats.

    UnsupportedModelError: no such family, or a feature of it that is not here. ModelFileError: the
    configuration contradicts itself."""
    program: Program = _module(config.family, config.where).program(config)
    return program


def gguf_names(architecture: str, where: str) -> GgufNames:
    """How the tensors of a GGUF file are called; `where` names the file. UnsupportedModelError: no such
    family."""
    spelling: GgufNames = _module(architecture, where).GGUF
    return spelling


def _module(family: str, where: str) -> Any:
    if family not in _MODULES:
        raise UnsupportedModelError(
            f"{where}: the model's family is {family!r}, which shoal does not have; "
            f"it has: {', '.join(names())}"
        )
    return import_module(f".{_MODULES[family]}", __name__)
