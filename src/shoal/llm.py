"""`shoal.LLM`: a model that answers, in this process or on nodes, in three lines.

The engine is below (`shoal.engine`): this module finds the model by name, renders chats and asks the
engine; answer_text.py joins tokens to text. Answers of all threads, and all prompts of a list, are computed
together."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property, partial
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Literal, Self, TypedDict, TypeVar, Unpack, overload

import numpy as np
from numpy.typing import NDArray

from .answer_text import AnswerText, Item, Stream
from .answering import Engine, LocalEngine, Settings, Stop, stop_all
from .chat_session import ChatSession
from .contexts import context_of, fitting
from .engine.arrays import F32
from .engine.batch import Result, Sampling, Want
from .engine.chat import Chat, Message
from .engine.generate import check_prompt
from .engine.host import ram
from .engine.model_directory import Model
from .engine.request_scheduler import Report
from .engine.sampler import Allow
from .engine.stage import Stage, StageOptions
from .engine.tokenizer import Tokenizer
from .opening import addresses, on_head, on_nodes
from .readings import (
    LAST,
    PROMPT,
    Labels,
    Pooling,
    Readings,
    class_by_head,
    classes_by_likelihood,
    embedding,
    read_all,
    scores_of,
    text_to_classify,
)
from .results import Classification, Completion, Score

Turn = Message | Mapping[str, Any]
T = TypeVar("T")
DEFAULT_TOKENS = 512


class Options(TypedDict, total=False):
    """Options of an answer, with the defaults of `shoal run`. `max_tokens` 512, None: until the context is
    full. `stop`: strings before which the answer ends. `end`: token ids before which it ends (default: the
    model's). `logprobs`: report log-probabilities of each token, and of so many of the likeliest. `allow`: a
    function of the answer's tokens so far that returns the tokens that may follow, or None for all; what it
    raises ends the answer. `logit_bias` is `Sampling.bias` as a mapping. The others are those of `Sampling`;
    without `seed` each answer has its own."""

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
    allow: Allow | None
    seed: int


class LLM:
    """A model that answers.

        with shoal.LLM("smollm2-135m") as llm:
            print(llm.chat("What is a shoal?").text)

    `model` is what `shoal run` accepts: a name, a path, or a source that is converted on its first use. With
    `nodes` (HOST:PORT each) the answers are computed there; they are the same. `context` is in tokens; None:
    the model's, or the largest that fits in RAM. Prompts that begin alike compute that once, and what an
    answer has computed stays for later ones while there is room, unless `share_prefixes` is False.
    `insecure`: connect to nodes without encryption although this device is paired; they need `--insecure`.
    `private`: keep both ends of the model on nodes of this device, or (False) plan for speed alone; None:
    keep them where that costs less than 5 %. The head of `house` has its own choice (`shoal up --private`).
    `house`: ask the head that `shoal up` runs on this device, whose model it must be; then `allow` is not
    possible. The other arguments are those of `StageOptions`.

    Thread-safe. After a fork, the child process may go on asking a model of this process, and not one on
    nodes or the head. Errors as for `Model.open`, `Stage` and `Coordinator.open`; every error is a
    ShoalError."""

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        nodes: Sequence[str] = (),
        context: int | None = None,
        backend: str = "auto",
        isa: str = "auto",
        threads: int | None = None,
        kv_bytes: int | None = None,
        resident: bool | None = None,
        share_prefixes: bool = True,
        insecure: bool = False,
        private: bool | None = None,
        house: bool = False,
    ) -> None:
        from .first_use import model_directory

        given, where = context is not None, addresses(nodes)
        if house and where:
            raise ValueError("house=True asks the head of this device, so it takes no nodes")
        if house and private is not None:
            raise ValueError("with house=True it is `shoal up` that takes --private, so leave private out")
        self.model = Model.open(model_directory(os.fspath(model)))
        self._context = context_of(context, self.model)
        self._exit = ExitStack()
        self._engine: Engine
        with ExitStack() as opening:
            if house:
                self._engine, self._context = on_head(opening, self.model, self._context, given=given)
            elif where:
                self._engine, self._context = on_nodes(
                    opening,
                    self.model,
                    where,
                    self._context,
                    given=given,
                    share_prefixes=share_prefixes,
                    insecure=insecure,
                    private=private,
                )
            else:
                options = StageOptions(backend, isa, threads, kv_bytes=kv_bytes, resident=resident)
                stage = opening.enter_context(Stage(self.model, 0, self.model.n_units, options))
                self._engine = local = LocalEngine(stage, share_prefixes=share_prefixes)
                opening.callback(local.close)
                if not given:
                    self._context = fitting(self.model, self._context, ram())
            self._exit = opening.pop_all()

    @classmethod
    def over(cls, model: Model, engine: Engine, context: int) -> LLM:
        """A model on an engine that is open already, and stays open."""
        made = cls.__new__(cls)
        made.model, made._engine, made._context, made._exit = model, engine, context, ExitStack()
        return made

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
        self, prompt: str | Sequence[int], *, n: int, **options: Unpack[Options]
    ) -> list[Completion]: ...
    @overload
    def generate(
        self, prompt: Sequence[str] | Sequence[Sequence[int]], **options: Unpack[Options]
    ) -> list[Completion]: ...
    def generate(
        self, prompt: Any, *, stream: bool = False, n: int | None = None, **options: Unpack[Options]
    ) -> Any:
        """Continues a text, or token ids. A list of texts, or of lists of token ids, is computed together;
        the answers are in its order. To a single prompt: with `stream`, the answer as it is made; with `n`,
        so many answers, for which the prompt is computed once, with the seeds `seed`, `seed` + 1, …

        ContextError: a prompt is empty or does not fit. ValueError: an option is out of range."""
        if isinstance(prompt, str):
            return self._one(self.tokenize(prompt), options, stream, n)
        if all(isinstance(item, int) for item in prompt) and len(prompt):
            return self._one(list(prompt), options, stream, n)
        _check_single(stream, n)
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
        self, messages: str | Sequence[Turn], *, n: int, **options: Unpack[Options]
    ) -> list[Completion]: ...
    @overload
    def chat(
        self, messages: Sequence[str] | Sequence[Sequence[Turn]], **options: Unpack[Options]
    ) -> list[Completion]: ...
    def chat(
        self, messages: Any, *, stream: bool = False, n: int | None = None, **options: Unpack[Options]
    ) -> Any:
        """The assistant's answer to a chat: messages {"role": …, "content": …}, or the text of one message
        of the user. A list of chats is computed together. `stream`, `n` and errors as for `generate`;
        ShoalError: the model's template refuses the messages."""
        if isinstance(messages, str) or all(isinstance(turn, Message | Mapping) for turn in messages):
            return self._one(self._chat_tokens(messages), options, stream, n)
        _check_single(stream, n)
        return self._all([self._chat_tokens(chat) for chat in messages], options)

    @overload  # as for `generate`
    def score(  # type: ignore[overload-overlap]
        self, text: str, *, prompt: str = ...
    ) -> Score: ...
    @overload
    def score(self, text: Sequence[str], *, prompt: str = ...) -> list[Score]: ...
    def score(self, text: str | Sequence[str], *, prompt: str = "") -> Score | list[Score]:
        """How likely a text is, as a continuation of `prompt`. Without one, the first token, which nothing
        precedes, is not scored. A list of texts is computed together. ContextError: a text is empty or does
        not fit."""
        self.model.check_generates()
        before = self.tokenize(prompt) if prompt else []
        texts = [text] if isinstance(text, str) else text
        tokens = [[*before, *self.tokenizer.encode(one, special=not prompt)] for one in texts]
        first = max(1, len(before))
        found = self._read([(whole, first - 1) for whole in tokens], Want.SCORES, scores_of)
        scores = [Score(tuple(whole[first:]), values) for whole, values in zip(tokens, found, strict=True)]
        return scores[0] if isinstance(text, str) else scores

    def embed(
        self, texts: str | Sequence[str], *, pooling: Pooling = "mean", normalize: bool = True
    ) -> NDArray[np.float32]:
        """An embedding `[hidden]` of a text, or embeddings `[texts, hidden]` of a list, which is computed
        together: of the rows that the model's final norm gives for the tokens the mean, or the last one with
        `pooling="last"`. With `normalize` its length is 1, so that the dot product of two embeddings is the
        cosine of their angle. ContextError: a text is empty or does not fit."""
        if pooling not in ("mean", "last"):
            raise ValueError(f"pooling is 'mean' or 'last', not {pooling!r}")
        given = [texts] if isinstance(texts, str) else texts
        tokens = [(self.tokenize(text), 0 if pooling == "mean" else LAST) for text in given]
        made = self._read(tokens, Want.ROWS, partial(embedding, pooling=pooling, normalize=normalize))
        if isinstance(texts, str):
            return made[0]
        return np.stack(made) if made else np.empty((0, self.model.program.output_cols), np.float32)

    @overload  # as for `generate`
    def classify(  # type: ignore[overload-overlap]
        self, texts: str, labels: Labels | None = ..., *, prompt: str = ..., neutral: str | None = ...
    ) -> Classification: ...
    @overload
    def classify(
        self,
        texts: Sequence[str],
        labels: Labels | None = ...,
        *,
        prompt: str = ...,
        neutral: str | None = ...,
    ) -> list[Classification]: ...
    def classify(
        self,
        texts: str | Sequence[str],
        labels: Labels | None = None,
        *,
        prompt: str = PROMPT,
        neutral: str | None = None,
    ) -> Classification | list[Classification]:
        """Which label fits a text, or each text of a list, which is computed together. A model with a
        classification head has its own labels. Any other model needs `labels`: each is scored as the
        continuation of `prompt` with the text in the place of {text}, and the likeliest fits. A mapping says
        how each label continues, which else is a space and its name. `neutral` is a text that says nothing,
        such as "N/A": its scores are subtracted from those of the texts, so that what the prompt alone makes
        likely has no advantage.

        ContextError: a text does not fit. ValueError: labels are missing, or given to a model that has its
        own; fewer than two; a prompt without {text}."""
        given = [texts] if isinstance(texts, str) else list(texts)
        if self.model.program.labels:
            if labels is not None:
                raise ValueError(f"the model has labels of its own: {', '.join(self.model.config.labels)}")
            config = self.model.config
            tokens = [(text_to_classify(self.tokenize(text), config.pad), LAST) for text in given]
            found = self._read(tokens, Want.ROWS, partial(class_by_head, config=config, head=self._head))
        elif labels is None:
            raise ValueError("the model has no classification head: give classify the labels to choose from")
        else:
            found = classes_by_likelihood(self._read, self.tokenizer, given, labels, prompt, neutral)
        return found[0] if isinstance(texts, str) else found

    @cached_property
    def _head(self) -> F32:
        """The matrix of the classification head."""
        (name,) = (weight.name for weight in self.model.program.units[-1].weights if not weight.vector)
        return self.model.unit_weights(self.model.n_units - 1)[name].data.copy()

    def _read(self, texts: Readings, want: Want, each: Callable[[list[Result]], T]) -> list[T]:
        return read_all(self._engine, texts, want, self._context, self.model.program, each)

    def session(
        self, *, system: str | None = None, raw: bool = False, **options: Unpack[Options]
    ) -> ChatSession:
        """A chat whose keys and values are kept, so that each turn computes only what is new. It reports no
        log-probabilities. With `raw`, each message is continued as it is, without the chat's template and
        the messages before it."""
        return ChatSession(self, system, self._settings(options), raw)

    def _chat_tokens(self, messages: str | Sequence[Turn]) -> list[int]:
        turns: Sequence[Turn] = [Message("user", messages)] if isinstance(messages, str) else messages
        return self.template.encode(turns)

    def _settings(self, options: Options) -> Settings:
        self.model.check_generates()
        given: dict[str, Any] = dict(options)
        max_tokens = given.pop("max_tokens", DEFAULT_TOKENS)
        stop, end = given.pop("stop", ()), given.pop("end", None)
        given.pop("logprobs", None)
        allow = given.pop("allow", None)
        given["bias"] = tuple(given.pop("logit_bias", {}).items())
        given.setdefault("seed", secrets.randbits(64))
        return Settings(
            self._context,
            Sampling(**given),
            max_tokens,
            self.model.config.eos if end is None else end,
            (stop,) if isinstance(stop, str) else tuple(stop),
            self.model.config.vocab,
            allow,
        )

    def _one(
        self, prompt: list[int], options: Options, stream: bool, n: int | None
    ) -> Completion | Stream | list[Completion]:
        settings = self._settings(options)
        if n is not None:
            _check_draws(stream, n)
            return self._all([prompt] * n, options, [_draw(settings, i) for i in range(n)])
        if stream:
            return self._stream(prompt, settings, _report(options))
        return self._all([prompt], options, [settings])[0]

    def _stream(self, prompt: list[int], settings: Settings, report: Report) -> Stream:
        check_prompt(prompt, settings.context, settings.vocab)
        answer = AnswerText(self.tokenizer, prompt, settings, report)
        return Stream(partial(self._engine.begin, prompt, settings, report=report), answer)

    def _all(
        self, prompts: Sequence[list[int]], options: Options, settings: Sequence[Settings] | None = None
    ) -> list[Completion]:
        """All answers. The first error ends the others and is raised."""
        each = settings or [self._settings(options) for _ in prompts]
        for prompt, given in zip(prompts, each, strict=True):
            check_prompt(prompt, given.context, given.vocab)
        items: SimpleQueue[tuple[int, Item]] = SimpleQueue()
        answers = [
            AnswerText(self.tokenizer, p, given, _report(options))
            for p, given in zip(prompts, each, strict=True)
        ]
        stops: list[Stop] = []
        try:
            for i, (prompt, given) in enumerate(zip(prompts, each, strict=True)):
                put = partial(_put, items, i) if given.stops else partial(_put_end, items, i, answers[i])
                stops.append(self._engine.begin(prompt, given, put, answers[i].report))
            left = len(answers)
            while left:
                i, item = items.get()
                if not answers[i].finished:
                    answers[i].take(item)
                    if answers[i].finished:
                        left -= 1
                        if item is not None:  # a stop string
                            stops[i](keep=True)
        finally:
            stop_all(stops)
        for answer in answers:
            answer.rest()
        return [answer.completion() for answer in answers]


def _report(options: Options) -> Report:
    return Report(options.get("logprobs"))


def _draw(settings: Settings, i: int) -> Settings:
    """Settings of draw number i from one prompt."""
    seed = (settings.sampling.seed + i) % (1 << 64)
    return replace(settings, sampling=replace(settings.sampling, seed=seed))


def _check_draws(stream: bool, n: int) -> None:
    if stream:
        raise ValueError("n answers cannot be streamed at once: stream each in a thread of its own")
    if n < 1:
        raise ValueError(f"n = {n} is not a number of answers")


def _put(items: SimpleQueue[tuple[int, Any]], i: int, item: Any) -> None:
    items.put((i, item))


def _put_end(items: SimpleQueue[tuple[int, Any]], i: int, answer: AnswerText, item: Any) -> None:
    """Wakes the caller at the end only: a thread that wakes for each token takes a core from the engine."""
    if isinstance(item, int):
        answer.note(item)
    else:
        items.put((i, item))


def _check_single(stream: bool, n: int | None) -> None:
    if n is not None:
        raise ValueError("n needs a single prompt: repeat the prompts in the list")
    if stream:
        raise ValueError("stream=True needs a single prompt: stream each prompt in a thread of its own")
