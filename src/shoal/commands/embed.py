"""`shoal embed`: an embedding of each line of a file or a pipe."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..arguments import Commands, add_command
from ..line_commands import LINES, Result, add_lines, run_lines

if TYPE_CHECKING:
    from ..llm import LLM


def add_parser(commands: Commands) -> None:
    parser = add_command(
        commands,
        "embed",
        "turn each line of text into an embedding",
        "Embeddings have length 1; the dot product of two says how alike their lines are to the model. "
        + LINES,
    )
    parser.add_argument(
        "--pooling",
        choices=("mean", "last"),
        default="mean",
        help="how the rows of a line's tokens become one vector: their mean, or the last row (default mean)",
    )
    parser.add_argument("--no-normalize", action="store_true", help="do not scale embeddings to length 1")
    add_lines(parser)


def run(args: argparse.Namespace) -> int:
    """Returns 0, or another code if lines have errors."""

    def compute(llm: LLM, texts: Sequence[str]) -> list[Result]:
        made = llm.embed(texts, pooling=args.pooling, normalize=not args.no_normalize)
        return [{"embedding": shortest(row)} for row in made]

    options = {"--pooling": args.pooling, "--no-normalize": args.no_normalize}
    return run_lines(args, options, compute)


def shortest(row: Any) -> list[float]:
    """f32 values as the numbers with the fewest digits that are the same values again."""
    return [float(str(value)) for value in row]
