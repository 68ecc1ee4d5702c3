"""Model families: one module each, named as `model_type` in config.json, with `program(config, quantised) ->
Program`."""

from __future__ import annotations

import pkgutil
from importlib import import_module

from ..config import Config
from ..errors import UnsupportedModelError
from ..program import Program


def names() -> list[str]:
    """The families that there are, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def build(config: Config, *, quantised: bool) -> Program:
    """The program of a model. `quantised`: matmul inputs are int8, as int8 weights need.

    UnsupportedModelError: no such family, or a feature of it that we don't have.
    """
    if config.family not in names():
        raise UnsupportedModelError(
            f"the model's family is {config.family!r}, which shoal does not have; "
            f"it has: {', '.join(names())}"
        )
    program: Program = import_module(f".{config.family}", __name__).program(config, quantised=quantised)
    return program
