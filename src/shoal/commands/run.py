"""`shoal run`: answers one prompt, or chats on a terminal; in this process or on nodes."""

from __future__ import annotations

import argparse
import secrets
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from .. import planner
from ..answering import Engine, LocalEngine, Settings, answer
from ..distributed import NetworkEngine, NetworkPlanner, head_identity
from ..engine.backends import choose
from ..engine.batch import Sampling
from ..engine.chat import Chat, Message
from ..engine.cores import default_threads
from ..engine.errors import ContextError, ShoalError
from ..engine.shards import Model
from ..engine.stage import Stage, StageOptions
from ..engine.tokenizer import Tokenizer
from ..net.coordinator import Head
from ..net.identity import shape_of
from ..store import resolve


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
    trio.run(_run, args, model, prompt)
    return 0


async def _run(args: argparse.Namespace, model: Model, prompt: str | None) -> None:
    tokenizer = Tokenizer.open(model.path)
    chat = None if args.raw else Chat.open(model.path, tokenizer)
    messages = [Message("system", args.system)] if args.system else []
    settings = settings_of(args, model)
    async with open_engine(args, model, settings.context) as engine:
        while True:
            text = prompt if prompt is not None else await _ask()
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
            seed=secrets.randbits(64) if args.seed is None else args.seed,
        )
    except ValueError as error:
        raise ShoalError(str(error)) from None
    context = model.config.context if args.context is None else args.context
    if context > model.config.context:
        raise ContextError(f"--context {context} is more than the model's {model.config.context} tokens")
    return Settings(context, sampling, args.max_tokens, model.config.eos, tuple(args.stop))


@asynccontextmanager
async def open_engine(args: argparse.Namespace, model: Model, context: int) -> AsyncIterator[Engine]:
    """The nodes that the command line names, or this process."""
    if args.nodes:
        plans = NetworkPlanner(model, planner.Workload(context=context))
        async with Head.open(args.nodes, head_identity(model), shape_of(model), plans) as head:
            if args.stats and plans.plan is not None:
                print(planner.render(plans.plan), file=sys.stderr)
            yield NetworkEngine(head)
        return
    backend, reason = choose(args.backend)
    if reason is not None:
        print(f"shoal: running on {backend}: {reason}", file=sys.stderr)
    threads = args.threads or default_threads()
    options = StageOptions(args.backend, args.isa, threads, resident=args.resident)
    with Stage(model, 0, model.n_units, options) as stage:
        if args.stats:
            print(f"[{stage.backend}, {threads} thread{'s' if threads > 1 else ''}]", file=sys.stderr)
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


async def _ask() -> str | None:
    """A line from the terminal; None at its end."""
    while True:
        try:
            # Abandoned on Ctrl-C: a thread that waits for a line cannot be called back.
            line = await trio.to_thread.run_sync(input, "> ", abandon_on_cancel=True)
        except EOFError:
            return None
        if line.strip():
            return line
