"""`shoal score`: how likely each line of a file or a pipe is."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..arguments import Commands, add_command, text
from ..engine.errors import ContextError
from ..line_commands import LINES, Result, add_lines, run_lines

if TYPE_CHECKING:
    from ..llm import LLM
    from ..results import Score


def add_parser(commands: Commands) -> None:
    parser = add_command(
        commands,
        "score",
        "say how likely each line of text is",
        "A result has the number of tokens that were scored, their natural log-probability, and the "
        f"perplexity for each of them. {LINES}",
    )
    parser.add_argument(
        "--prompt",
        type=text,
        default="",
        metavar="TEXT",
        help="text before each line, which is not scored (default: none; the first token of a line, which "
        "nothing precedes, is then not scored)",
    )
    parser.add_argument("--tokens", action="store_true", help="add the log-probability of each token")
    add_lines(parser)


def run(args: argparse.Namespace) -> int:
    """Returns 0, or another code if lines have errors."""

    def compute(llm: LLM, texts: Sequence[str]) -> list[Result]:
        if not args.prompt and any(llm.count(one) < 2 for one in texts):
            raise ContextError(
                "the first token of a line has no score, and the line has no other: give --prompt"
            )
        return [_result(score, args.tokens) for score in llm.score(texts, prompt=args.prompt)]

    return run_lines(args, {"--prompt": args.prompt, "--tokens": args.tokens}, compute)


def _result(score: Score, tokens: bool) -> Result:
    mean = -score.logprob / len(score.logprobs) if score.logprobs else math.inf
    result: Result = {
        "tokens": len(score.tokens),
        "logprob": score.logprob,
        "perplexity": math.exp(mean) if mean < 700 else None,
    }
    if tokens:
        result["ids"] = list(score.tokens)
        result["logprobs"] = list(score.logprobs)
    return result
