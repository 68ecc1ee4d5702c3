"""Generation in one process: the engine that apps embed, and the oracle of every distributed test."""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterator, Sequence
from types import TracebackType
from typing import Self

from .batch import Run, Sampling, Want, common_prefix
from .errors import CancelledRunError, ContextError, UnsupportedModelError
from .stage import Stage
from .tokenizer import Detokenizer, StopBuffer, Tokenizer


def check_prompt(prompt: Sequence[int], context: int, vocab: int | None = None) -> None:
    """ContextError: an empty prompt, or one that leaves no position for an answer. UnsupportedModelError:
    a token that is none of `vocab`, which happens where a tokenizer was given more than the model."""
    if not prompt:
        raise ContextError("the prompt is empty")
    if len(prompt) >= context:
        raise ContextError(
            f"the prompt has {len(prompt)} tokens and the context holds {context}, the answer included: "
            "shorten the prompt, or raise --context if the model allows"
        )
    if vocab is not None and max(prompt) >= vocab:
        raise UnsupportedModelError(
            f"the prompt has the token {max(prompt)} and the model knows {vocab}: its tokenizer.json has "
            "more than its embedding; ask without them, or fetch a checkpoint whose parts belong together"
        )


def prompt_runs(sequence: int, first: int, tokens: Sequence[int], chunk: int) -> Iterator[Run]:
    """Runs that fill positions [first, first + len(tokens)); the last one asks for the next token."""
    for at in range(0, len(tokens), chunk):
        part = tokens[at : at + chunk]
        want = Want.TOKEN if at + chunk >= len(tokens) else Want.NOTHING
        yield Run(sequence, first + at, part, want)


class Session:
    """A sequence of a stage that stays open from answer to answer; the stage holds all units of the
    model.

    with Session(stage, sampling) as session: for token in session.answer(prompt, max_tokens=64): ...

    Each answer computes what its prompt does not share with the prompt and answer before, and gives the
    tokens that the whole prompt would give. An answer may be left in the middle, by closing its
    generator."""

    def __init__(
        self,
        stage: Stage,
        sampling: Sampling = Sampling(),
        *,
        context: int | None = None,
        sequence: int | None = None,
    ) -> None:
        """Opens the sequence of this number; None: of a free one. ValueError: it is open already, or the
        stage lacks units; ContextError: the context is too long."""
        units = stage.model.n_units
        if (stage.first, stage.last) != (0, units):
            raise ValueError(
                f"the stage has units [{stage.first}, {stage.last}) and an answer needs all {units}"
            )
        self.stage = stage
        self.context = stage.model.config.context if context is None else context
        self._held: list[int] = []
        """Token ids whose keys and values the stage has."""
        self._answers = 0
        self.sequence = stage.open_sequence(sequence, sampling, self.context)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Frees the sequence's pages."""
        self.stage.close_sequence(self.sequence)

    def answer(
        self, prompt: Sequence[int], *, max_tokens: int = 256, end: Collection[int] | None = None
    ) -> Generator[int, None, None]:
        """Token ids that follow `prompt`, one at a time; ends as `generate` does. ContextError: the
        prompt does not fit. ValueError: it goes on after another answer of the session has begun."""
        check_prompt(prompt, self.context)
        end = self.stage.model.config.eos if end is None else end
        self._answers += 1
        answer = self._answers
        self.stage.cancelled(self.sequence)  # what was cancelled is an answer before
        first = min(common_prefix(self._held, prompt), len(prompt) - 1)
        runs = prompt_runs(self.sequence, first, prompt[first:], self.stage.options.max_rows)
        position = len(prompt)
        for _ in range(max_tokens):
            for run in runs:
                token = self._run(run, answer)
            if token is None or token in end:
                return
            yield token
            if position == self.context:
                return
            runs = iter([Run(self.sequence, position, [token], Want.TOKEN)])
            position += 1

    def _run(self, run: Run, answer: int) -> int | None:
        if answer != self._answers:
            raise ValueError("another answer of this session has begun: a session gives one at a time")
        if self.stage.cancelled(self.sequence):
            raise CancelledRunError("the answer was cancelled")
        del self._held[run.first :]  # first: an error, or Ctrl-C, may leave nothing behind that position
        (result,) = self.stage.run([run])
        self._held += run.tokens
        return result.token


def generate(
    stage: Stage,
    prompt: Sequence[int],
    sampling: Sampling = Sampling(),
    *,
    max_tokens: int = 256,
    end: Collection[int] | None = None,
    context: int | None = None,
    sequence: int | None = None,
) -> Generator[int, None, None]:
    """Token ids that follow `prompt`, one at a time; `stage` holds all units of the model.

    Stops after `max_tokens`, at the context's end, or before a token of `end`: None stands for the
    model's own end tokens, () for none. The answer has the stage's sequence of this number (None: a free
    one) until the generator ends or is closed. Errors are raised when the first token is asked for.
    ContextError: the prompt does not fit. CancelledRunError: `Stage.cancel` was called. ValueError: the
    stage lacks units, or the sequence is open already."""
    with Session(stage, sampling, context=context, sequence=sequence) as session:
        yield from session.answer(prompt, max_tokens=max_tokens, end=end)


class TextStream:
    """Tokens in, text out: whole characters only, and nothing of a stop string or behind it."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        self._detokenizer = Detokenizer(tokenizer)
        self._stops = StopBuffer(stops)

    @property
    def stopped(self) -> bool:
        """A stop string has been met: push no more."""
        return self._stops.stopped

    def push(self, token: int) -> str:
        """Text that is certain after one more token; may be empty."""
        return self._stops.push(self._detokenizer.push(token))

    def flush(self) -> str:
        """What was held back, when the answer has ended."""
        return self._stops.push(self._detokenizer.flush()) + self._stops.flush()
