"""Answers as the JSON of OpenAI's API, whole and in parts."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..engine.batch import Logprobs
from ..results import Completion
from ..token_bytes import TokenBytes


def new_id(prefix: str) -> str:
    """An id that no other object has."""
    return f"{prefix}_{secrets.token_hex(12)}"


@dataclass(frozen=True, slots=True)
class Head:
    """What every part of one reply begins with. `kind`: its id's prefix and its object's name."""

    kind: tuple[str, str]
    model: str
    fingerprint: str
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def part(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """A reply, or a part of it."""
        return {
            "id": f"{self.kind[0]}-{self.id}",
            "object": self.kind[1],
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
            **more,
        }


_PLACE = secrets.token_hex(16)


class Template:
    """The parts of a stream that differ in their text only: most of them, and one for each token. `place`
    goes where the text is to be."""

    place = _PLACE

    def __init__(self, part: dict[str, Any]) -> None:
        self._before, self._after = json.dumps(part).split(json.dumps(_PLACE))

    def filled(self, text: str) -> bytes:
        """The part with this text, as JSON."""
        return f"{self._before}{json.dumps(text)}{self._after}".encode()


def usage(made: Sequence[Completion], prompts: int, echoed: int = 0) -> dict[str, Any]:
    """The usage of answers to `prompts` prompts: each prompt counts once, however many answers it has.
    `echoed`: tokens of prompts that were only read."""
    each = max(1, len(made) // prompts)
    asked = echoed + sum(one.usage.prompt_tokens for one in made[::each])
    answered = sum(one.usage.completion_tokens for one in made)
    return {
        "prompt_tokens": asked,
        "completion_tokens": answered,
        "total_tokens": asked + answered,
        "prompt_tokens_details": {"cached_tokens": sum(one.usage.cached_tokens for one in made[::each])},
    }


def reason(made: Completion) -> str:
    """Why an answer has ended."""
    return "length" if made.finish_reason == "length" else "stop"


def chat_logprobs(
    token_bytes: TokenBytes, tokens: Sequence[int], found: Sequence[Logprobs], count: int
) -> dict[str, Any]:
    """Log-probabilities in the form of chats."""

    def shown(token: int, logprob: float) -> dict[str, Any]:
        return {
            "token": token_bytes.text(token),
            "logprob": _finite(logprob),
            "bytes": list(token_bytes.bytes(token)),
        }

    return {
        "content": [
            {
                **shown(token, one.drawn),
                "top_logprobs": [shown(*likely) for likely in one.likeliest[:count]],
            }
            for token, one in zip(tokens, found, strict=True)
        ],
        "refusal": None,
    }


def completion_logprobs(
    token_bytes: TokenBytes, tokens: Sequence[int], found: Sequence[Logprobs | None], offset: int
) -> dict[str, Any]:
    """Log-probabilities in the form of completions; None: nothing precedes the token. `offset`: the length of
    the text before the first token."""
    texts = [token_bytes.text(token) for token in tokens]
    offsets = []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    return {
        "tokens": texts,
        "token_logprobs": [None if one is None else _finite(one.drawn) for one in found],
        "top_logprobs": [
            None if one is None else {token_bytes.text(i): _finite(value) for i, value in one.likeliest}
            for one in found
        ],
        "text_offset": offsets,
    }


def _finite(logprob: float) -> float:
    """JSON has no infinity."""
    return max(logprob, -9999.0)
