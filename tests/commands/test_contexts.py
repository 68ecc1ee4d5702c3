"""The context that is made room for: what was asked for, the model's, or the most that fits."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Generator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio
from tests.models import tiny_chat_checkpoint

from shoal import planner
from shoal.answering import Settings
from shoal.arguments import build_parser
from shoal.cli import main
from shoal.commands import run
from shoal.contexts import context_of, fitting
from shoal.engine.batch import Sampling
from shoal.engine.convert import convert
from shoal.engine.errors import ContextError, NoPlanError
from shoal.engine.host import Ram
from shoal.engine.layout import PAGE
from shoal.engine.model_directory import Model
from shoal.engine.stage import StageOptions
from shoal.nodes import Nodes, NodeSession
from shoal.planning import default_workload, plan_or_error, plan_that_fits, planner_model

LONG = 16384


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """The tiny model, which is said to have a long context."""
    directory = tmp_path_factory.mktemp("contexts")
    checkpoint = tiny_chat_checkpoint(directory / "checkpoint")
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "max_position_embeddings": LONG}))
    convert(checkpoint, directory / "tiny")
    return Model.open(directory / "tiny")


def kv_bytes(model: Model) -> int:
    """Of a position in all layers."""
    return sum(unit.kv_bytes_per_token for unit in planner_model(model, StageOptions()).units)


def test_what_is_asked_for_is_what_it_is(model: Model) -> None:
    assert context_of(300, model) == 300
    assert context_of(None, model) == LONG
    with pytest.raises(ContextError, match=f"--context {LONG + 1} is more than the model's {LONG}"):
        context_of(LONG + 1, model)


@pytest.mark.parametrize("pages", [1, 2, 7, 63])
def test_the_most_that_fits_beside_the_weights(model: Model, pages: int) -> None:
    weights = sum(file.size for file in model.index.files.values())
    page = kv_bytes(model) * PAGE
    for more, found in ((0, pages), (page - 8, pages), (page + 8, pages + 1), (-8, pages - 1)):
        room = weights + pages * page + more
        quarter = int(room / 3 // page)  # is left in any case
        assert fitting(model, LONG, Ram(10**12, int(room / 0.75) + 1)) == max(found, quarter, 1) * PAGE
    assert fitting(model, 300, Ram(10**12, 10**11)) == 300


def test_weights_that_fill_the_ram_leave_a_quarter_and_unknown_ram_is_no_limit(model: Model) -> None:
    class Large:
        """The model with weights of 1 GB."""

        program, kv_dtype = model.program, model.kv_dtype
        index = SimpleNamespace(files={"unit": SimpleNamespace(size=10**9)})

    large = cast("Model", Large)
    page = kv_bytes(model) * PAGE
    assert fitting(large, LONG, Ram(10**12, 4 * 3 * page)) == 3 * PAGE
    assert fitting(large, LONG, Ram(10**12, int((10**9 + 2 * page) / 0.75) + 1)) == LONG  # a quarter of it
    assert fitting(large, LONG, Ram(10**12, 0)) == PAGE
    assert fitting(large, LONG, Ram(None, None)) == LONG


def cluster(model: Model, *rooms: float) -> planner.Cluster:
    """Devices that have room for these shares of the model's weights, keys and values; not counted are what
    each process and its workspace take."""
    rows = planner_model(model, StageOptions())
    whole = sum(unit.bytes + unit.kv_bytes_per_token * LONG for unit in rows.units)
    fixed = max(unit.workspace_bytes for unit in rows.units)
    devices = tuple(
        planner.Device(f"d{i}", int(share * whole) + fixed, 1e10, 1e11) for i, share in enumerate(rooms)
    )
    names = [device.name for device in devices]
    links = {(a, b): planner.LinkSpeed(1e-3, 1e8) for a in names for b in names if a != b}
    return planner.Cluster(devices, links, names[0])


@pytest.mark.parametrize("rooms", [(0.8,), (0.35, 0.35), (0.5, 0.2, 0.2), (0.26, 0.26, 0.26)], ids=str)
@pytest.mark.parametrize("streams", [1, 3])
def test_a_plan_takes_the_largest_context_that_fits(
    model: Model, rooms: tuple[float, ...], streams: int
) -> None:
    rows, devices = planner_model(model, StageOptions()), cluster(model, *rooms)
    objective = "throughput" if streams > 1 else "latency"
    workload = default_workload(LONG, given=False, prompt=128, streams=streams)
    question = planner.Question(rows, devices, workload, objective)
    plan, planned = plan_that_fits(question, shrink=True)
    assert PAGE <= planned.context < LONG and planned.context % PAGE == 0
    assert planned.streams == planned.sequences == streams
    assert plan.stages[-1].last == len(rows.units)
    more = default_workload(planned.context + PAGE, given=False, prompt=128, streams=streams)
    with pytest.raises(NoPlanError):
        plan_or_error(replace(question, workload=more))
    with pytest.raises(NoPlanError):
        plan_that_fits(question, shrink=False)


def test_devices_that_hold_no_page_at_all_are_too_small(model: Model) -> None:
    rows, devices = planner_model(model, StageOptions()), cluster(model, 0.0)
    with pytest.raises(NoPlanError, match="short"):
        plan_that_fits(planner.Question(rows, devices, default_workload(LONG, given=False)), shrink=True)


def test_speed_is_that_of_a_usual_conversation_unless_a_context_was_given() -> None:
    assert default_workload(LONG, given=False).decode_depth == (1 + 2048) // 2
    assert default_workload(512, given=False, prompt=128).decode_depth == (128 + 512) // 2
    assert default_workload(LONG, given=True).decode_depth == (1 + LONG) // 2
    assert default_workload(100, given=False, prompt=128).prompt_tokens == 100


DEVICES = """
[[device]]
name = "phone"
read_gb_per_s = 10
gmac_per_s = 50
base_mb = 1
ram_mb = {}
"""


@pytest.fixture
def devices(tmp_path: Path, model: Model) -> Path:
    """A device with room for about half of the model's context."""
    rows = planner_model(model, StageOptions())
    fixed = sum(unit.bytes for unit in rows.units) + max(unit.workspace_bytes for unit in rows.units)
    path = tmp_path / "devices.toml"
    path.write_text(DEVICES.format((fixed + kv_bytes(model) * LONG // 2) // 10**6 + 1))
    return path


def test_plan_says_which_context_it_made_room_for(
    model: Model, devices: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["plan", str(model.path), "--devices", str(devices)]
    assert main(line) == 0
    out, err = capsys.readouterr()
    assert "phone" in out
    assert "the most that the RAM has room for" in err and f"the model has {LONG}" in err
    assert main([*line, "--context", str(LONG)]) == 6
    assert main([*line, "--context", "512"]) == 0
    assert capsys.readouterr().err.count("\n") == 1  # the error
    assert main([*line, "--context", str(LONG + 1)]) == 5


def test_run_takes_what_fits_into_this_process_and_says_so(
    model: Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = sum(file.size for file in model.index.files.values())
    room = int((weights + 5 * PAGE * kv_bytes(model)) / 0.75) + 1
    monkeypatch.setattr("shoal.engine.host.ram", lambda: Ram(10**12, room))
    for more, context in (((), 5 * PAGE), (("--context", "9000"), 9000)):
        args = build_parser().parse_args(["run", str(model.path), "text", *more])
        with run.open_llm(args, model, context_of(args.context, model)) as (llm, _):
            assert llm.context == context
            llm.session().close()
        err = capsys.readouterr().err
        assert ("the context is 1280 tokens" in err) == (not more)


def test_an_answer_on_nodes_ends_with_the_context_of_the_newest_plan() -> None:
    """A plan after the loss of a node may have a shorter context than the one with which a chat began."""
    asked: list[tuple[int, int]] = []

    @asynccontextmanager
    async def answer(prompt: Sequence[int], *_: object, max_tokens: int, **__: object) -> AsyncIterator[Any]:
        asked.append((len(prompt), max_tokens))

        async def nothing() -> AsyncIterator[int]:
            for token in list[int]():
                yield token

        yield nothing()

    class Portal:
        def __init__(self, context: int) -> None:
            placement = SimpleNamespace(context=context, stages=[None])
            self.opened = SimpleNamespace(placement=placement, generate=answer)

        def stream(self, feed: object) -> Generator[int, None, None]:
            trio.run(feed, list[int]().append)
            yield from ()

        def start(self, feed: object, put: object) -> None:
            trio.run(feed, put)

    questions = ((100, 900, 1000), (100, 5, 1000), (100, 900, 512), (500, 900, 512), (600, 400, 512))
    expected = [(100, 900), (100, 5), (100, 412), (500, 12), (600, 1)]
    contexts = [context for _, _, context in questions]
    inner = SimpleNamespace(answer=answer)
    session = NodeSession(Portal(0), inner, lambda: contexts.pop(0))  # type: ignore[arg-type]
    for prompt, max_tokens, _ in questions:
        list(session.answer([1] * prompt, max_tokens=max_tokens, end=()))
    assert asked == expected
    asked.clear()
    for prompt, max_tokens, context in questions:
        nodes = Nodes(Portal(context), None)  # type: ignore[arg-type]
        nodes.begin([1] * prompt, Settings(1000, Sampling(), max_tokens), lambda item: None)
    assert asked == expected
