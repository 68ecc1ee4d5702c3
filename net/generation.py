"""One answer in the making, as the head sees it: pure bookkeeping of what was sent, and what came back.

The head keeps the token ids. So when an epoch ends under an answer, recovery is no path of its own: under the
next epoch everything known is sent again as a prompt, and the answer goes on with the same token, since a
draw depends on history, parameters and position alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from ..engine.batch import Sampling, Want
from ..engine.errors import ContextError
from .errors import RemoteProtocolError
from .messages import Close, Epoch, Open, Result, Step


@dataclass(frozen=True, slots=True)
class Flow:
    """How a session feeds the chain under one epoch: rows per Step, and Steps in flight at once."""

    epoch: Epoch
    chunk_rows: int
    window: int


@dataclass(slots=True)
class Generation:
    """State of one session. The answer ends after `max_tokens`, where the context ends, or before a token of
    `end`; exactly as engine.generate does in one process.

    ContextError: an empty prompt, or one that leaves no position for an answer."""

    session: int
    prompt: Sequence[int]
    sampling: Sampling
    max_tokens: int
    end: Collection[int]
    context: int
    vocab: int
    known: list[int] = field(init=False)
    """Token ids by position: the prompt, then the answer so far."""
    finished: bool = field(init=False)
    _flow: Flow | None = field(init=False, default=None)
    _sent: int = field(init=False, default=0)
    _in_flight: deque[Step] = field(init=False, default_factory=deque)

    def __post_init__(self) -> None:
        if not 0 < len(self.prompt) < self.context:
            raise ContextError(
                f"the prompt has {len(self.prompt)} tokens and the context holds {self.context}, the answer "
                "included: a prompt has at least one token, and leaves room for one"
            )
        for token in self.prompt:
            if not 0 <= token < self.vocab:
                raise ValueError(f"the prompt holds the token id {token}, which is not in [0, {self.vocab})")
        self.known = list(self.prompt)
        self.finished = self.max_tokens <= 0

    def start(self, flow: Flow) -> Open:
        """Begins, or begins again, under an epoch: nothing counts as sent."""
        self._flow, self._sent = flow, 0
        self._in_flight.clear()
        return Open(self.session, flow.epoch, self.sampling, self.context)

    def due(self) -> list[Step]:
        """Steps to send now, within the window. The one that reaches the end of what is known wants a
        token."""
        assert self._flow is not None
        steps = []
        while not self.finished and self._sent < len(self.known) and len(self._in_flight) < self._flow.window:
            tokens = tuple(self.known[self._sent : self._sent + self._flow.chunk_rows])
            last = self._sent + len(tokens) == len(self.known)
            step = Step(
                self.session, self._flow.epoch, self._sent, tokens, Want.TOKEN if last else Want.NOTHING
            )
            self._sent += len(tokens)
            self._in_flight.append(step)
            steps.append(step)
        return steps

    def take(self, result: Result) -> int | None:
        """Counts an answer; returns the token it adds to the answer, if any. RemoteProtocolError: not the
        answer that was due."""
        step = self._in_flight.popleft() if self._in_flight else None
        wanted = step is not None and step.want is Want.TOKEN
        if step is None or (result.first, result.rows, result.token is not None) != (
            step.first, len(step.tokens), wanted,
        ):  # fmt: skip
            raise RemoteProtocolError(
                f"the last node answered {result.rows} rows from position {result.first}, which were not due"
            )
        if result.token is None:
            return None
        if result.token >= self.vocab:
            raise RemoteProtocolError(f"the last node drew token {result.token} of {self.vocab}")
        return self._append(result.token)

    def close(self) -> Close | None:
        """What ends the session under its epoch; None if it never began."""
        self.finished = True
        return None if self._flow is None else Close(self.session, self._flow.epoch)

    def _append(self, token: int) -> int | None:
        if token in self.end:
            self.finished = True
            return None
        position = len(self.known)
        self.known.append(token)
        answered = len(self.known) - len(self.prompt)
        self.finished = answered >= self.max_tokens or position >= self.context
        return token
