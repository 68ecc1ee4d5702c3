"""`shoal run`: answers one prompt, or chats on a terminal; in this process or on nodes."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace

from ..answering import Engine, LocalEngine, Settings, answer
from ..contexts import context_of, fitting, notice
from ..engine.backends import choose
from ..engine.batch import Sampling
from ..engine.chat import Chat, Message
from ..engine.errors import ShoalError
from ..engine.generate import check_prompt
from ..engine.host import ram
from ..engine.model_directory import Model
from ..engine.stage import Stage, StageOptions
from ..engine.threads import chosen
from ..engine.tokenizer import Tokenizer
from ..first_use import model_directory

_SHORT = 16
"""Tokens. Of an answer that is no longer, reading the weights into memory first takes more time than it saves
(docs/performance.md)."""


def run(args: argparse.Namespace) -> int:
    """Exit code 0 when the prompt was answered, or the chat was left."""
    model = Model.open(model_directory(args.model))
    interactive = args.prompt is None and sys.stdin.isatty()
    prompt = args.prompt
    if prompt is None and not interactive:
        prompt = sys.stdin.buffer.read().decode("utf-8", "surrogateescape")
    if prompt is not None and not prompt.strip():
        raise ShoalError("there is no prompt: give one as an argument, or on standard input")
    if len(set(args.nodes)) < len(args.nodes):
        raise ShoalError("--nodes names an address twice: give each node once")
    tokenizer = Tokenizer.open(model.path)
    template = None if args.raw else Chat.open(model.path, tokenizer)
    settings = settings_of(args, model)
    if prompt is None:
        _chat(args, model, tokenizer, template, settings)
    else:
        _answer(args, model, tokenizer, _encoded(args, tokenizer, template, _checked(prompt)), settings)
    return 0


def _encoded(args: argparse.Namespace, tokenizer: Tokenizer, template: Chat | None, prompt: str) -> list[int]:
    if template is None:
        return tokenizer.encode(prompt)
    system = [Message("system", args.system)] if args.system else []
    return template.encode([*system, Message("user", prompt)])


def _answer(
    args: argparse.Namespace, model: Model, tokenizer: Tokenizer, prompt: Sequence[int], settings: Settings
) -> None:
    check_prompt(prompt, settings.context, settings.vocab)
    with (
        open_engine(args, model, settings) as (engine, settings, _),
        closing(engine.session(settings)) as session,
    ):
        made = answer(session, tokenizer, prompt, settings, show)
    print(flush=True)
    if args.stats:
        print(f"[{made.summary()}]", file=sys.stderr)


def _chat(
    args: argparse.Namespace, model: Model, tokenizer: Tokenizer, template: Chat | None, settings: Settings
) -> None:
    from ..conversation import Conversation, say
    from ..terminal import Terminal

    with (
        open_engine(args, model, settings) as (engine, settings, where),
        closing(engine.session(settings)) as session,
    ):
        terminal = Terminal()
        say(f"{model.path.name} on {where}; /help lists the commands, Ctrl-D or /exit leaves")
        Conversation(session, tokenizer, template, settings, show, args.system, args.stats).run(terminal.ask)


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
    stops, vocab = tuple(args.stop), model.config.vocab
    return Settings(
        context_of(args.context, model), sampling, args.max_tokens, model.config.eos, stops, vocab
    )


@contextmanager
def open_engine(
    args: argparse.Namespace, model: Model, settings: Settings
) -> Iterator[tuple[Engine, Settings, str]]:
    """The nodes that the command line names, or this process; the settings with a context that fits there,
    and where it is, in words."""
    free = args.context is None
    if args.nodes:
        from ..distributed import open_nodes
        from ..plan_report import render
        from ..planning import default_workload

        workload = default_workload(settings.context, given=not free)
        with open_nodes(model, args.nodes, workload, shrink=free) as nodes:
            if args.stats:
                print(render(nodes.plan), file=sys.stderr)
            names = [stage.device for stage in nodes.plan.stages]
            where = f"{len(names)} node{'s' if len(names) > 1 else ''}, {', '.join(names)}"
            yield nodes, _with_context(settings, nodes.context), where
        return
    backend, reason = choose(args.backend)
    if reason is not None:
        print(f"shoal: running on {backend}: {reason}", file=sys.stderr)
    threads, why = chosen(args.threads, backend, args.isa)
    resident = args.resident
    if resident is None and args.prompt is not None and args.max_tokens <= _SHORT:
        resident = False
    options = StageOptions(args.backend, args.isa, threads, resident=resident)
    if free:
        settings = _with_context(settings, fitting(model, settings.context, ram()))
    with Stage(model, 0, model.n_units, options) as stage:
        where = f"{stage.backend}, {threads} thread{'s' if threads > 1 else ''}"
        if args.stats:
            print(f"[{where}{f' ({why})' if why else ''}]", file=sys.stderr)
        yield LocalEngine(stage), settings, where


def _with_context(settings: Settings, context: int) -> Settings:
    if context < settings.context:
        print(notice(context, settings.context), file=sys.stderr)
    return replace(settings, context=context)


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
