"""What each path of the API does with one model."""

from __future__ import annotations

import base64
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol, TypeVar

import numpy as np
import trio

from ..answering import Engine, Settings
from ..engine.batch import Want
from ..engine.chat import Chat
from ..engine.generate import check_text
from ..engine.model_directory import Model
from ..engine.tokenizer import Tokenizer
from ..grammars import GrammarError, LateGrammars, Masks
from ..readings import embedding
from ..token_bytes import TokenBytes
from .asking import Answers, Piece, Question, never, read
from .bodies import (
    Fields,
    Wanted,
    embedding_body,
    token_ids,
)
from .errors import ApiError, Obstacle
from .limiter import RequestLimiter
from .metrics import Metrics
from .tools import form_of

T = TypeVar("T")
Chunk = dict[str, Any]
PATIENCE_SECONDS = 20.0
"""How long a request that has no part of its response yet waits for devices that cannot answer."""
_LOOK_SECONDS = 2.0
"""How often it looks whether they can."""
_PLAN_LOOK_SECONDS = 0.1


@dataclass(slots=True)
class Call:
    """A request that has been let in."""

    client: str
    """Whose it is: the name of an API key, or an address."""
    body: Fields
    ending: trio.Event
    """Set when the server ends: a response that has no end of its own ends then."""
    trusted: bool = True
    """Whether it may know of the devices: it had a key, or needs none."""
    tokens: list[tuple[int, int]] = field(default_factory=list)
    """For the log: tokens of prompts and of their answers."""


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole response: JSON, or bytes of another type."""

    value: Any
    content_type: str = "application/json"
    headers: Sequence[tuple[str, str]] = ()
    """More headers. With an ETag, a client that has this already is told so."""
    status: int = 200


@dataclass(frozen=True, slots=True)
class Event:
    """A part of a stream as JSON, with a name of its own or without (None)."""

    name: str | None
    data: bytes


class Each(Protocol):
    """The type of `Answers.each`."""

    async def __call__(self, take: Callable[[Piece], object], full: Callable[[], bool] = ...) -> bool: ...


@dataclass(frozen=True, slots=True)
class Flow:
    """The parts of a stream for as long as answers go on: `parts` makes them of each of their pieces."""

    each: Each
    parts: Callable[[Piece], Iterable[Chunk | Event]]


Part = Chunk | Event | Flow | Reply
Handler = Callable[[Call], AsyncGenerator[Part, None]]
"""Yields one Reply, or the parts of a stream."""


class Served:
    """A model on an engine that stays open, with the names that requests may call it."""

    def __init__(
        self,
        engine: Engine,
        model: Model,
        context: Callable[[], int],
        names: Sequence[str],
        limiter: RequestLimiter,
        obstacle: Callable[[], Awaitable[Obstacle | None]],
    ) -> None:
        """`context()` is 0 before the first plan. `obstacle()` says why nothing can be answered.
        ModelFileError, MissingDependencyError: the model has no tokenizer, or a package is not there."""
        self.engine, self.model, self._context, self._obstacle = engine, model, context, obstacle
        self.names = tuple(names) or (model.path.name,)
        self.limiter = limiter
        self.tokenizer = Tokenizer.open(model.path)
        self.template = Chat.open(model.path, self.tokenizer)
        self.token_bytes = TokenBytes(self.tokenizer)
        self.calls = form_of(self.template.source or "")
        """How the model calls tools; None: it does not."""
        self.grammars = LateGrammars(model)
        self.created = int(time.time())
        self.fingerprint = f"shoal-{model.hash[:12]}"
        self._texts = trio.CapacityLimiter(1)
        """Limits /tokenize and /detokenize, which wait for no slot."""
        queue = limiter.queue
        self.metrics = Metrics(lambda: queue.used, lambda: len(queue.waiting))

    @property
    def context(self) -> int:
        """The context length in tokens; 0: there is no plan yet."""
        return self._context()

    async def patiently(self, wait: Callable[[], Awaitable[object]]) -> None:
        """Waits for something that the devices do, by a `wait` that may be cancelled and called again.
        ApiError: they cannot, and could not for PATIENCE_SECONDS."""
        could = trio.current_time()
        while True:
            with trio.move_on_after(min(_LOOK_SECONDS, PATIENCE_SECONDS)):
                await wait()
                return
            obstacle, now = await self._obstacle(), trio.current_time()
            if obstacle is None:
                could = now
            elif now - could >= PATIENCE_SECONDS:
                raise obstacle.error

    async def _planned(self) -> None:
        while not self.context:  # noqa: ASYNC110 (it changes in another thread)
            await trio.sleep(_PLAN_LOOK_SECONDS)

    # --- answers

    @asynccontextmanager
    async def turn(self, call: Call, slots: int) -> AsyncIterator[None]:
        """Waits for a plan and then for so many slots, which the block holds. All that takes time for a
        request belongs in there, also the tokens of its texts: a client that sends long ones has its share of
        that, too."""
        await self.patiently(self._planned)
        async with self.limiter.taken(call.client, slots, self.patiently):
            yield

    @asynccontextmanager
    async def answers(self, call: Call, questions: Sequence[Question]) -> AsyncIterator[Each]:
        """The pieces of answers to questions, once there is one: what goes wrong before is a response of its
        own. The caller has its turn."""
        async with Answers(self.engine, self.tokenizer, questions) as answers:
            await self.patiently(answers.arrived)

            async def each(take: Callable[[Piece], object], full: Callable[[], bool] = never) -> bool:
                def counted(piece: Piece) -> None:
                    if piece.made is not None:
                        self.metrics.answer(piece.made)
                        call.tokens.append((piece.made.usage.prompt_tokens, len(piece.made.tokens)))
                    take(piece)

                return await answers.each(counted, full)

            yield each

    async def questions(
        self,
        prompt: list[int],
        wanted: Wanted,
        schema: Mapping[str, Any] | None,
        grammar: str | None = None,
    ) -> list[Question]:
        """The questions for the answers to one prompt, with a seed each. `grammar`: what the answers must be,
        before the schema."""
        self.model.check_generates()
        masks: list[Masks] | list[None] = [None] * wanted.n
        if grammar is not None or schema is not None:
            masks = await trio.to_thread.run_sync(self._masks, schema, grammar, wanted.n)
        settings = Settings(
            self.context,
            wanted.sampling,
            wanted.max_tokens,
            self.model.config.eos,
            wanted.stops,
            self.model.config.vocab,
        )
        if any(token >= self.model.config.vocab for token, _ in wanted.sampling.bias):
            raise ApiError(400, "logit_bias has a token that the model does not know", param="logit_bias")
        made = []
        for i in range(wanted.n):
            sampling = replace(wanted.sampling, seed=(wanted.sampling.seed + i) % (1 << 64))
            one = replace(settings, sampling=sampling, allow=masks[i])
            made.append(Question(prompt, one, wanted.report))
        return made

    def _masks(self, schema: Mapping[str, Any] | None, grammar: str | None, count: int) -> list[Masks]:
        """The masks of answers to one prompt. ApiError: the schema or the grammar cannot be used."""
        grammars = self.grammars.get()
        try:
            first = grammars.masks(grammars.json(schema or {}) if grammar is None else grammar)
        except GrammarError as error:
            param = "response_format" if grammar is None else "tools"
            raise ApiError(400, str(error), param=param) from None
        return [first, *(first.copy() for _ in range(count - 1))]

    async def tokens(self, prompt: str | list[int]) -> list[int]:
        """The token ids of a prompt."""
        if isinstance(prompt, list):
            return prompt
        return await trio.to_thread.run_sync(self.tokenizer.encode, prompt)

    async def text(self, tokens: list[int]) -> str:
        """The text of tokens."""
        return await trio.to_thread.run_sync(self.tokenizer.decode, tokens)

    # --- the others

    async def embeddings(self, call: Call) -> AsyncGenerator[Chunk | Reply, None]:
        """POST /v1/embeddings."""
        asked = embedding_body(call.body)
        self.check_model(asked.model)
        make = partial(embedding, pooling="mean", normalize=True)
        async with self.turn(call, len(asked.inputs)):
            texts = [await self.tokens(text) for text in asked.inputs]
            for text in texts:
                check_text(text, self.context, self.model.config.vocab)
            whole = [(text, 0) for text in texts]
            found = await read(self.engine, whole, Want.ROWS, self.context, make, self.patiently)
        count = sum(map(len, texts))
        call.tokens.append((count, 0))
        data = [
            {"object": "embedding", "index": i, "embedding": _vector(one, asked.base64)}
            for i, one in enumerate(found)
        ]
        counted = {"prompt_tokens": count, "total_tokens": count}
        yield Reply({"object": "list", "data": data, "model": self.named(asked.model), "usage": counted})

    async def models(self, call: Call) -> AsyncGenerator[Chunk | Reply, None]:
        """GET /v1/models."""
        yield Reply({"object": "list", "data": [self._model(name) for name in self.names]})

    async def one_model(self, name: str, call: Call) -> AsyncGenerator[Chunk | Reply, None]:
        """GET /v1/models/NAME."""
        yield Reply(self._model(name))

    def _model(self, name: str) -> Chunk:
        return {
            "id": name,
            "object": "model",
            "created": self.created,
            "owned_by": "shoal",
            "context_length": self.context or None,
        }

    async def tokenize(self, call: Call) -> AsyncGenerator[Chunk | Reply, None]:
        """POST /tokenize: `content` or `prompt` to `tokens`, as llama-server and vLLM have it."""
        name = "prompt" if "prompt" in call.body else "content"
        text, special = (
            call.body.text(name),
            call.body.flag("add_special_tokens", call.body.flag("add_special")),
        )
        encode = partial(self.tokenizer.encode, text, special=special)
        tokens = await trio.to_thread.run_sync(encode, limiter=self._texts)
        yield Reply({"tokens": tokens, "count": len(tokens), "max_model_len": self.context or None})

    async def detokenize(self, call: Call) -> AsyncGenerator[Chunk | Reply, None]:
        """POST /detokenize: `tokens` to `content`."""
        tokens = token_ids(call.body, "tokens", call.body.get("tokens"))
        if tokens and max(tokens) >= self.tokenizer.size:
            call.body.wrong("tokens", "has an id that the tokenizer does not know")
        decode = partial(self.tokenizer.decode, tokens, skip_special=False)
        text = await trio.to_thread.run_sync(decode, limiter=self._texts)
        yield Reply({"content": text, "prompt": text})

    async def health(self, call: Call) -> AsyncGenerator[Chunk | Reply, None]:
        """GET /health: whether requests would be answered now."""
        obstacle = await self._obstacle()
        if obstacle is None:
            yield Reply({"status": "ok"})
            return
        shown = obstacle if call.trusted else replace(obstacle, reason=obstacle.phase)
        error = shown.error
        value = {"status": shown.phase, "reason": shown.reason, **error.body()}
        yield Reply(value, headers=error.headers, status=error.status)

    async def show_metrics(self, call: Call) -> AsyncGenerator[Chunk | Reply, None]:
        """GET /metrics."""
        kind, text = self.metrics.text()
        yield Reply(text, kind)

    def check_model(self, name: str | None) -> None:
        """ApiError: this is not the model."""
        if name is not None and name not in self.names:
            raise ApiError(
                404,
                f"there is no model {name!r} here, but {', '.join(self.names)}",
                param="model",
                code="model_not_found",
            )

    def named(self, name: str | None) -> str:
        """The name in replies to a request that named the model so."""
        return self.names[0] if name is None else name


def _vector(vector: Any, as_base64: bool) -> Any:
    if as_base64:
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return np.round(vector.astype(np.float64), 9).tolist()
