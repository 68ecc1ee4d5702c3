"""What `shoal score`, `classify` and `embed` have in common: a result for each line of a file or a pipe, in
batches, with progress, resumable."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import (
    add_alone,
    add_engine,
    add_insecure,
    add_model,
    add_nodes,
    add_private,
    check_nodes,
    positive,
)
from .engine.errors import ContextError, ShoalError
from .imports import quick_imports

if TYPE_CHECKING:
    from .lines import Line
    from .llm import LLM

    Compute = Callable[[LLM, Sequence[str]], list[dict[str, Any]]]
    """The results of texts, computed together. ContextError: one of them does not fit."""

Result = dict[str, Any]
SOME_FAILED = 19
"""Exit code: some lines have an error instead of a result."""
LINES = (
    "Each line of UTF-8 text gives one line of JSON, in order. A line that is empty, not UTF-8 or too "
    f"long for the context has an error in place of its result; the exit code is then {SOME_FAILED}."
)


def add_lines(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of a command that works on lines."""
    add_model(parser)
    parser.add_argument("file", metavar="FILE", nargs="?", help="lines of text (default: standard input)")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help="write the results to FILE (default: standard output)",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue -o FILE after the last line that it has, however the command ended before; FILE.job "
        "describes the job",
    )
    parser.add_argument(
        "--batch", type=positive, default=32, metavar="N", help="lines computed together (default 32)"
    )
    parser.add_argument(
        "--context",
        type=positive,
        metavar="N",
        help="context length in tokens, the most that a line may have (default: the model's, or the largest "
        "that fits in RAM)",
    )
    add_nodes(
        parser,
        "compute on these nodes (default: on the devices of `shoal up`, if it runs here with this model, "
        "else in this process)",
    )
    add_insecure(parser)
    add_private(parser)
    add_alone(parser)
    add_engine(parser)


def run_lines(args: argparse.Namespace, options: Result, compute: Compute) -> int:
    """Runs the command: `compute` gives the results of a batch; `options` are those that results depend on,
    with the names that the command line has for them. Returns 0, or SOME_FAILED."""
    from .line_job import open_sink
    from .lines import open_lines
    from .progress import Progress

    with ExitStack() as stack:
        lines = stack.enter_context(open_lines(args.file))
        llm = stack.enter_context(_open(args))
        job = {
            "command": args.command,
            "MODEL": llm.model.hash,
            "--context": llm.context,
            **options,
        }
        sink = stack.enter_context(open_sink(args.output, job, lines, resume=args.resume))
        quiet = args.output is None and sys.stdout.isatty()
        progress = None if quiet else stack.enter_context(Progress(args.command, unit="lines"))
        left = lines.left()
        total = None if left is None else lines.taken + left
        if progress:
            progress.update(lines.taken, total)
        while batch := lines.take(args.batch):
            sink.write(results(llm, batch, compute), lines)
            if progress:
                progress.update(lines.taken, total)
    if sink.state.errors:
        print(f"shoal: {sink.state.errors} of {sink.state.lines} lines have an error", file=sys.stderr)
        return SOME_FAILED
    return 0


def results(llm: LLM, batch: Sequence[Line], compute: Compute) -> list[Result]:
    """The results of lines, each with its number, in their order."""
    found: dict[int, Result] = {line.number: {"error": line.error} for line in batch if line.error}
    good = [line for line in batch if not line.error]
    made = _computed(llm, [line.text for line in good], compute) if good else []
    found |= {line.number: result for line, result in zip(good, made, strict=True)}
    return [{"line": line.number, **found[line.number]} for line in batch]


def _computed(llm: LLM, texts: Sequence[str], compute: Compute) -> list[Result]:
    """Results of texts; those that do not fit the context have an error."""
    try:
        return compute(llm, texts)
    except ContextError as error:
        if len(texts) == 1:
            return [{"error": str(error)}]
    half = len(texts) // 2  # the others are still computed together, and lengths are checked at once
    return [*_computed(llm, texts[:half], compute), *_computed(llm, texts[half:], compute)]


@contextmanager
def _open(args: argparse.Namespace) -> Iterator[LLM]:
    with quick_imports():
        from .contexts import context_of
        from .engine.backends import choose
        from .engine.model_directory import Model
        from .first_use import model_directory
        from .llm import LLM
        from .local.choice import head_for, may_ask, waiting_told

    check_nodes(args.nodes)
    local = {"--threads": args.threads is not None, "--resident": args.resident is not None}
    local |= {"--backend": args.backend != "auto", "--isa": args.isa != "auto"}
    for flag, given in local.items():
        if args.nodes and given:
            raise ShoalError(f"{flag} does not go with --nodes, which compute: give it to `shoal node`")
    if args.nodes:
        with _over_nodes(args) as llm:
            yield llm
        return
    if may_ask(args):
        model = Model.open(model_directory(args.model))
        if (head := head_for(args, model)) is not None:
            with closing(head), waiting_told(head):
                context = context_of(args.context, model)
                yield LLM.over(model, head, min(context, head.welcome.context or context))
            return
    backend, reason = choose(args.backend)
    if reason is not None:
        print(f"shoal: running on {backend}: {reason}", file=sys.stderr)
    options = {"backend": args.backend, "isa": args.isa, "threads": args.threads, "resident": args.resident}
    with LLM(args.model, context=args.context, **options) as llm:
        yield llm


@contextmanager
def _over_nodes(args: argparse.Namespace) -> Iterator[LLM]:
    from .contexts import context_of
    from .engine.model_directory import Model
    from .first_use import model_directory
    from .llm import LLM
    from .nodes import open_nodes
    from .planning import default_workload
    from .private import private_of

    def tell(text: str) -> None:
        print(f"shoal: {text}", file=sys.stderr, flush=True)

    model, free = Model.open(model_directory(args.model)), args.context is None
    context = context_of(args.context, model)
    workload = default_workload(context, given=not free)
    options = {"insecure": args.insecure, "private": private_of(args.private)}
    with open_nodes(model, args.nodes, workload, shrink=free, log=tell, **options) as nodes:
        yield LLM.over(model, nodes, min(context, nodes.context))
