"""What the calls of `shoal.LLM` return."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from .engine.batch import Logprobs

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a prompt and of its answer. `cached_tokens` of the prompt were not computed for it, since an
    earlier request had begun with them."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds from the question to the first token, and to the last one."""

    first_token_s: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Completion:
    """An answer. `finish_reason`: "stop" (at an end token or a stop string), "length" (`max_tokens`, or the
    context is full), or "cancelled" (its stream was closed). `tokens` has those of a stop string, too.
    `logprobs` are those of `tokens`, if they were asked for."""

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    logprobs: tuple[Logprobs, ...] | None = None

    @property
    def tokens_per_s(self) -> float | None:
        """Decode speed, without the first token. None: there are fewer than two tokens."""
        if len(self.tokens) < 2:
            return None
        return (len(self.tokens) - 1) / max(self.timings.seconds - self.timings.first_token_s, 1e-9)

    def summary(self) -> str:
        """The counts and times in one line."""
        speed = "" if self.tokens_per_s is None else f", {self.tokens_per_s:.1f} tokens/s"
        return (
            f"{self.usage.prompt_tokens} tokens of prompt, first token after "
            f"{self.timings.first_token_s:.2f} s, {len(self.tokens)} tokens{speed}"
        )


@dataclass(frozen=True, slots=True)
class Score:
    """How likely a text is: its tokens, and the natural log-probability of each after those before it."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]

    @property
    def logprob(self) -> float:
        """The log-probability of the whole text."""
        return math.fsum(self.logprobs)

    @property
    def perplexity(self) -> float:
        """The perplexity for each token."""
        return math.exp(-self.logprob / len(self.logprobs)) if self.logprobs else math.nan


@dataclass(frozen=True, slots=True)
class Classification:
    """The label that fits a text best, and the probability of each label, the likeliest first. Those of
    labels that do not exclude each other do not add up to 1, and a head for regression gives none. `scores`:
    the head's logits, or the natural log-probabilities of the labels as continuations."""

    label: str
    probabilities: Mapping[str, float]
    scores: Mapping[str, float]
