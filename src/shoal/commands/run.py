"""`shoal run`: answers one prompt, or chats on a terminal; in this process or on nodes."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from ..answering import Engine, LocalEngine, Settings, answer, finish
from ..engine.backends import choose
from ..engine.batch import Sampling
from ..engine.chat import Chat, Message
from ..engine.errors import ContextError, ShoalError
from ..engine.shards import Model
from ..engine.stage import Stage, StageOptions
from ..engine.threads import chosen
from ..engine.tokenizer import Tokenizer
from ..store import resolve

_SHORT = 16
"""Tokens. Of an answer that is no longer, reading the weights into memory first takes more time than it saves
(docs/performance.md)."""


def run(args: argparse.Namespace) -> int:
    """Exit code 0 when every prompt was answered."""
    model = Model.open(resolve(args.model))
    interactive = args.prompt is None and sys.stdin.isatty()
    prompt = args.prompt
    if prompt is None and not interactive:
        prompt = sys.stdin.buffer.read().decode("utf-8", "surrogateescape")
    if prompt is not None and not prompt.strip():
        raise ShoalError("there is no prompt: give one as an argument, or on standard input")
    if len(set(args.nodes)) < len(args.nodes):
        raise ShoalError("--nodes names an address twice: give each node once")
    if args.nodes:
        import trio

        async def ask() -> str:
            # Abandoned on Ctrl-C: a thread that waits for a line cannot be called back.
            return await trio.to_thread.run_sync(input, "> ", abandon_on_cancel=True)

        trio.run(_run, args, model, prompt, ask)
    else:
        # No event loop, no network, no planner: importing them takes longer than a short answer.
        finish(_run(args, model, prompt, _ask))
    return 0


async def _run(
    args: argparse.Namespace, model: Model, prompt: str | None, ask: Callable[[], Awaitable[str]]
) -> None:
    tokenizer = Tokenizer.open(model.path)
    chat = None if args.raw else Chat.open(model.path, tokenizer)
    messages = [Message("system", args.system)] if args.system else []
    settings = settings_of(args, model)
    async with open_engine(args, model, settings.context) as engine:
        while True:
            text = prompt if prompt is not None else await _line(ask)
            if text is None:
                return
            messages.append(Message("user", _checked(text)))
            tokens = tokenizer.encode(text) if chat is None else chat.encode(messages)
            try:
                made = await answer(engine, tokenizer, tokens, settings, show)
            except ContextError as error:
                if prompt is not None:
                    raise
                print(f"{error}; the conversation begins anew", file=sys.stderr)
                del messages[1 if args.system else 0 :]
                continue
            print(flush=True)
            messages.append(Message("assistant", made.text))
            if args.stats:
                print(f"[{made.summary()}]", file=sys.stderr)
            if prompt is not None:
                return


def settings_of(args: argparse.Namespace, model: Model) -> Settings:
    """The command line's options as Settings. ShoalError: one is out of range."""
    try:
        sampling = Sampling(
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            min_p=args.min_p,
            repetition_penalty=args.repeat_penalty,
            seed=int.from_bytes(os.urandom(8)) if args.seed is None else args.seed,
        )
    except ValueError as error:
        raise ShoalError(str(error)) from None
    context = model.config.context if args.context is None else args.context
    if context > model.config.context:
        raise ContextError(f"--context {context} is more than the model's {model.config.context} tokens")
    stops, vocab = tuple(args.stop), model.config.vocab
    return Settings(context, sampling, args.max_tokens, model.config.eos, stops, vocab)


@asynccontextmanager
async def open_engine(args: argparse.Namespace, model: Model, context: int) -> AsyncIterator[Engine]:
    """The nodes that the command line names, or this process."""
    if args.nodes:
        from ..distributed import open_chain

        async with open_chain(model, args.nodes, context) as (engine, plan):
            if args.stats:
                print(plan, file=sys.stderr)
            yield engine
        return
    backend, reason = choose(args.backend)
    if reason is not None:
        print(f"shoal: running on {backend}: {reason}", file=sys.stderr)
    threads, why = chosen(args.threads, backend, args.isa)
    resident = args.resident
    if resident is None and args.prompt is not None and args.max_tokens <= _SHORT:
        resident = False
    options = StageOptions(args.backend, args.isa, threads, resident=resident)
    with Stage(model, 0, model.n_units, options) as stage:
        if args.stats:
            plural, by = "s" if threads > 1 else "", f" ({why})" if why else ""
            print(f"[{stage.backend}, {threads} thread{plural}{by}]", file=sys.stderr)
        yield LocalEngine(stage)


def _checked(text: str) -> str:
    """The text. ShoalError: bytes that are no UTF-8 stood in it (Python passes them on as surrogates)."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ShoalError("the prompt is not UTF-8: give it as UTF-8 text") from None
    return text


def show(text: str) -> None:
    """Text as it comes."""
    print(text, end="", flush=True)


async def _ask() -> str:
    return input("> ")  # noqa: ASYNC250 there is no event loop that it could block


async def _line(ask: Callable[[], Awaitable[str]]) -> str | None:
    """A line that says something, from the terminal; None at its end."""
    while True:
        try:
            line = await ask()
        except EOFError:
            return None
        if line.strip():
            return line
