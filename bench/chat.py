"""How long a chat's turns wait for their first token, and how many rows each computes:

    python -m bench.chat MODEL [--nodes] [--turns 10] [--prompt 48] [--answer 16] [--threads 1] [--rounds 3]

A turn's prompt is the whole conversation and some new tokens. Its answer is compared with that of a session
that has computed nothing before. `--nodes`: over three nodes on this machine, none of which holds the model
alone; what they answer is compared with one process. The chat is held anew in each round, and the least
time of each turn counts: neighbours on the machine only ever add to it."""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from shoal import planner
from shoal.answering import Engine, LocalEngine, Settings
from shoal.commands.demo import specs
from shoal.engine.batch import Result, Run, Sampling
from shoal.engine.model_directory import Model
from shoal.engine.stage import Stage, StageOptions
from shoal.plan_report import render
from shoal.processes import nodes
from shoal.text_table import table

from .models import model_path

DEVICES = (("one", 1.0, 0.42), ("two", 1.0, 0.42), ("three", 1.0, 0.42))
"""Nodes of one speed, and the share of the layers that each has room for."""
WARM = 2  # answers before the chat: the first ones find cold caches


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn: tokens of its prompt, rows that were computed for it, seconds to the first token, in the chat
    and in a session of its own, and whether both gave the same tokens."""

    prompt: int
    rows: int
    first_s: float
    fresh_s: float
    same: bool


class Counted:
    """A stage's engine, and the rows that it has computed."""

    def __init__(self, stage: Stage) -> None:
        self.engine, self.rows, self._run = LocalEngine(stage), 0, stage.run
        stage.run = self.run  # type: ignore[method-assign]

    def run(self, batch: Sequence[Run]) -> list[Result]:
        """As the stage does."""
        self.rows += sum(len(run.tokens) for run in batch)
        return self._run(batch)


def chat(
    engine: Engine,
    rows: Callable[[], int],
    fresh: Callable[[Sequence[int]], tuple[list[int], float]],
    settings: Settings,
    turns: Sequence[Sequence[int]],
) -> list[Turn]:
    """Turns of one session, each beside what `fresh` says of its prompt: an answer and the time to its first
    token."""
    said, known = [], list[int]()
    with closing(engine.session(settings)) as session:
        for new in turns:
            prompt, before, start = [*known, *new], rows(), time.perf_counter()
            first, answer = 0.0, list[int]()
            for token in session.answer(prompt, max_tokens=settings.max_tokens or 1, end=()):
                first = first or time.perf_counter() - start
                answer.append(token)
            computed = rows() - before
            expected, seconds = fresh(prompt)
            said.append(Turn(len(prompt), computed, first, seconds, answer == expected))
            known = prompt + answer
    return said


def best(rounds: Sequence[Sequence[Turn]]) -> list[Turn]:
    """Each turn with its least times; the same tokens if they were so in every round."""
    return [
        replace(
            turns[0],
            first_s=min(turn.first_s for turn in turns),
            fresh_s=min(turn.fresh_s for turn in turns),
            same=all(turn.same and turn.rows == turns[0].rows for turn in turns),
        )
        for turns in zip(*rounds, strict=True)
    ]


def once(engine: Engine, settings: Settings, prompt: Sequence[int]) -> tuple[list[int], float]:
    """The answer of a session of its own, and the time to its first token."""
    with closing(engine.session(settings)) as session:
        first, answer, start = 0.0, list[int](), time.perf_counter()
        for token in session.answer(prompt, max_tokens=settings.max_tokens or 1, end=()):
            first = first or time.perf_counter() - start
            answer.append(token)
    return answer, first


@contextmanager
def over_nodes(model: Model, context: int) -> Iterator[tuple[Engine, Callable[[], int]]]:
    """Three nodes as an engine, and the rows that each stage has computed."""
    from shoal.nodes import open_nodes

    with (
        tempfile.TemporaryDirectory(prefix="shoal-bench-") as directory,
        nodes(model.path, specs(model, DEVICES, context, Path(directory)), Path(directory)) as running,
        open_nodes(model, [node.address for node in running], planner.Workload(context)) as engine,
    ):
        print(render(engine.plan), file=sys.stderr)

        def rows() -> int:
            work = [(report.stats.prefill.rows, report.stats.decode.rows) for report in engine.stats()[0]]
            return sum(map(sum, work)) // len(work)

        yield engine, rows


def rows_of(turns: Sequence[Turn]) -> list[list[str]]:
    """Lines of the table."""
    return [
        [
            str(i),
            str(turn.prompt),
            str(turn.rows),
            f"{turn.first_s * 1e3:.1f}",
            f"{turn.fresh_s * 1e3:.1f}",
            "yes" if turn.same else "NO",
        ]
        for i, turn in enumerate(turns, 1)
    ]


HEADER = ["turn", "tokens", "rows computed", "first token, ms", "from nothing, ms", "same tokens"]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.chat", description="Turns of a chat.")
    parser.add_argument("model")
    parser.add_argument("--nodes", action="store_true", help="over three nodes on this machine")
    for name, default in (
        ("--turns", 10),
        ("--prompt", 48),
        ("--answer", 16),
        ("--threads", 1),
        ("--rounds", 3),
    ):
        parser.add_argument(name, type=int, default=default, metavar="N", help=f"(default {default})")
    args = parser.parse_args(arguments)
    model = Model.open(model_path(args.model))
    rng = np.random.default_rng(0)
    turns = [[int(t) for t in rng.integers(3, model.program.vocab, args.prompt)] for _ in range(args.turns)]
    context = min(args.turns * (args.prompt + args.answer), model.config.context)
    settings = Settings(context, Sampling(temperature=0.8, repetition_penalty=1.1, seed=1), args.answer)
    with Stage(model, 0, model.n_units, StageOptions(threads=args.threads)) as stage:
        counted = Counted(stage)

        def alone(prompt: Sequence[int]) -> tuple[list[int], float]:
            return once(counted.engine, settings, prompt)

        if args.nodes:
            with over_nodes(model, context) as (engine, rows):
                for _ in range(WARM):
                    once(engine, settings, turns[0])
                rounds = [chat(engine, rows, alone, settings, turns) for _ in range(args.rounds)]
        else:
            # A session of its own beside the chat's: the stage of one process has one sequence number.
            for _ in range(WARM):
                alone(turns[0])
            with Stage(model, 0, model.n_units, StageOptions(threads=args.threads)) as other:
                talking = Counted(other)
                once(talking.engine, settings, turns[0])
                rounds = [
                    chat(talking.engine, lambda: talking.rows, alone, settings, turns)
                    for _ in range(args.rounds)
                ]
    said = best(rounds)
    print(table(HEADER, rows_of(said)))
    if len(said) > 1:
        middle = statistics.median(turn.first_s for turn in said[1:])
        print(
            f"\nFirst token of the last turn after {said[-1].first_s / said[1].first_s:.2f} times as long as "
            f"of the second (median of all but the first: {middle * 1e3:.1f} ms); from nothing "
            f"{said[-1].fresh_s / said[-1].first_s:.1f} times."
        )
    return 0 if all(turn.same for turn in said) else 1


if __name__ == "__main__":
    sys.exit(main())
