"""Generation in one process: the engine that apps embed, and the oracle of every distributed test."""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterator, Sequence

from .batch import Run, Sampling, Want
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
    context = stage.model.config.context if context is None else context
    check_prompt(prompt, context)
    stage.open_sequence(sequence, sampling, context)
    try:
        runs = prompt_runs(sequence, 0, prompt, stage.options.max_rows)
        position = len(prompt)
        for _ in range(max_tokens):
            for run in runs:
                (result,) = stage.run([run])
            token = result.token
            if token is None or token in end:
                return
            yield token
            if position == context:
                return
            runs = iter([Run(sequence, position, [token], Want.TOKEN)])
            position += 1
    finally:
        stage.close_sequence(sequence)


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
