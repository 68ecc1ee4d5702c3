"""Who answers which request."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from .chats import chat
from .completions import completions
from .house import House
from .page import Page
from .responses import responses
from .served import Handler, Served

PAGE = "/"


def routes(served: Served, house: House) -> Mapping[tuple[str, str], Handler]:
    """The handlers by method and path."""
    return {
        ("GET", PAGE): Page().show,
        ("POST", "/v1/chat/completions"): partial(chat, served),
        ("POST", "/v1/completions"): partial(completions, served),
        ("POST", "/v1/responses"): partial(responses, served),
        ("POST", "/v1/embeddings"): served.embeddings,
        ("GET", "/v1/models"): served.models,
        **{("GET", f"/v1/models/{name}"): partial(served.one_model, name) for name in served.names},
        ("POST", "/tokenize"): served.tokenize,
        ("POST", "/detokenize"): served.detokenize,
        ("GET", "/health"): served.health,
        ("GET", "/metrics"): served.show_metrics,
        ("GET", "/house"): house.show,
        ("GET", "/house/events"): house.watch,
    }
