"""`shoal.LLM`: a model that answers, in this process or on nodes, in three lines.

The engine is below (`shoal.engine`): this module finds the model by name, renders chats, and joins tokens to
text. Answers of all threads, and all prompts of a list, are computed together."""

from __future__ import annotations

import math
import os
import secrets
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Literal, Self, TypedDict, Unpack, overload

from .answering import Engine, LocalEngine, Settings, most_tokens
from .contexts import context_of, fitting
from .engine.batch import Logprobs, Sampling
from .engine.batcher import Report
from .engine.chat import Chat, Message
from .engine.errors import ShoalError, ignore
from .engine.generate import TextStream, check_prompt, logprobs
from .engine.host import ram
from .engine.model_directory import Model
from .engine.stage import Stage, StageOptions
from .engine.tokenizer import Tokenizer

FinishReason = Literal["stop", "length", "cancelled"]
Item = int | Exception | None
Turn = Message | Mapping[str, Any]
DEFAULT_TOKENS = 512


class Options(TypedDict, total=False):
    """Options of an answer, with the defaults of `shoal run`. `max_tokens` 512, None: until the context is
    full. `stop`: strings before which the answer ends. `end`: token ids before which it ends (default: the
    model's). `logprobs`: report log-probabilities of each token, and of so many of the likeliest.
    `logit_bias` is `Sampling.bias` as a mapping. The others are those of `Sampling`; without `seed` each
    answer has its own."""

    max_tokens: int | None
    stop: str | Sequence[str]
    end: Collection[int]
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    logprobs: int | None
    seed: int


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a prompt and of its answer."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds from the question to the first token, and to the end of the answer."""

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


class Stream:
    """The text of an answer, piece by piece; an iterator. Closing it, or leaving its `with` block, ends the
    answer and frees its state. `completion` is the answer so far, and the whole one after the end."""

    def __init__(
        self, begin: Callable[[Callable[[Item], None]], Callable[[], None]], answer: _Answer
    ) -> None:
        self._items = SimpleQueue[Item]()
        self._stop = begin(self._items.put)
        self._answer = answer

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> str:
        """The next piece of text. ContextError or another ShoalError: the answer cannot go on."""
        while not self._answer.finished:
            text = self._answer.take(self._items.get())
            if self._answer.finished:
                self._stop()
            if text:
                return text
        if text := self._answer.rest():
            return text
        raise StopIteration

    def close(self) -> None:
        """Ends the answer."""
        self._answer.cancel()
        self._stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        answer = getattr(self, "_answer", None)  # None: the answer could not be begun
        if answer is not None and not answer.finished:
            self.close()

    @property
    def completion(self) -> Completion:
        """The answer."""
        return self._answer.completion()


class LLM:
    """A model that answers.

        with shoal.LLM("smollm2-135m") as llm:
            print(llm.chat("What is a shoal?").text)

    `model` is what `shoal run` accepts: a name, a path, or a source that is converted on its first use. With
    `nodes` (HOST:PORT each) the answers are computed there; they are the same. `context` is in tokens; None:
    the model's, or the largest that fits in RAM. The other arguments are those of `StageOptions`.

    Thread-safe. After a fork, the child process may go on asking a model of this process, and not one on
    nodes. Errors as for `Model.open`, `Stage` and `Coordinator.open`; every error is a ShoalError."""

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        nodes: Sequence[str] = (),
        context: int | None = None,
        backend: str = "auto",
        threads: int | None = None,
        kv_bytes: int | None = None,
        resident: bool | None = None,
    ) -> None:
        from .first_use import model_directory

        addresses = _addresses(nodes)
        self.model = Model.open(model_directory(os.fspath(model)))
        self._context = context_of(context, self.model)
        self._exit = ExitStack()
        with ExitStack() as opening:
            if addresses:
                self._engine: Engine = self._open_nodes(opening, addresses, given=context is not None)
            else:
                options = StageOptions(backend, threads=threads, kv_bytes=kv_bytes, resident=resident)
                stage = opening.enter_context(Stage(self.model, 0, self.model.n_units, options))
                self._engine = local = LocalEngine(stage)
                opening.callback(local.close)
                if context is None:
                    self._context = fitting(self.model, self._context, ram())
            self._exit = opening.pop_all()

    def _open_nodes(self, opening: ExitStack, addresses: Sequence[tuple[str, int]], *, given: bool) -> Engine:
        from .distributed import open_nodes
        from .planning import default_workload

        workload = default_workload(self._context, given=given)
        found = opening.enter_context(
            open_nodes(self.model, addresses, workload, shrink=not given, log=ignore)
        )
        self._context = min(self._context, found.context)
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends all answers, and frees the memory or leaves the nodes."""
        self._exit.close()

    @property
    def context(self) -> int:
        """The context length in tokens: the most that a prompt and its answer have together."""
        return self._context

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return Tokenizer.open(self.model.path)

    @cached_property
    def template(self) -> Chat:
        """The model's chat template."""
        return Chat.open(self.model.path, self.tokenizer)

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text, with the begin token that the model asks for."""
        return self.tokenizer.encode(text)

    def detokenize(self, tokens: Sequence[int]) -> str:
        """The text of token ids."""
        return self.tokenizer.decode(tokens)

    def count(self, prompt: str | Sequence[Turn]) -> int:
        """The number of tokens of a text, or of a chat as the model reads it."""
        return len(self.tokenize(prompt) if isinstance(prompt, str) else self._chat_tokens(prompt))

    @overload  # a str is also a Sequence[str], and the first overload takes it
    def generate(  # type: ignore[overload-overlap]
        self, prompt: str | Sequence[int], *, stream: Literal[False] = ..., **options: Unpack[Options]
    ) -> Completion: ...
    @overload
    def generate(
        self, prompt: str | Sequence[int], *, stream: Literal[True], **options: Unpack[Options]
    ) -> Stream: ...
    @overload
    def generate(
        self, prompt: Sequence[str] | Sequence[Sequence[int]], **options: Unpack[Options]
    ) -> list[Completion]: ...
    def generate(self, prompt: Any, *, stream: bool = False, **options: Unpack[Options]) -> Any:
        """Continues a text, or token ids. A list of texts, or of lists of token ids, is computed together;
        the answers are in its order. With `stream`, the answer to a single prompt as it is made.

        ContextError: a prompt is empty or does not fit. ValueError: an option is out of range."""
        if isinstance(prompt, str):
            return self._one(self.tokenize(prompt), options, stream)
        if all(isinstance(item, int) for item in prompt) and len(prompt):
            return self._one(list(prompt), options, stream)
        _check_single(stream)
        return self._all(
            [self.tokenize(item) if isinstance(item, str) else list(item) for item in prompt], options
        )

    @overload
    def chat(  # type: ignore[overload-overlap]
        self, messages: str | Sequence[Turn], *, stream: Literal[False] = ..., **options: Unpack[Options]
    ) -> Completion: ...
    @overload
    def chat(
        self, messages: str | Sequence[Turn], *, stream: Literal[True], **options: Unpack[Options]
    ) -> Stream: ...
    @overload
    def chat(
        self, messages: Sequence[str] | Sequence[Sequence[Turn]], **options: Unpack[Options]
    ) -> list[Completion]: ...
    def chat(self, messages: Any, *, stream: bool = False, **options: Unpack[Options]) -> Any:
        """The assistant's answer to a chat: messages {"role": …, "content": …}, or the text of one message
        of the user. A list of chats is computed together. Errors as for `generate`; ShoalError: the model's
        template refuses the messages."""
        if isinstance(messages, str) or all(isinstance(turn, Message | Mapping) for turn in messages):
            return self._one(self._chat_tokens(messages), options, stream)
        _check_single(stream)
        return self._all([self._chat_tokens(chat) for chat in messages], options)

    @overload  # as for `generate`
    def score(  # type: ignore[overload-overlap]
        self, text: str, *, prompt: str = ...
    ) -> Score: ...
    @overload
    def score(self, text: Sequence[str], *, prompt: str = ...) -> list[Score]: ...
    def score(self, text: str | Sequence[str], *, prompt: str = "") -> Score | list[Score]:
        """How likely a text is, as a continuation of `prompt`. Without one, the first token, which nothing
        precedes, is not scored. ContextError: the text does not fit. ShoalError: the model is on nodes, which
        send no log-probabilities yet."""
        if not isinstance(self._engine, LocalEngine):
            raise ShoalError("nodes do not send log-probabilities yet: score in this process")
        if not isinstance(text, str):
            return [self.score(one, prompt=prompt) for one in text]
        before = self.tokenize(prompt) if prompt else []
        tokens = self.tokenizer.encode(text, special=not prompt)
        check_prompt([*before, *tokens][:-1], self._context, self.model.config.vocab)
        first = max(1, len(before))
        values = logprobs(self._engine.stage, [*before, *tokens], first)
        return Score(tuple([*before, *tokens][first:]), tuple(values))

    def session(self, *, system: str | None = None, **options: Unpack[Options]) -> ChatSession:
        """A chat whose keys and values are kept, so that each turn computes only what is new. It reports no
        log-probabilities."""
        return ChatSession(self, system, self._settings(options))

    def _chat_tokens(self, messages: str | Sequence[Turn]) -> list[int]:
        turns: Sequence[Turn] = [Message("user", messages)] if isinstance(messages, str) else messages
        return self.template.encode(turns)

    def _settings(self, options: Options) -> Settings:
        given: dict[str, Any] = dict(options)
        max_tokens = given.pop("max_tokens", DEFAULT_TOKENS)
        stop, end = given.pop("stop", ()), given.pop("end", None)
        given.pop("logprobs", None)
        given["bias"] = tuple(given.pop("logit_bias", {}).items())
        given.setdefault("seed", secrets.randbits(64))
        return Settings(
            self._context,
            Sampling(**given),
            max_tokens,
            self.model.config.eos if end is None else end,
            (stop,) if isinstance(stop, str) else tuple(stop),
            self.model.config.vocab,
        )

    def _one(self, prompt: list[int], options: Options, stream: bool) -> Completion | Stream:
        settings = self._settings(options)
        if stream:
            return self._stream(prompt, settings, _report(options))
        return self._all([prompt], options, settings)[0]

    def _stream(self, prompt: list[int], settings: Settings, report: Report | None) -> Stream:
        check_prompt(prompt, settings.context, settings.vocab)
        answer = _Answer(self.tokenizer, prompt, settings, report)
        return Stream(partial(self._engine.begin, prompt, settings, report=report), answer)

    def _all(
        self, prompts: Sequence[list[int]], options: Options, settings: Settings | None = None
    ) -> list[Completion]:
        """All answers. The first error ends the others and is raised."""
        each = [settings or self._settings(options) for _ in prompts]
        for prompt, given in zip(prompts, each, strict=True):
            check_prompt(prompt, given.context, given.vocab)
        items: SimpleQueue[tuple[int, Item]] = SimpleQueue()
        answers = [
            _Answer(self.tokenizer, p, given, _report(options))
            for p, given in zip(prompts, each, strict=True)
        ]
        stops: list[Callable[[], None]] = []
        try:
            for i, (prompt, given) in enumerate(zip(prompts, each, strict=True)):
                put = partial(_put, items, i)
                stops.append(self._engine.begin(prompt, given, put, answers[i].report))
            left = len(answers)
            while left:
                i, item = items.get()
                if not answers[i].finished:
                    answers[i].take(item)
                    if answers[i].finished:
                        left -= 1
                        if item is not None:  # a stop string
                            stops[i]()
        finally:
            for stop in stops:
                stop()
        for answer in answers:
            answer.rest()
        return [answer.completion() for answer in answers]


class ChatSession:
    """A chat: `send` adds a message and returns the answer, which joins the chat. Closing it, or leaving its
    `with` block, frees its keys and values."""

    def __init__(self, llm: LLM, system: str | None, settings: Settings) -> None:
        self.messages: list[Message] = [] if system is None else [Message("system", system)]
        self._llm, self._settings = llm, settings
        self._session = llm._engine.session(settings)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Frees the chat's keys and values."""
        self._session.close()

    def send(self, text: str) -> Completion:
        """The answer to a message. ContextError: the chat does not fit any more; it is as before then."""
        made = self._answer(text)
        for _ in self._pieces(made):
            pass
        return self._join(text, made)

    def stream(self, text: str) -> Iterator[str]:
        """The answer to a message, piece by piece. It joins the chat when it has ended, also if the iterator
        is closed early."""
        made = self._answer(text)
        try:
            yield from self._pieces(made)
        except GeneratorExit:
            made.cancel()
            raise
        finally:
            self._join(text, made)

    def _answer(self, text: str) -> _Answer:
        prompt = self._llm.template.encode([*self.messages, Message("user", text)])
        check_prompt(prompt, self._settings.context, self._settings.vocab)
        return _Answer(self._llm.tokenizer, prompt, self._settings)

    def _pieces(self, made: _Answer) -> Iterator[str]:
        prompt, settings = made.prompt, self._settings
        tokens = self._session.answer(prompt, max_tokens=most_tokens(prompt, settings), end=settings.end)
        try:
            for token in tokens:
                if text := made.take(token):
                    yield text
                if made.finished:
                    break
            else:
                made.take(None)
        finally:
            tokens.close()
        if text := made.rest():
            yield text

    def _join(self, text: str, made: _Answer) -> Completion:
        completion = made.completion()
        self.messages += [Message("user", text), Message("assistant", completion.text)]
        return completion


class _Answer:
    """An answer that grows: tokens in, text out."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        settings: Settings,
        report: Report | None = None,
    ) -> None:
        self.prompt, self.report = prompt, report
        self._most = min(most_tokens(prompt, settings), settings.context + 1 - len(prompt))
        self.finished = False
        self._stream = TextStream(tokenizer, settings.stops)
        self._tokens: list[int] = []
        self._pieces: list[str] = []
        self._cancelled = self._flushed = False
        self._start = self._first = self._last = time.perf_counter()

    def take(self, item: Item) -> str:
        """Takes a token, or the end; returns the text that has become final. Raises an exception."""
        self._last = time.perf_counter()
        if isinstance(item, Exception):
            self.finished = True
            raise item
        if item is None:
            self.finished = True
            return ""
        if not self._tokens:
            self._first = self._last
        self._tokens.append(item)
        text = self._stream.push(item)
        self._pieces.append(text)
        self.finished = self._stream.stopped
        return text

    def rest(self) -> str:
        """The text that was held back, once."""
        text = "" if self._flushed else self._stream.flush()
        self._flushed = True
        self._pieces.append(text)
        return text

    def cancel(self) -> None:
        """Ends the answer, unless it has ended."""
        self._cancelled, self.finished = not self.finished, True

    def completion(self) -> Completion:
        """The answer so far."""
        reason: FinishReason = "stop"
        if self._cancelled:
            reason = "cancelled"
        elif not self._stream.stopped and len(self._tokens) >= self._most:
            reason = "length"
        return Completion(
            "".join(self._pieces),
            tuple(self._tokens),
            reason,
            Usage(len(self.prompt), len(self._tokens)),
            Timings(self._first - self._start, self._last - self._start),
            None if self.report is None else tuple(self.report.found[: len(self._tokens)]),
        )


def _addresses(nodes: Sequence[str]) -> list[tuple[str, int]]:
    if not nodes:
        return []
    from argparse import ArgumentTypeError

    from .arguments import address, check_nodes

    try:
        found = [address(node) for node in nodes]
    except ArgumentTypeError as error:
        raise ShoalError(str(error)) from None
    check_nodes(found)
    return found


def _report(options: Options) -> Report | None:
    count = options.get("logprobs")
    return None if count is None else Report(count)


def _put(items: SimpleQueue[tuple[int, Item]], i: int, item: Item) -> None:
    items.put((i, item))


def _check_single(stream: bool) -> None:
    if stream:
        raise ValueError("stream=True needs a single prompt: stream each prompt in a thread of its own")
