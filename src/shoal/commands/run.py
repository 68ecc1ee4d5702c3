"""`shoal run`: answers one prompt, or chats on a terminal, in this process or on nodes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING

from ..arguments import (
    SHORT_ANSWER,
    Commands,
    add_alone,
    add_command,
    add_context,
    add_engine,
    add_insecure,
    add_model,
    add_moves,
    add_nodes,
    add_private,
    add_wait,
    check_nodes,
    factor,
    fraction,
    non_negative,
    positive,
    whole,
)
from ..engine.errors import ShoalError
from ..imports import quick_imports

if TYPE_CHECKING:
    from ..engine.model_directory import Model
    from ..llm import LLM, Options
    from ..local.reconnecting import ReconnectingEngine


def add_parser(commands: Commands) -> None:
    parser = add_command(
        commands,
        "run",
        "answer a prompt, or chat",
        "Without PROMPT it is a chat if standard input is a terminal; otherwise the prompt is read from "
        "there. MODEL may also be a SOURCE of `shoal pull` (hf:ORG/NAME, a .gguf file, a checkpoint "
        "directory), which is converted on first use.",
    )
    add_model(parser)
    parser.add_argument("prompt", metavar="PROMPT", nargs="?", help="text to answer")
    add_nodes(
        parser,
        "run on these nodes (default: on the devices of `shoal up`, if it runs here with this model, else in "
        "this process)",
    )
    add_insecure(parser)
    add_private(parser)
    add_alone(parser)
    add_wait(parser)
    add_moves(parser)
    texts = parser.add_argument_group("text")
    texts.add_argument(
        "-n",
        "--max-tokens",
        type=positive,
        default=512,
        metavar="N",
        help="end an answer after N tokens (default 512)",
    )
    texts.add_argument("--system", metavar="TEXT", help="system message (default: the model's own)")
    texts.add_argument("--raw", action="store_true", help="continue PROMPT without the chat template")
    texts.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end an answer before TEXT; can be given several times",
    )
    add_context(texts)
    sampling = parser.add_argument_group("sampling")
    for flag, metavar, kind, default, text in (
        ("--temperature", "T", non_negative, 0.0, "randomness; 0: always the most likely token (default 0)"),
        ("--top-k", "K", whole, 0, "draw from the K most likely tokens; 0: from all (default 0)"),
        ("--top-p", "P", fraction, 1.0, "draw from the likeliest tokens of total probability P (default 1)"),
        ("--min-p", "P", fraction, 0.0, "exclude tokens less likely than P times the likeliest (default 0)"),
        ("--repeat-penalty", "R", factor, 1.0, "penalise tokens that occurred before (default 1: off)"),
        ("--seed", "S", whole, None, "the same seed gives the same answer (default: a new one each time)"),
    ):
        sampling.add_argument(flag, metavar=metavar, type=kind, default=default, help=text)
    add_engine(parser)
    parser.add_argument(
        "--stats",
        action="store_true",
        help="print times and tokens/s on standard error after an answer, and at the end which layers moved",
    )


def run(args: argparse.Namespace) -> int:
    """Returns 0 when the prompt was answered, or the chat has ended."""
    with quick_imports():
        from ..contexts import context_of
        from ..engine.chat import Chat, Message
        from ..engine.generate import check_prompt
        from ..engine.model_directory import Model
        from ..engine.tokenizer import Tokenizer
        from ..first_use import model_directory

    model = Model.open(model_directory(args.model))
    model.check_generates()
    prompt = _prompt(args)
    check_nodes(args.nodes)
    tokenizer = Tokenizer.open(model.path)
    template = None if args.raw else Chat.open(model.path, tokenizer)
    options, context = options_of(args), context_of(args.context, model)
    tokens: list[int] = []
    if prompt is not None:
        system = [Message("system", args.system)] if args.system else []
        messages = [*system, Message("user", prompt)]
        tokens = tokenizer.encode(prompt) if template is None else template.encode(messages)
        check_prompt(tokens, context, model.config.vocab)
    with open_llm(args, model, context) as (llm, where):
        llm.tokenizer = tokenizer
        if template is not None:
            llm.template = template
        if prompt is None:
            from ..conversation import Conversation, Terminal, say

            say(f"{model.path.name} on {where}; /help lists the commands, Ctrl-D or /exit leaves")
            with llm.session(system=args.system or None, raw=args.raw, **options) as session:
                Conversation(session, show, args.stats).run(Terminal().ask)
            return 0
        with llm.generate(tokens, stream=True, **options) as stream:
            for piece in stream:
                show(piece)
    print(flush=True)
    if args.stats:
        print(f"[{stream.completion.summary()}]", file=sys.stderr)
    return 0


def _prompt(args: argparse.Namespace) -> str | None:
    """The prompt of the command line or of standard input. None: this is a chat. ShoalError: it is empty or
    not UTF-8."""
    from ..streams import read_text

    prompt: str | None = args.prompt
    if prompt is None:
        if sys.stdin.isatty():
            return None
        prompt = read_text(sys.stdin)
    if not prompt.strip():
        raise ShoalError("there is no prompt: give one as an argument, or on standard input")
    try:
        prompt.encode("utf-8")  # Python passes other bytes on as surrogates
    except UnicodeEncodeError:
        raise ShoalError("the prompt is not UTF-8: give it as UTF-8 text") from None
    return prompt


def options_of(args: argparse.Namespace) -> Options:
    """The command line's options of an answer. ShoalError: one is out of range."""
    from ..engine.batch import Sampling
    from ..llm import Options

    options = Options(
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repetition_penalty=args.repeat_penalty,
    )
    if args.seed is not None:
        options["seed"] = args.seed
    try:
        Sampling(**options)  # type: ignore[misc]
    except ValueError as error:
        raise ShoalError(str(error)) from None
    return options | Options(max_tokens=args.max_tokens, stop=args.stop)


@contextmanager
def open_llm(args: argparse.Namespace, model: Model, context: int) -> Iterator[tuple[LLM, str]]:
    """The model on the nodes of the command line, on the head of this device, or in this process, with a
    context length that fits there; and a description of where that is."""
    from ..answering import LocalEngine
    from ..contexts import fitting
    from ..engine.backends import choose
    from ..engine.host import ram
    from ..engine.stage import Stage, StageOptions
    from ..engine.threads import chosen
    from ..llm import LLM
    from ..local.choice import head_for, waiting_told

    free = args.context is None
    if args.nodes:
        from ..nodes import open_nodes
        from ..plan_report import render
        from ..planning import default_workload
        from ..private import private_of

        workload = default_workload(context, given=not free)
        with open_nodes(
            model,
            args.nodes,
            workload,
            shrink=free,
            wait=args.wait,
            moves=args.moves,
            insecure=args.insecure,
            private=private_of(args.private),
            log=tell,
        ) as nodes:
            if args.stats:
                print(render(nodes.plan), file=sys.stderr)
            names = [stage.device for stage in nodes.plan.stages]
            where = f"{len(names)} node{'s' if len(names) > 1 else ''}, {', '.join(names)}"
            yield LLM.over(model, nodes, _noticed(nodes.context, context)), where
            if args.stats:
                for move in nodes.moves():
                    print(f"[{move.line()}]", file=sys.stderr)
        return
    if (head := head_for(args, model)) is not None:
        with closing(head), waiting_told(head):
            yield _on_head(args, model, head, context)
        return
    backend, reason = choose(args.backend)
    if reason is not None:
        print(f"shoal: running on {backend}: {reason}", file=sys.stderr)
    threads, why = chosen(args.threads, backend, args.isa)
    resident = args.resident
    if resident is None and args.prompt is not None and args.max_tokens <= SHORT_ANSWER:
        resident = False
    options = StageOptions(args.backend, args.isa, threads, resident=resident)
    if free:
        context = _noticed(fitting(model, context, ram()), context)
    with Stage(model, 0, model.n_units, options) as stage:
        where = f"{stage.backend}, {threads} thread{'s' if threads > 1 else ''}"
        if args.stats:
            print(f"[{where}{f' ({why})' if why else ''}]", file=sys.stderr)
        with closing(LocalEngine(stage)) as engine:
            yield LLM.over(model, engine, context), where


def _on_head(
    args: argparse.Namespace, model: Model, head: ReconnectingEngine, context: int
) -> tuple[LLM, str]:
    """The model on the head of this device, and a description of it if that is shown."""
    from ..llm import LLM
    from ..local.choice import where

    described = where(head) if args.stats or args.prompt is None else ""
    if args.stats:
        print(f"[on {described}]", file=sys.stderr)
    return LLM.over(model, head, _noticed(head.welcome.context or context, context)), described


def _noticed(context: int, wanted: int) -> int:
    """The context length; says so if it is less than was wanted."""
    from ..contexts import notice

    if context < wanted:
        print(notice(context, wanted), file=sys.stderr)
    return context


def tell(text: str) -> None:
    """Prints a sentence about the nodes."""
    print(f"shoal: {text}", file=sys.stderr, flush=True)


def show(text: str) -> None:
    """Prints a piece of an answer at once."""
    print(text, end="", flush=True)
