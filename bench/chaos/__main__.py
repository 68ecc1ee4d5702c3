"""Seeded faults under real nodes: python -m bench.chaos --seed S --trials N [--moves M] [--kinds kill,freeze]

In each trial four answers are under way in a chain of three of four nodes, half of them drawn with a seed,
when a fault strikes. The trial passes if all answers are those of one undisturbed process, none stood still
for longer than twice the adaptive bound of silence, and nothing leaks: no process, file descriptor, file or
memory. With `--moves M`, layers move M times a trial to random stages on random nodes, half of the times at
about the time of the fault; the run passes only if as many moves as trials were carried out. `--first I`
begins with trial I of a seed, to repeat a failure.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import trio
from tests.models import tiny_chat_checkpoint

from shoal.engine.convert import convert
from shoal.engine.generate import generate
from shoal.engine.model_directory import Model
from shoal.engine.stage import Stage
from shoal.store import resolve

from . import blocked
from .faults import AROUND, KINDS
from .fleet import Fleet, fleet
from .head import Ask
from .proxy import Gate, Network
from .trial import STREAMS, Outcome, Trial, asks, leaks, run

NODES, SLOW = 4, 60.0
GROWTH_MB = 30
"""Resident memory that a node may gain from its first trial to its last."""


def main(arguments: Sequence[str]) -> int:
    """Exit code 0 when all trials have passed."""
    parser = argparse.ArgumentParser(prog="python -m bench.chaos", description=__doc__)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--trials", type=int, required=True)
    parser.add_argument("--first", type=int, default=0, metavar="I", help="the first trial (default 0)")
    known = (*KINDS, blocked.KIND)
    parser.add_argument("--kinds", default=",".join(known), help=f"default: {','.join(known)}")
    parser.add_argument(
        "--longest", type=float, default=60.0, metavar="S", help="the longest fault, in seconds (default 60)"
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="J", help="trials at a time (default 1)")
    parser.add_argument("--moves", type=int, default=0, metavar="M", help="in each trial (default 0)")
    parser.add_argument("--model", help="a name from `shoal ls`, or a path (default: a tiny random model)")
    args = parser.parse_args(arguments)
    kinds = args.kinds.split(",")
    unknown = set(kinds) - set(known)
    if unknown:
        parser.error(f"no such kinds: {', '.join(sorted(unknown))}")
    with tempfile.TemporaryDirectory(prefix="shoal-chaos-") as name:
        directory = Path(name)
        if args.model is None:
            model, slow = directory / "model", SLOW
            convert(tiny_chat_checkpoint(directory / "checkpoint"), model)
        else:
            model, slow = resolve(args.model), 1.0
        with ExitStack() as stack:
            outcomes = list[Outcome]()
            fleets = []
            for job in range(args.jobs):
                own = directory / f"job-{job}"
                own.mkdir()
                fleets.append(stack.enter_context(fleet(model, own, NODES, slow)))
            trio.run(_jobs, fleets, model, args, kinds, outcomes)
    print(table(outcomes))
    moved, moving = sum(o.moved for o in outcomes), [o for o in outcomes if o.kind != blocked.KIND]
    if args.moves:
        print(f"{moved} moves were carried out of {args.moves * len(moving)} that were asked for")
    idle = bool(args.moves) and moved < len(moving)
    return 1 if idle or any(outcome.problems for outcome in outcomes) else 0


async def _jobs(
    fleets: Sequence[Fleet],
    path: Path,
    args: argparse.Namespace,
    kinds: Sequence[str],
    outcomes: list[Outcome],
) -> None:
    numbers = iter(range(args.first, args.first + args.trials))
    async with trio.open_nursery() as jobs:
        for nodes in fleets:
            jobs.start_soon(_trials, nodes, path, args, numbers, kinds, outcomes)


async def _trials(
    nodes: Fleet,
    path: Path,
    args: argparse.Namespace,
    numbers: Iterator[int],
    kinds: Sequence[str],
    outcomes: list[Outcome],
) -> None:
    """The trials that one fleet gets to."""
    model, seed = Model.open(path), args.seed
    for number in numbers:
        await nodes.mend()
        kind, rng = kinds[number % len(kinds)], random.Random(f"{seed} {number}")
        questions = asks(rng, model.program.vocab)
        expected = answers(model, questions)
        async with trio.open_nursery() as gates:
            network = Network()
            for node in nodes.nodes.values():
                assert node.running is not None
                gate = Gate(node.name, node.running.address)
                network.gates.append(gate)
                await gates.start(gate.serve, network)
            trial = Trial(kind, rng, args.longest, path, nodes, network, args.moves)
            if kind == blocked.KIND:
                outcome = await blocked.run(trial)
            else:
                outcome = await run(trial, KINDS[kind], AROUND.get(kind), expected, questions)
            gates.cancel_scope.cancel()
        for node in nodes.nodes.values():
            node.thaw()
            node.hung.close()
        found = await leaks(nodes)
        for node in nodes.nodes.values():
            if len(node.rss) > 1 and node.rss[-1] - node.rss[0] > GROWTH_MB * 1e6:
                found.append(f"{node.name} has grown by {(node.rss[-1] - node.rss[0]) / 1e6:.0f} MB")
        outcome = Outcome(
            **{**{f: getattr(outcome, f) for f in outcome.__slots__}, "problems": (*outcome.problems, *found)}
        )
        outcomes.append(outcome)
        verdict = "; ".join(outcome.problems) or "passed"
        print(
            f"{seed}/{number} {kind}: still {outcome.still:.2f} s, {outcome.recoveries} recoveries, "
            f"{outcome.moved} moves, {outcome.seconds:.1f} s: {verdict}",
            file=sys.stderr,
            flush=True,
        )
        if outcome.problems:
            print(outcome.log, file=sys.stderr, flush=True)


def answers(model: Model, questions: Sequence[Ask]) -> list[list[int]]:
    """What one undisturbed process answers."""
    with Stage(model, 0, model.n_units) as stage:
        return [
            list(generate(stage, ask.prompt, ask.sampling, max_tokens=ask.tokens, end=()))
            for ask in questions
        ]


def table(outcomes: Sequence[Outcome]) -> str:
    """A row for each kind."""
    lines = [
        "| kind | trials | passed | answers equal | still s, median | worst | bound | recoveries | moves |",
        "|-|-:|-:|-:|-:|-:|-:|-:|-:|",
    ]
    for kind in dict.fromkeys(outcome.kind for outcome in outcomes):
        rows = [outcome for outcome in outcomes if outcome.kind == kind]
        still = [row.still for row in rows]
        lines.append(
            f"| {kind} | {len(rows)} | {sum(not row.problems for row in rows)} "
            f"| {sum(row.equal for row in rows)} of {STREAMS * len(rows)} "
            f"| {statistics.median(still):.2f} | {max(still):.2f} | {max(row.bound for row in rows):.2f} "
            f"| {sum(row.recoveries for row in rows)} | {sum(row.moved for row in rows)} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
