"""`shoal classify`: which label fits each line of a file or a pipe."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..arguments import Commands, add_command, text
from ..engine.errors import ShoalError
from ..line_commands import LINES, Result, add_lines, run_lines

if TYPE_CHECKING:
    from ..llm import LLM
    from ..results import Classification


def add_parser(commands: Commands) -> None:
    parser = add_command(
        commands,
        "classify",
        "say which label fits each line of text",
        "A model with a classification head has its own labels. Any other model needs --labels: each label "
        f"is scored as the continuation of a prompt with the line, and the likeliest one fits. {LINES}",
    )
    parser.add_argument(
        "--labels",
        type=labels,
        default={},
        metavar="NAME,NAME,...",
        help="labels to choose from; NAME=TEXT: how the prompt continues for this one (default: a space and "
        "NAME)",
    )
    parser.add_argument(
        "--prompt",
        type=text,
        metavar="TEXT",
        help='text before a label; {text} stands for the line (default "Text: {text}", and then '
        '"Label:" on a line of its own)',
    )
    parser.add_argument(
        "--neutral",
        type=text,
        metavar="TEXT",
        help="a line that says nothing, such as N/A: its scores are subtracted, so that labels which "
        "the prompt alone makes likely have no advantage",
    )
    add_lines(parser)


def labels(given: str) -> dict[str, str]:
    """Names of labels, and how a prompt continues for each."""
    found: dict[str, str] = {}
    for part in text(given).split(","):
        name, equals, continuation = part.partition("=")
        name = name.strip()
        if not name or (equals and not continuation.strip()) or name in found:
            what = "is there twice" if name in found else "is empty"
            raise argparse.ArgumentTypeError(f"a label of {given!r} {what}")
        found[name] = continuation if equals else f" {name}"
    if len(found) < 2:
        raise argparse.ArgumentTypeError(
            f"{given!r} is one label: give two or more, with commas between them"
        )
    return found


def run(args: argparse.Namespace) -> int:
    """Returns 0, or another code if lines have errors."""
    if args.prompt is not None and "{text}" not in args.prompt:
        raise ShoalError("--prompt lacks {text}, where each line stands")

    def compute(llm: LLM, texts: Sequence[str]) -> list[Result]:
        return [_result(found) for found in llm.classify(texts, **_options(llm, args))]

    options = {"--labels": args.labels, "--prompt": args.prompt, "--neutral": args.neutral}
    return run_lines(args, options, compute)


def _options(llm: LLM, args: argparse.Namespace) -> Mapping[str, Any]:
    """The arguments of LLM.classify. ShoalError: they do not go with the model."""
    given = {"labels": args.labels, "prompt": args.prompt, "neutral": args.neutral}
    given = {name: value for name, value in given.items() if value}
    own = llm.model.config.labels
    if own and given:
        raise ShoalError(f"the model has a head with labels of its own: leave --{next(iter(given))} out")
    if not own and "labels" not in given:
        raise ShoalError("the model has no classification head: give --labels to choose from")
    return given


def _result(found: Classification) -> Result:
    result: Result = {"label": found.label}
    if found.probabilities:
        result["probabilities"] = dict(found.probabilities)
    else:  # a head for regression
        result["scores"] = dict(found.scores)
    return result
