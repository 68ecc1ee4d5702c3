"""Inputs and outputs of a stage, as plain dataclasses shared by the engine's backends and the network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Annotated

import numpy as np
from numpy.typing import NDArray

from .arrays import F32
from .strict import AtMost

MOST_BIASES = 1024
MOST_REPORTED = 64
"""The most likeliest tokens of which log-probabilities are reported."""
Biases = Annotated[tuple[tuple[int, float], ...], AtMost(MOST_BIASES)]


@dataclass(frozen=True, slots=True)
class Sampling:
    """Sampling parameters; the defaults are greedy decoding. ValueError: a value is out of range.

    A draw is a pure function of the logits, these values, the token history and (seed, position), so a
    replay, or another device, draws the same token. Order: `bias`, penalties, temperature, top-k, top-p,
    min-p. `bias` is added to the logits of tokens: (token id, value) pairs, each token once. Penalties
    concern tokens that occur in the prompt or the answer: the presence penalty is subtracted from their
    logits once, the frequency penalty for each time."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    bias: Biases = ()

    def __post_init__(self) -> None:
        limits: tuple[tuple[str, float, bool], ...] = (
            ("temperature", self.temperature, self.temperature == 0 or 1e-6 <= self.temperature <= 1e6),
            ("top_k", self.top_k, 0 <= self.top_k < 1 << 31),
            ("top_p", self.top_p, 1e-6 <= self.top_p <= 1),
            ("min_p", self.min_p, 0 <= self.min_p <= 1),
            ("repetition_penalty", self.repetition_penalty, 1e-6 <= self.repetition_penalty <= 1e6),
            ("seed", self.seed, 0 <= self.seed < 1 << 64),
            ("presence_penalty", self.presence_penalty, abs(self.presence_penalty) <= 1e6),
            ("frequency_penalty", self.frequency_penalty, abs(self.frequency_penalty) <= 1e6),
        )
        for name, value, good in limits:
            if not good:
                raise ValueError(f"sampling: {name} = {value!r} is out of range")
        for token, value in self.bias:
            if not (0 <= token < 1 << 31 and abs(value) <= 1e6):
                raise ValueError(f"sampling: a bias of {value!r} for token {token!r} is out of range")
        if len({token for token, _ in self.bias}) < len(self.bias) or len(self.bias) > MOST_BIASES:
            raise ValueError(f"sampling: a token has two biases, or there are more than {MOST_BIASES}")

    @property
    def penalises(self) -> bool:
        """Whether tokens that occurred before are penalised."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)


class Want(IntEnum):
    """What the last stage returns for a `Run`."""

    NOTHING = 0
    """Nothing: the rows only fill the KV cache, as all chunks of a prompt but the last do."""
    TOKEN = 1
    """A token drawn from the last row."""
    LOGITS = 2
    """Logits of every row, without drawing a token. Never over a network."""
    TOKENS = 3
    """A token drawn from every row, each at its own position and with the tokens up to it as its history."""
    SCORES = 4
    """The natural log-probability of the token that follows each row: the next one of the run, and for its
    last row `Run.following`."""
    ROWS = 5
    """The output of the final norm for every row, which the head would read: an embedding."""

    @property
    def every_row(self) -> bool:
        """Whether something is returned for every row, not only for the last one."""
        return self not in (Want.NOTHING, Want.TOKEN)


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive rows of one sequence, at positions [first, first + len(tokens)).

    A run at position p drops the sequence's keys and values from p on. `hidden` is the cut
    `[rows, hidden]` that the previous stage returned; None for a stage that starts with the embedding.

    Only a stage that starts with the embedding reads `tokens`, and one whose draws depend on earlier tokens:
    elsewhere any ids will do, zeros for example.

    With `part` (enter, until) only those units of the stage run that are in [enter, until), to fill keys and
    values that were lost. `hidden` is then the input of the first of them, and `Result.hidden` the output of
    the last one. They must hold the positions before `first`; nothing is dropped. All runs of a batch have
    the same part."""

    sequence: int
    first: int
    tokens: Sequence[int]
    want: Want
    hidden: F32 | None = None
    part: tuple[int, int] | None = None
    report: int | None = None
    """With TOKEN, TOKENS and SCORES: report log-probabilities of each drawn or scored token, and of so many
    of the likeliest beside it."""
    allowed: NDArray[np.uint8] | None = None
    """With Want.TOKEN: only these tokens may be drawn: bit t % 8 of byte t // 8 is that of token t."""
    following: int | None = None
    """With Want.SCORES: the token that follows the last row."""
    sampling: Sampling | None = None
    """How tokens are drawn; None: as the sequence says."""
    history: NDArray[np.int32] | None = None
    """The tokens of positions [0, first + len(tokens)), with which draws are penalised; None: those that the
    sequence has run."""


@dataclass(frozen=True, slots=True)
class ReadRequest:
    """A text to read: `want` of the rows from position `first` on, and nothing is generated. With Want.SCORES
    the last token is not run: it follows the last row. `context`: the most positions that the sequence may
    have. `report` as in `Run`."""

    tokens: Sequence[int]
    first: int
    want: Want
    context: int
    report: int | None = None


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Natural log-probabilities by the logits as the model gives them, before biases and penalties: of the
    drawn (or scored) token, and of the likeliest tokens, the likeliest first."""

    drawn: float
    likeliest: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Result:
    """Result of the `Run` at the same index of the batch.

    `hidden` (`[rows, hidden]`) is set by every stage but the last. The last stage sets what was wanted:
    `token` for TOKEN; `logits` (`[rows, vocab]`, or `[rows, labels]` of a model with a classification head)
    for LOGITS; for each row, `tokens` for TOKENS, `scores` for SCORES, and `output` (`[rows, hidden]`) for
    ROWS. `logprobs`: of each drawn or scored token, where
    `Run.report` asks for them."""

    sequence: int
    first: int
    rows: int
    hidden: F32 | None = None
    token: int | None = None
    logits: F32 | None = None
    logprobs: tuple[Logprobs, ...] = ()
    tokens: tuple[int, ...] = ()
    scores: tuple[float, ...] = ()
    output: F32 | None = None


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common prefix of two sequences of token ids."""
    if not (isinstance(a, list) and isinstance(b, list)):
        a, b = list(a), list(b)
    same = 0
    while (part := a[same : same + _STRIDE]) and part == b[same : same + _STRIDE]:
        same += len(part)
    for one, other in zip(a[same : same + _STRIDE], b[same : same + _STRIDE], strict=False):
        if one != other:
            return same
        same += 1
    return same


_STRIDE = 64  # tokens that are compared at once, which is far quicker than one by one
