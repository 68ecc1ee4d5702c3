"""Generation in one process: what apps embed, and the reference for every distributed test."""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterator, Sequence
from types import TracebackType
from typing import Self

from .batch import Run, Sampling, Want, common_prefix
from .errors import CancelledRunError, ContextError, UnsupportedModelError
from .stage import Stage
from .tokenizer import Detokenizer, StopBuffer, Tokenizer


def check_prompt(prompt: Sequence[int], context: int, vocab: int | None = None) -> None:
    """Checks the token ids of a prompt. ContextError: it is empty, or leaves no position for an answer.
    UnsupportedModelError: a token id is not below `vocab`, because the tokenizer has more tokens than the
    model's embedding."""
    if not prompt:
        raise ContextError("the prompt is empty")
    if len(prompt) >= context:
        raise ContextError(
            f"the prompt has {len(prompt)} tokens and the context holds {context}, including the answer: "
            "shorten the prompt, or raise --context if the model allows"
        )
    _check_vocab("prompt", prompt, vocab)


def check_text(tokens: Sequence[int], context: int, vocab: int | None = None) -> None:
    """Checks token ids that are read, not answered. ContextError: there are none, or more than the context
    has positions. UnsupportedModelError: see check_prompt."""
    if not tokens:
        raise ContextError("the text is empty")
    if len(tokens) > context:
        raise ContextError(
            f"the text has {len(tokens)} tokens and the context holds {context}: shorten the text, or raise "
            "--context if the model allows"
        )
    _check_vocab("text", tokens, vocab)


def _check_vocab(what: str, tokens: Sequence[int], vocab: int | None) -> None:
    if vocab is not None and max(tokens) >= vocab:
        raise UnsupportedModelError(
            f"the {what} has the token {max(tokens)} and the model's embedding has {vocab} tokens, fewer "
            "than its tokenizer.json: leave that token out, or fetch a checkpoint whose files belong together"
        )


def check_whole(stage: Stage) -> None:
    """ValueError: the stage lacks units of its model, so it cannot answer alone."""
    units = stage.model.n_units
    if (stage.first, stage.last) != (0, units):
        raise ValueError(
            f"the stage has units [{stage.first}, {stage.last}), but an answer needs all {units}: open a "
            f"stage with units [0, {units})"
        )


def prompt_runs(sequence: int, first: int, tokens: Sequence[int], chunk: int) -> Iterator[Run]:
    """Runs of at most `chunk` rows for positions [first, first + len(tokens)). The last one asks for the
    next token."""
    for at in range(0, len(tokens), chunk):
        part = tokens[at : at + chunk]
        want = Want.TOKEN if at + chunk >= len(tokens) else Want.NOTHING
        yield Run(sequence, first + at, part, want)


class Session:
    """A sequence that stays open from answer to answer, on a stage with all units of the model.

    with Session(stage, sampling) as session: for token in session.answer(prompt, max_tokens=64): ...

    Each answer computes only the part of its prompt after the longest common prefix with the previous
    prompt and answer; the tokens are those of computing the whole prompt. Closing its generator ends an
    answer early."""

    def __init__(
        self,
        stage: Stage,
        sampling: Sampling = Sampling(),
        *,
        context: int | None = None,
        sequence: int | None = None,
    ) -> None:
        """Opens a sequence with this number, or a free number if None. `context` is in tokens; None: the
        model's. ValueError: the sequence is already open, or the stage lacks units. ContextError: the
        context is longer than the model's."""
        check_whole(stage)
        self.stage = stage
        self.context = stage.model.config.context if context is None else context
        self._held: list[int] = []
        """Token ids whose keys and values the stage holds."""
        self._answers = 0
        self.sequence = stage.open_sequence(sequence, sampling, self.context)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the sequence and frees its pages."""
        self.stage.close_sequence(self.sequence)

    def answer(
        self, prompt: Sequence[int], *, max_tokens: int = 256, end: Collection[int] | None = None
    ) -> Generator[int, None, None]:
        """Yields the token ids that follow `prompt`; ends as `generate` does. ContextError: the prompt does
        not fit. CancelledRunError: `Stage.cancel` was called. ValueError: the generator is continued after
        a later answer of the session has begun."""
        check_prompt(prompt, self.context)
        end = self.stage.model.config.eos if end is None else end
        self._answers += 1
        answer = self._answers
        self.stage.cancelled(self.sequence)  # clears the cancellation of an earlier answer
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
            raise ValueError("a later answer of this session has begun: a session has one answer at a time")
        if self.stage.cancelled(self.sequence):
            raise CancelledRunError("the answer was cancelled")
        del self._held[run.first :]  # before the run: after an error or Ctrl-C, these positions are invalid
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
    """Yields the token ids that follow `prompt`; `stage` must have all units of the model.

    Stops after `max_tokens`, at the end of the context, or before a token in `end` (None: the model's own
    end tokens; (): none). The answer uses the sequence number `sequence` (None: a free one) until the
    generator ends or is closed. Errors are raised when the first token is requested. ContextError: the
    prompt does not fit. CancelledRunError: `Stage.cancel` was called. ValueError: the stage lacks units,
    or the sequence is already open."""
    with Session(stage, sampling, context=context, sequence=sequence) as session:
        yield from session.answer(prompt, max_tokens=max_tokens, end=end)


class TextStream:
    """Converts tokens to text as they arrive: whole characters only, and nothing from the start of a stop
    string on."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        self._detokenizer = Detokenizer(tokenizer)
        self._stops = StopBuffer(stops)

    @property
    def stopped(self) -> bool:
        """True once a stop string has been met; later tokens give no text."""
        return self._stops.stopped

    def push(self, token: int) -> str:
        """Adds a token; returns the text that has become final, which may be empty."""
        return self._stops.push(self._detokenizer.push(token))

    def flush(self) -> str:
        """Returns the text that was held back. Call it when the answer has ended."""
        return self._stops.push(self._detokenizer.flush()) + self._stops.flush()
