"""What `shoal.LLM` costs beside the loops below it, in pairs within one process:

    python -m bench.facade MODEL [--tokens 64] [--prompts 32] [--rounds 7]

One stream: `LLM.generate` over `engine.generate` with the same prompt. Prompts: tokens/s of `LLM.generate`
of a list over a loop that runs the same rows on the stage and does nothing else, as `shoal bench --batch`
does. Each round gives a ratio, since speeds drift."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

from shoal import LLM
from shoal.answering import LocalEngine
from shoal.engine.batch import Run, Sampling, Want
from shoal.engine.generate import generate
from shoal.engine.stage import Stage
from shoal.text_table import table

from .models import model_path

PROMPT = 16  # tokens


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.facade", description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args(argv)
    with LLM(model_path(args.model), context=PROMPT + args.tokens) as llm:
        assert isinstance(llm._engine, LocalEngine)
        stage, tokens = llm._engine.stage, args.tokens
        prompts = [[7 * i + j + 1 for j in range(PROMPT)] for i in range(args.prompts)]

        def loop() -> object:
            return list(generate(stage, prompts[0], max_tokens=tokens, end=()))

        def one() -> object:
            return llm.generate(prompts[0], max_tokens=tokens, end=())

        def rows() -> object:
            return batch_loop(stage, prompts, tokens)

        def many() -> object:
            return llm.generate(prompts, max_tokens=tokens, end=())

        rows_of = [
            measured("1 prompt", loop, one, tokens, args.rounds),
            measured(f"{len(prompts)} prompts", rows, many, tokens * len(prompts), args.rounds),
        ]
    print(table(["", "loop tokens/s", "LLM tokens/s", "LLM / loop", "rounds"], rows_of))
    return 0


def batch_loop(stage: Stage, prompts: list[list[int]], tokens: int) -> None:
    """Prompts in calls as large as the stage accepts, then rows of all sequences together."""
    known = [list(prompt) for prompt in prompts]
    most = max(1, stage.options.max_rows // len(prompts[0]))
    for sequence in range(len(prompts)):
        stage.open_sequence(sequence, Sampling())
    for at in range(0, len(prompts), most):
        runs = [Run(s, 0, known[s], Want.TOKEN) for s in range(at, min(at + most, len(prompts)))]
        for run, result in zip(runs, stage.run(runs), strict=True):
            assert result.token is not None, "it was wanted"
            known[run.sequence].append(result.token)
    for _ in range(tokens - 1):
        results = stage.run([Run(s, len(row) - 1, row[-1:], Want.TOKEN) for s, row in enumerate(known)])
        for row, result in zip(known, results, strict=True):
            assert result.token is not None, "it was wanted"
            row.append(result.token)
    for sequence in range(len(prompts)):
        stage.close_sequence(sequence)


def measured(
    name: str, loop: Callable[[], object], facade: Callable[[], object], tokens: int, rounds: int
) -> list[str]:
    """A row of the table: medians, and the median and range of the ratios of rounds."""
    loop(), facade()
    pairs: list[tuple[float, float]] = []
    for number in range(rounds):
        order = (loop, facade) if number % 2 == 0 else (facade, loop)
        times = {work: seconds(work) for work in order}
        pairs.append((times[loop], times[facade]))
    ratios = sorted(one / other for one, other in pairs)
    return [
        name,
        f"{tokens / statistics.median(one for one, _ in pairs):.1f}",
        f"{tokens / statistics.median(other for _, other in pairs):.1f}",
        f"{statistics.median(ratios):.3f} ({ratios[0]:.3f}-{ratios[-1]:.3f})",
        str(rounds),
    ]


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    raise SystemExit(main())
