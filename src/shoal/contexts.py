"""The context length for `shoal run`, on nodes or not, and `shoal plan`.

A length that was asked for is used, or is an error. Otherwise it is the model's length, or the largest whose
keys and values fit in RAM.
"""

from __future__ import annotations

from .engine.errors import ContextError
from .engine.host import Ram
from .engine.kv_page import page_bytes
from .engine.layout import PAGE
from .engine.model_directory import Model

_SHARE = 0.75
"""Share of the available RAM that may be used; other programs need some, too."""
_LEAST_SHARE = 0.25
"""Share for keys and values even if the weights fill the RAM: such weights are mapped and can be dropped."""


def context_of(given: int | None, model: Model) -> int:
    """The context length in tokens before RAM is considered. ContextError: the model's is smaller."""
    if given is not None and given > model.config.context:
        raise ContextError(
            f"--context {given} is more than the model's {model.config.context} tokens{model.config.limit}"
        )
    return model.config.context if given is None else given


def fitting(model: Model, most: int, ram: Ram) -> int:
    """The largest context length up to `most` whose keys and values fit in RAM beside all weights of the
    model, but at least one page."""
    if ram.estimate is None:
        return most
    page = sum(page_bytes(state, model.kv_dtype) for unit in model.program.units for state in unit.states)
    weights = sum(file.size for file in model.index.files.values())
    room = max(ram.estimate * _SHARE - weights, ram.estimate * _LEAST_SHARE)
    return min(most, max(1, int(room // page)) * PAGE)


def notice(context: int, most: int) -> str:
    """The message for the user about a context that is smaller than the model's."""
    return (
        f"shoal: the context is {context} tokens, the most that the RAM has room for (the model has {most}): "
        "--context N sets another"
    )
