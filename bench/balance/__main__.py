"""Layers that move while answers run, with and without, in the same run:

    python -m bench.balance drop [MODEL]        one device drops to 40 % of its speed, and recovers
    python -m bench.balance steady [MODEL]      nothing happens: what the rebalancer costs
    python -m bench.balance swing [MODEL]       a device is slow and quick in turns
    python -m bench.balance standstill [MODEL]  layers move to and fro: how long answers wait for it
    python -m bench.balance loss [MODEL]        one of three nodes is killed
    python -m bench.balance join [MODEL]        a node is started, killed and started again
    python -m bench.balance drain [MODEL]       a node is asked to end

The first four run in bench/lab, as root on Linux, and the others on loopback. Each round has one run in each
mode, in turns, on the same nodes: `move` is what `shoal run` does; `reload` changes the placement as often,
but ends the chain, loads anew and computes all tokens again; `off` keeps the placement. The table has
medians, and ratios of what ran in the same round. Every answer of every run is compared with that of one
process; the exit code is 1 if any differs.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import get_args

from bench.chain import streamed
from bench.lab.lab import Lab
from bench.lab.spec import read_spec
from bench.models import model_path
from bench.rounds import Samples

from shoal import planner
from shoal.engine.errors import ShoalError
from shoal.engine.model_directory import Model
from shoal.net.members import Moves
from shoal.processes import NodeSpec

from .audit import Audit
from .changes import Drain, Join, Loss, Standstill
from .company import Company, company
from .play import Cast
from .scenes import Drop, Steady, Swing, Theatre

PHONES = Path(__file__).parents[1] / "lab" / "phones.toml"
MODES: tuple[Moves, ...] = get_args(Moves)
_RAM_MB = 1000

Round = Callable[[Moves, int], object]
"""One run in a mode, and the number of the round."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0 when every answer was that of one process."""
    args = _parser().parse_args(arguments)
    modes = args.modes.split(",")
    if unknown := sorted(set(modes) - set(MODES)):
        raise SystemExit(f"--modes {','.join(unknown)}: the modes are {', '.join(MODES)}")
    model = Model.open(model_path(args.model))
    theatre = Theatre(model, Samples(), Audit(model))
    try:
        args.scene(args, theatre, modes)
    finally:
        if theatre.samples.taken:
            print(f"\n{theatre.samples.report(modes[0])}", flush=True)
    problems = theatre.audit.problems()
    print("\n".join(problems) or "every answer is that of one process")
    what = {"command": f"bench.balance {args.command}", "model_hash": model.hash}
    theatre.samples.save(args.output, {**what, "problems": problems, "runs": theatre.runs})
    return 1 if problems else 0


def _rounds(args: argparse.Namespace, modes: Sequence[Moves], one: Round) -> None:
    """All modes in each round, beginning with another one from round to round."""
    for number in range(args.rounds):
        for i in range(len(modes)):
            one(modes[(number + i) % len(modes)], number)


@contextmanager
def _lab(
    args: argparse.Namespace, theatre: Theatre, streams: int
) -> Iterator[tuple[Lab, Sequence[planner.Assignment]]]:
    """A lab with room for so many streams, and the stages with which all runs begin."""
    context = min(args.context, theatre.model.config.context)
    spec = read_spec(args.lab)
    with Lab.open(spec, theatre.model.path, context=context, sequences=streams) as lab:
        theatre.cast, theatre.nodes = Cast(theatre.model, lab.addresses, context), lab
        chain = theatre.cast.chain(streams)
        told = ", ".join(f"{stage.device} {stage.last - stage.first}" for stage in chain)
        print(f"{args.lab.stem}, {streamed(streams)}: {told}", flush=True)
        yield lab, chain


@contextmanager
def _company(args: argparse.Namespace, theatre: Theatre, slow: Sequence[float]) -> Iterator[Company]:
    context = min(args.context, theatre.model.config.context)
    specs = [NodeSpec(f"n{i + 1}", args.ram, factor) for i, factor in enumerate(slow)]
    with (
        tempfile.TemporaryDirectory(prefix="shoal-bench-") as name,
        company(theatre.model.path, specs, Path(name)) as nodes,
    ):
        theatre.cast = Cast(theatre.model, [member.address for member in nodes.members], context)
        theatre.nodes = nodes
        yield nodes


def _positions(args: argparse.Namespace, chain: Sequence[planner.Assignment]) -> Sequence[int]:
    """The stages whose devices change; by default all."""
    everywhere = range(1, len(chain) + 1)
    return [position for position in everywhere if not args.positions or position in args.positions]


def _drop(args: argparse.Namespace, theatre: Theatre, modes: Sequence[Moves]) -> None:
    for streams in args.streams:
        with _lab(args, theatre, streams) as (lab, chain):
            for position in _positions(args, chain):
                drop = Drop(lab, chain, position, streams)

                def one(mode: Moves, number: int, drop: Drop = drop) -> None:
                    trace = drop.play(theatre, mode, number)
                    if mode == modes[0] and not args.no_fresh:
                        drop.fresh(theatre, mode, number, trace)

                _rounds(args, modes, one)


def _steady(args: argparse.Namespace, theatre: Theatre, modes: Sequence[Moves]) -> None:
    for streams in args.streams:
        with _lab(args, theatre, streams) as (_, chain):
            steady = Steady(chain, streams, args.seconds)
            _rounds(args, modes, partial(steady.play, theatre))


def _swing(args: argparse.Namespace, theatre: Theatre, modes: Sequence[Moves]) -> None:
    for streams in args.streams:
        with _lab(args, theatre, streams) as (lab, chain):
            for position in _positions(args, chain):
                swing = Swing(lab, chain, position, streams, swings=args.swings)

                def one(mode: Moves, number: int, swing: Swing = swing) -> None:
                    trace = swing.play(theatre, mode, number)
                    if mode == modes[0]:
                        swing.alike(theatre, number, trace)

                _rounds(args, modes, one)


def _standstill(args: argparse.Namespace, theatre: Theatre, modes: Sequence[Moves]) -> None:
    for streams in args.streams:
        with _lab(args, theatre, streams) as (lab, chain):
            for beside in args.beside:
                still = Standstill(lab, chain, streams, args.units, args.moves, beside)
                _rounds(args, modes, partial(still.play, theatre))


def _loss(args: argparse.Namespace, theatre: Theatre, modes: Sequence[Moves]) -> None:
    with _company(args, theatre, (1.0, 1.0, 1.0)) as nodes:
        for victim in args.nodes:
            for streams, tokens in ((1, 1200), (4, 16)):
                loss = Loss(nodes, victim - 1, streams, tokens)
                _rounds(args, modes, partial(loss.play, theatre))


def _join(args: argparse.Namespace, theatre: Theatre, modes: Sequence[Moves]) -> None:
    # The newcomer is quicker: where it helps little, the coordinator rightly leaves it without layers.
    with _company(args, theatre, (6.0, 6.0, 2.0)) as nodes:
        for streams in args.streams:
            join = Join(nodes, streams)
            _rounds(args, modes, partial(join.play, theatre))


def _drain(args: argparse.Namespace, theatre: Theatre, modes: Sequence[Moves]) -> None:
    with _company(args, theatre, (1.0, 1.0, 1.0)) as nodes:
        for leaver in args.nodes:
            for streams in args.streams:
                drain = Drain(nodes, leaver - 1, streams)
                _rounds(args, modes, partial(drain.play, theatre))


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.balance",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, dest="command", metavar="SCENE")

    def add(name: str, scene: object, modes: str, rounds: int, streams: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name)
        made.set_defaults(scene=scene)
        made.add_argument("model", nargs="?", default="smollm2-135m", help="(default smollm2-135m)")
        made.add_argument("--rounds", type=int, default=rounds, metavar="N", help=f"(default {rounds})")
        made.add_argument("--modes", default=modes, metavar="MODE,...", help=f"(default {modes})")
        made.add_argument("--context", type=int, default=2048, metavar="N", help="(default 2048)")
        made.add_argument(
            "-o", "--output", type=Path, metavar="FILE", help="write every sample there, as JSON"
        )
        made.add_argument(
            "--streams",
            type=_numbers,
            default=_numbers(streams),
            metavar="N,...",
            help=f"(default {streams})",
        )
        return made

    def add_lab(made: argparse.ArgumentParser) -> argparse.ArgumentParser:
        made.add_argument("--lab", type=Path, default=PHONES, help="a TOML file (default: phones.toml)")
        return made

    def add_positions(made: argparse.ArgumentParser) -> None:
        made.add_argument(
            "--positions", type=_numbers, metavar="N,...", help="stages whose devices change (default: each)"
        )

    def add_nodes(made: argparse.ArgumentParser, default: str) -> None:
        made.add_argument("--ram", type=int, default=_RAM_MB, metavar="MB", help=f"(default {_RAM_MB})")
        made.add_argument(
            "--nodes", type=_numbers, default=_numbers(default), metavar="N,...", help=f"(default {default})"
        )

    drop = add_lab(add("drop", _drop, "move,off", 3, "4"))
    add_positions(drop)
    drop.add_argument("--no-fresh", action="store_true", help="measure no fresh plan")
    steady = add_lab(add("steady", _steady, "move,off", 5, "4"))
    steady.add_argument("--seconds", type=float, default=20.0, metavar="S", help="of a run (default 20)")
    swing = add_lab(add("swing", _swing, "move,off", 3, "4"))
    add_positions(swing)
    swing.add_argument("--swings", type=int, default=4, metavar="N", help="(default 4)")
    still = add_lab(add("standstill", _standstill, "move,reload", 3, "1,4"))
    still.add_argument("--moves", type=int, default=8, metavar="N", help="in each run (default 8)")
    still.add_argument("--units", type=int, default=1, metavar="N", help="that move at once (default 1)")
    still.add_argument(
        "--beside", type=_numbers, default=[0, 1000], metavar="N,...",
        help="tokens of a prompt that is read meanwhile; 0: none (default 0,1000)",
    )  # fmt: skip
    add_nodes(add("loss", _loss, "move,reload", 5, "1"), "2")
    add_nodes(add("join", _join, "move", 3, "4"), "3")
    add_nodes(add("drain", _drain, "move", 5, "1,4"), "1,2,3")
    return parser


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ShoalError as error:
        sys.exit(f"bench.balance: {error}")
