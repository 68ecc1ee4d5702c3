"""Generation in one process: the engine that apps embed, and the oracle of every distributed test."""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterator, Sequence
from types import TracebackType
from typing import Self

from .batch import Run, Sampling, Want, common_prefix
from .errors import ContextError, UnsupportedModelError
from .stage import Stage
from .tokenizer import Detokenizer, StopBuffer, Tokenizer


def check_prompt(prompt: Sequence[int], context: int, vocab: int | None = None) -> None:
    """ContextError: an empty prompt, or one that leaves no position for an answer. UnsupportedModelError: a
    token that is none of `vocab`, which happens where a tokenizer was given more than the model."""
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
    """A sequence of a stage that stays open from answer to answer; the stage holds all units of the model.

        with Session(stage, sampling) as session:
            for token in session.answer(prompt, max_tokens=64):
                ...

    Each answer computes what its prompt does not share with the prompt and answer before, and gives the
    tokens that the whole prompt would give. An answer may be left in the middle, by closing its generator.
    """

    def __init__(
        self, stage: Stage, sampling: Sampling = Sampling(), *, context: int | None = None, sequence: int = 0
    ) -> None:
        """Opens the sequence. ValueError: its number is taken; ContextError: the context is too long."""
        self.stage, self.sequence = stage, sequence
        self.context = stage.model.config.context if context is None else context
        self._held: list[int] = []
        """Token ids whose keys and values the stage has."""
        stage.open_sequence(sequence, sampling, self.context)

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
        self, prompt: Sequence[int], *, max_tokens: int = 256, end: Collection[int] = ()
    ) -> Generator[int, None, None]:
        """Token ids that follow `prompt`, one at a time; ends as `generate` does. ContextError: the prompt
        does not fit."""
        check_prompt(prompt, self.context)
        first = min(common_prefix(self._held, prompt), len(prompt) - 1)
        runs = prompt_runs(self.sequence, first, prompt[first:], self.stage.options.max_rows)
        position = len(prompt)
        for _ in range(max_tokens):
            for run in runs:
                token = self._run(run)
            if token is None or token in end:
                return
            yield token
            if position == self.context:
                return
            runs = iter([Run(self.sequence, position, [token], Want.TOKEN)])
            position += 1

    def _run(self, run: Run) -> int | None:
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
    end: Collection[int] = (),
    context: int | None = None,
    sequence: int = 0,
) -> Generator[int, None, None]:
    """Token ids that follow `prompt`, one at a time; `stage` must hold all units of the model.

    Stops after `max_tokens`, at the context's end, or before a token of `end`. ContextError: the prompt does
    not fit."""
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
