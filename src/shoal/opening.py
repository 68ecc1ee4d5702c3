"""Opens the engine of a `shoal.LLM` that computes elsewhere: on nodes, or on the head of this device."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

from .answering import Engine
from .engine.errors import ContextError, ShoalError, ignore
from .engine.model_directory import Model


def on_nodes(
    opening: ExitStack,
    model: Model,
    nodes: Sequence[tuple[str, int]],
    context: int,
    *,
    given: bool,
    share_prefixes: bool,
    insecure: bool,
    private: bool | None,
) -> tuple[Engine, int]:
    """An engine on these nodes, which `opening` closes, and its context length; unless the one that is asked
    for was `given`, it may be shorter. Errors as for open_nodes."""
    from .nodes import open_nodes
    from .planning import default_workload
    from .private import private_of

    workload = default_workload(context, given=given)
    engine = opening.enter_context(
        open_nodes(
            model,
            nodes,
            workload,
            shrink=not given,
            share_prefixes=share_prefixes,
            insecure=insecure,
            private=private_of(private),
            log=ignore,
        )
    )
    return engine, min(context, engine.context)


def on_head(opening: ExitStack, model: Model, context: int, *, given: bool) -> tuple[Engine, int]:
    """An engine on the head of this device, and on one that runs after it, as `on_nodes`. ShoalError: none
    runs, or it has another model. ContextError: its context is shorter than the one that was given."""
    from .local.reconnecting import connect_to_head

    head = connect_to_head()
    if head is None:
        raise ShoalError("no head runs on this device: start one with `shoal up`, or leave house=True out")
    opening.callback(head.close)
    welcome = head.welcome
    if welcome.hash != model.hash:
        raise ShoalError(f"the head on this device has the model {welcome.model}: open that one")
    most = welcome.context or context  # 0: it has no plan yet
    if given and context > most:
        raise ContextError(f"the head's context is {most} tokens: ask for at most so many")
    return head, min(context, most)


def addresses(nodes: Sequence[str]) -> list[tuple[str, int]]:
    """HOST:PORT each. ShoalError: one is not, or is there twice."""
    if not nodes:
        return []
    from argparse import ArgumentTypeError

    from .arguments import address, check_nodes

    try:
        found = [address(node) for node in nodes]
    except ArgumentTypeError as error:
        raise ShoalError(str(error)) from None
    check_nodes(found)
    return found
