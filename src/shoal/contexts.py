"""How many tokens of context are made room for: one rule for `shoal run`, on nodes or not, and `shoal plan`.

What was asked for is what it is, or an error. Where nobody asks it is the model's context, or, where the keys
and values of so many tokens do not fit the RAM, the most that do.
"""

from __future__ import annotations

from .engine.errors import ContextError
from .engine.host import Ram
from .engine.kv_page import page_bytes
from .engine.layout import PAGE
from .engine.model_directory import Model

_SHARE = 0.75
"""Of the available RAM: other programs want to grow, too."""
_LEAST_SHARE = 0.25
"""What keys and values may take beside weights that fill the RAM: those are mapped, and can be dropped."""


def context_of(given: int | None, model: Model) -> int:
    """The tokens of context to begin with. ContextError: more than the model has."""
    if given is not None and given > model.config.context:
        raise ContextError(
            f"--context {given} is more than the model's {model.config.context} tokens{model.config.limit}"
        )
    return model.config.context if given is None else given


def fitting(model: Model, most: int, ram: Ram) -> int:
    """The tokens of context, `most` or fewer, whose keys and values fit the RAM beside all weights of the
    model; a page of them at least."""
    if ram.estimate is None:
        return most
    page = sum(page_bytes(state, model.kv_dtype) for unit in model.program.units for state in unit.states)
    weights = sum(file.size for file in model.index.files.values())
    room = max(ram.estimate * _SHARE - weights, ram.estimate * _LEAST_SHARE)
    return min(most, max(1, int(room // page)) * PAGE)


def notice(context: int, most: int) -> str:
    """What a person is told of a context that is smaller than the model's."""
    return (
        f"shoal: the context is {context} tokens, the most that the RAM has room for (the model has {most}); "
        "--context N asks for another"
    )
