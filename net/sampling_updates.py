"""Updates that the coordinator sends to the last stage of a session, directly, so that token ids pass no
stage but the first and the last.

The last stage draws the tokens. It needs token ids only to penalise those that have occurred, and to score
them; besides, the parameters unless they are the default ones, and masks. All of it is numbered in each
epoch, in which everything is told anew, since the last stage may be another one. A Step says up to which
number the last stage must have been told, and waits there until then.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from ..engine.batch import Sampling, Want
from .errors import RemoteProtocolError
from .messages import MOST_TOKENS, Close, Draw, Mask, SetSampling, Step, Tokens

Told = SetSampling | Tokens | Mask
"""What the last stage is told of a session."""
Notice = Told | Close
"""A Close: it will be told nothing more."""
_USUAL = Sampling()


@dataclass(slots=True)
class UpdateSender:
    """The updates of a session that the coordinator has sent to the last stage in the present epoch."""

    number: int = 0
    """The number of updates sent."""
    tokens: int = 0
    """How many tokens, from the first, have been sent."""
    sampling: bool = False
    """Whether the sampling parameters have been sent."""

    def changed(self, positions: int) -> None:
        """The session has other tokens after so many positions."""
        self.tokens = min(self.tokens, positions)

    def tell(
        self, step: Step, text: Sequence[int], sampling: Sampling, bits: bytes | None = None
    ) -> tuple[Step, list[Told]]:
        """A Step as it is to be sent, and what the last stage must be told before. `text` is the tokens of
        the session; if scores are wanted, also the one that follows them. `bits` are those of a mask."""
        if step.want in (Want.NOTHING, Want.ROWS):
            return step, []
        told, scored = list[Told](), step.want is Want.SCORES
        if not scored and not self.sampling and sampling != _USUAL:
            told.append(SetSampling(step.session, step.epoch, self._next(), sampling))
            self.sampling = True
        end = step.first + step.rows + scored
        while (scored or sampling.penalises) and self.tokens < end:
            first, self.tokens = self.tokens, min(end, self.tokens + MOST_TOKENS)
            some = tuple(text[first : self.tokens])
            told.append(Tokens(step.session, step.epoch, self._next(), first, some))
        if bits is not None:
            told.append(Mask(step.session, step.epoch, self._next(), bits))
        if not self.number:
            return step, told
        return replace(step, told=self.number, masked=bits is not None), told

    def _next(self) -> int:
        self.number += 1
        return self.number


@dataclass(slots=True)
class UpdateReceiver:
    """The updates of a session that the last stage has received. `tokens` are replaced and added, and never
    fewer: a Step of an answer that was left, whose result nobody takes, may find others than its own."""

    number: int = 0
    sampling: Sampling = Sampling()
    tokens: array[int] = field(default_factory=lambda: array("i"))
    mask: Mask | None = None

    def hear(self, told: Told) -> None:
        """Takes the next thing. RemoteProtocolError: it does not follow the last one."""
        if told.number <= self.number:
            raise RemoteProtocolError(
                f"the coordinator told number {told.number} of session {told.session} after {self.number}"
            )
        match told:
            case SetSampling():
                self.sampling = told.sampling
            case Mask():
                self.mask = told
            case Tokens(first=first, tokens=tokens) if first <= len(self.tokens):
                self.tokens[first : first + len(tokens)] = array("i", tokens)
            case Tokens():
                raise RemoteProtocolError(
                    f"the coordinator told tokens of session {told.session} from position {told.first} on, "
                    f"after those of {len(self.tokens)}"
                )
        self.number = told.number

    def draw(self, step: Step) -> Draw:
        """What counts for a Step."""
        history = allowed = None
        if step.want is Want.SCORES or self.sampling.penalises:
            end = step.first + step.rows + (step.want is Want.SCORES)
            history = np.array(self.tokens[:end], np.int32)
        # After a later mask, the Step is of an answer that was left, and needs none.
        if step.masked and self.mask is not None and self.mask.number == step.told:
            allowed, self.mask = np.frombuffer(self.mask.bits, np.uint8), None
        return Draw(self.sampling, history, allowed)
