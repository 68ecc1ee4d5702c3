"""`shoal run` in this process: no event loop, and weights that are mapped where reading them does not pay."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.models import smollm2_dir

from shoal import planner
from shoal.answering import LocalEngine
from shoal.arguments import build_parser
from shoal.cli import main
from shoal.commands import run
from shoal.engine.convert import convert
from shoal.engine.errors import MissingDependencyError
from shoal.engine.model_directory import Model
from shoal.engine.stage import StageOptions
from shoal.net.events import Moved, Shift
from shoal.net.messages import Epoch
from shoal.net.moves import Move
from shoal.planning import planner_model

TINY = Path(__file__).parents[1] / "fixtures" / "tiny-llama"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("models") / "tiny"
    convert(TINY, target, dtype="int8")
    return target


@pytest.fixture(scope="module")
def smollm2() -> Path:
    return smollm2_dir()


@pytest.mark.parametrize(
    ("line", "resident"),
    [
        ("text -n 16", False),
        ("text -n 17", None),
        ("text -n 1 --resident", True),
        ("text --no-resident", False),
        ("-n 1", None),  # a chat goes on
    ],
)
def test_a_short_answer_maps_the_weights(line: str, resident: bool | None, tiny: Path) -> None:
    args = build_parser().parse_args(["run", str(tiny), *line.split()])
    model = Model.open(tiny)
    with run.open_llm(args, model, 64) as (llm, _):
        assert isinstance(llm._engine, LocalEngine)
        assert llm._engine.stage.options.resident is resident


@pytest.mark.slow
def test_the_same_text_mapped_and_resident(smollm2: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = []
    for more in ("--resident", "--no-resident"):
        assert main(["run", str(smollm2), "The ferry", "--raw", "-n", "8", more]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    assert said[0].strip()


@pytest.mark.slow
def test_a_conversation_ends_with_the_input(
    smollm2: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = iter(["", "The ferry", "was late"])

    def typed(prompt: str) -> str:
        for line in lines:
            return line
        raise EOFError

    monkeypatch.setattr("builtins.input", typed)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    assert main(["run", str(smollm2), "--raw", "-n", "2"]) == 0
    assert len(capsys.readouterr().out.splitlines()) >= 2
    assert next(lines, None) is None


@pytest.mark.parametrize("backend", ["numba", "numpy"])
def test_an_instruction_set_is_not_ignored(backend: str, tiny: Path) -> None:
    args = build_parser().parse_args(["run", str(tiny), "text", "--backend", backend, "--isa", "avx2"])
    model = Model.open(tiny)
    with (
        pytest.raises(
            MissingDependencyError, match=f"the {backend} backend has no kernel sets .* omit --isa avx2"
        ),
        run.open_llm(args, model, 64),
    ):
        pass


@pytest.mark.parametrize("moves", ["move", "reload", "off"])
@pytest.mark.parametrize("stats", [True, False])
def test_moves_are_asked_for_and_told_at_the_end(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], moves: str, stats: bool
) -> None:
    """Between the plan and the end an answer may be written, and moves are logged as they happen."""
    asked: list[str] = []
    device, link = planner.Device("a", 10**9, 1e9, 1e9), planner.LinkSpeed(0.0, 1e9)
    links = {("a", "coordinator"): link, ("coordinator", "a"): link}
    moved = Moved(Epoch(1, 2), "a is hot", (Shift(2, 4, "a", "b"),), seconds=0.5, sent=2000)
    move = Move(moved, 6, 0.02, after=9.0)

    class Nodes:
        context = 64

        def __init__(self, model: Model) -> None:
            cluster = planner.Cluster((device,), links, "coordinator")
            question = planner.Question(planner_model(model, StageOptions()), cluster, planner.Workload(64))
            self.plan = planner.evaluate(question, [planner.Assignment("a", 0, model.n_units)])

        def moves(self) -> list[Move]:
            return [move]

    @contextmanager
    def opened(model: Model, *_: object, moves: str, **options: object) -> Iterator[Nodes]:
        asked.append(moves)
        yield Nodes(model)

    monkeypatch.setattr("shoal.nodes.open_nodes", opened)
    line = ["run", str(tiny), "text", "--nodes", "localhost:1", "--context", "64", "--moves", moves]
    args = build_parser().parse_args([*line, *(["--stats"] if stats else [])])
    model = Model.open(tiny)
    with run.open_llm(args, model, 64):
        assert "moved" not in capsys.readouterr().err
    assert asked == [moves]
    told = f"[{move.line()}]\n" if stats else ""
    assert capsys.readouterr().err == told
    assert not stats or "moved layers 2-3 from a to b (a is hot)" in told


def test_layers_move_unless_the_user_says_otherwise(tiny: Path) -> None:
    assert build_parser().parse_args(["run", str(tiny), "text"]).moves == "move"
