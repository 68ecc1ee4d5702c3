"""What shoal.LLM promises of cancels and forks: a cancelled call ends within one op, pages are free again on
every node, and a child process gets answers or a clear error."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest
import trio
from tests.models import smollm2_dir, tiny_chat_model
from tests.patience import LIMIT

import shoal
from shoal.engine.kv import page_bytes
from shoal.net.assignment import NodeParts
from shoal.net.identity import identity_of
from shoal.net.messages import Offer
from shoal.net.node import Node
from shoal.network_planner import NetworkPlanner
from shoal.planner import Device
from shoal.portal import open_portal

LIVELY: Any = {"temperature": 1.2, "seed": 9, "end": ()}
LONG = "The fish of the sea, and the birds of the air. " * 8


def wait_until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.001)


# --- the C call


@pytest.fixture(scope="module")
def big() -> Iterator[shoal.LLM]:
    with shoal.LLM(smollm2_dir(), context=512, threads=1) as llm:
        yield llm


def closed(llm: shoal.LLM, prompts: list[str], begun: Callable[[], None]) -> None:
    with llm.generate(prompts[0], stream=True, max_tokens=None):
        begun()


def several(llm: shoal.LLM, prompts: list[str], begun: Callable[[], None]) -> None:
    """All answers of a list are in one call, and are cancelled together."""

    async def main() -> None:
        asked = shoal.AsyncLLM.over(llm)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(partial(asked.generate, prompts, max_tokens=None))
            await anyio.to_thread.run_sync(begun)
            tasks.cancel_scope.cancel()

    anyio.run(main)


def scored(llm: shoal.LLM, prompts: list[str], begun: Callable[[], None]) -> None:
    async def main() -> None:
        asked = shoal.AsyncLLM.over(llm)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(asked.score, prompts[0])
            await anyio.to_thread.run_sync(begun)
            tasks.cancel_scope.cancel()

    anyio.run(main)


def turn(llm: shoal.LLM, prompts: list[str], begun: Callable[[], None]) -> None:
    async def main() -> None:
        asked = shoal.AsyncLLM.over(llm)
        async with await asked.session(max_tokens=None) as session, anyio.create_task_group() as tasks:
            tasks.start_soon(session.send, prompts[0])
            await anyio.to_thread.run_sync(begun)
            tasks.cancel_scope.cancel()

    anyio.run(main)


class Cancels:
    """Counts the ops of a stage that have ended: at a cancel, and at the end of the call."""

    def __init__(self, stage: shoal.Stage, monkeypatch: pytest.MonkeyPatch) -> None:
        self._took, self._cancel = stage.clock_ops(), stage.cancel
        self._at_cancel: int | None = None
        monkeypatch.setattr(stage, "cancel", self._counting)

    def _counting(self, sequence: int) -> None:
        self._cancel(sequence)
        if self._at_cancel is None:
            self._at_cancel = int(np.count_nonzero(self._took))

    def check(self, way: Callable[[Callable[[], None]], None]) -> None:
        """Has a call cancelled once it has begun, and checks that it ends within one op: tried again where
        the machine was so busy that the call had ended before."""
        until = time.monotonic() + LIMIT
        while True:
            self._took[:], self._at_cancel = 0, None
            way(lambda: wait_until(lambda: bool(self._took[3])))
            if self._at_cancel is not None and self._at_cancel + 1 < len(self._took):
                break
            assert time.monotonic() < until
        assert 3 < np.count_nonzero(self._took) <= self._at_cancel + 1


@pytest.mark.slow
@pytest.mark.parametrize("way", [closed, several, scored, turn])
def test_a_cancel_ends_the_call_within_one_op(
    big: shoal.LLM, way: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    stage: Any = big._engine.stage  # type: ignore[attr-defined]
    prompts = [LONG, f"On land: {LONG}"] if way is several else [LONG]
    assert sum(map(big.count, prompts)) + 40 <= stage.options.max_rows  # one call

    def cancelled(begun: Callable[[], None]) -> None:
        way(big, prompts, begun)
        assert stage.kv_bytes == 0

    Cancels(stage, monkeypatch).check(cancelled)


# --- pages, here and on nodes


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_chat_model(tmp_path_factory.mktemp("cancel"))


class Nodes:
    """Three nodes of this process, on sockets, whose stages have room for `pages` pages."""

    def __init__(self, path: Path, pages: int, rows: int = 64, speed: float = 1e9) -> None:
        self.model = shoal.Model.open(path)
        self._rows, self._speed = rows, speed
        self.stages: list[shoal.Stage] = []
        self._pages = pages

    def open_stage(self, first: int, last: int) -> shoal.Stage:
        states = [state for unit in self.model.program.units[first:last] for state in unit.states]
        room = self._pages * sum(page_bytes(state, self.model.kv_dtype) for state in states)
        options = shoal.StageOptions(threads=1, kv_bytes=room or None)
        self.stages.append(shoal.Stage(self.model, first, last, options))
        return self.stages[-1]

    def node(self, number: int) -> Node:
        name, version = f"n{number}", shoal.__version__
        speeds = {"read_bytes_per_s": self._speed, "macs_per_s": self._speed}
        device = Device(name, ram_bytes=10**9, base_bytes=10**7, **speeds)
        units = self.model.program.units
        parts = NodeParts(
            identity=identity_of(self.model, name, version),
            offer=Offer(device, max_rows=self._rows, threads=1, backend="native", exact=True),
            units=self.model.n_units,
            open_stage=self.open_stage,
            stateless=frozenset(u for u, unit in enumerate(units) if not unit.states),
            resident=lambda: 1,
            log=lambda line: None,
        )
        return Node(parts)

    @asynccontextmanager
    async def serve(self) -> AsyncIterator[list[str]]:
        addresses = []
        async with trio.open_nursery() as nursery:
            for number in (1, 2, 3):
                listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
                await nursery.start(self.node(number).serve, listeners)
                addresses.append("{}:{}".format(*listeners[0].socket.getsockname()))
            yield addresses
            nursery.cancel_scope.cancel()


@contextmanager
def over_nodes(path: Path, monkeypatch: pytest.MonkeyPatch, pages: int) -> Iterator[tuple[shoal.LLM, Nodes]]:
    nodes = Nodes(path, pages)
    layers = nodes.model.n_units - 2
    split = partial(NetworkPlanner, layers=(layers - 2, 1, 1))
    monkeypatch.setattr("shoal.nodes.NetworkPlanner", split)
    with open_portal(nodes.serve) as portal, shoal.LLM(path, nodes=portal.opened, context=300) as llm:
        assert len(nodes.stages) == 3
        yield llm, nodes


@pytest.mark.slow
def test_a_cancel_frees_the_pages_on_every_node(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each answer needs all the pages that the nodes have, so that one which was not freed would show. What
    stays of it for later prompts makes room."""
    prompts = [[65 + i] * 250 for i in range(4)]
    with shoal.LLM(path, context=300) as here:
        expected = [here.generate(prompt, max_tokens=10, **LIVELY).tokens for prompt in prompts]
    with over_nodes(path, monkeypatch, pages=5) as (llm, nodes):

        async def cancelled(prompt: list[int]) -> None:
            asked = shoal.AsyncLLM.over(llm)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(partial(asked.generate, prompt, max_tokens=None, **LIVELY))
                await anyio.to_thread.run_sync(wait_until, lambda: all(s.kv_bytes for s in nodes.stages))
                tasks.cancel_scope.cancel()

        for prompt, tokens in zip(prompts, expected, strict=True):
            with llm.generate(prompt, stream=True, max_tokens=None, **LIVELY) as stream:
                next(stream)
                assert all(stage.kv_bytes for stage in nodes.stages)
            anyio.run(cancelled, prompt)
            assert llm.generate(prompt, max_tokens=10, **LIVELY).tokens == tokens
            with llm.session(max_tokens=None, **LIVELY) as session:
                pieces = session.stream("x" * 150)
                next(pieces)
                pieces.close()  # type: ignore[attr-defined]
            for stage in nodes.stages:
                assert stage.options.kv_bytes is None or stage.kv_bytes <= stage.options.kv_bytes


@pytest.mark.slow
def test_an_answer_that_is_left_ends_the_call_on_a_node_within_one_op(
    big: shoal.LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The node is taken to be quick, so that the whole prompt is one call."""
    nodes = Nodes(smollm2_dir(), pages=20, rows=512, speed=1e14)
    with (
        open_portal(nodes.serve) as portal,
        shoal.LLM(smollm2_dir(), nodes=portal.opened[:1], context=512) as llm,
    ):
        (stage,) = nodes.stages
        assert 400 < big.count(LONG * 4) < 500

        def cancelled(begun: Callable[[], None]) -> None:
            closed(llm, [LONG * 4], begun)
            wait_until(lambda: not stage.kv_bytes)

        Cancels(stage, monkeypatch).check(cancelled)
        expected = big.generate("The sea", max_tokens=5).tokens
        assert llm.generate("The sea", max_tokens=5).tokens == expected


# --- forks


def in_child(use: Callable[[], bool]) -> int:
    """The exit code of a child process: 0 where `use` is true."""
    if not (child := os.fork()):
        code = 1
        try:
            code = 0 if use() else 2
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def refuses(call: Callable[[], object], words: str) -> bool:
    try:
        call()
    except shoal.ShoalError as error:
        return words in str(error)
    return False


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_process_goes_on_asking_here(path: Path) -> None:
    with shoal.LLM(path, context=300) as llm, llm.session(max_tokens=8, **LIVELY) as session:
        expected = llm.generate("Once", max_tokens=12, **LIVELY).tokens
        stream = llm.generate("Once", stream=True, max_tokens=None, **LIVELY)
        next(stream)
        turns = session.send("Hello").tokens

        def use() -> bool:
            same = llm.generate("Once", max_tokens=12, **LIVELY).tokens == expected
            with llm.session(max_tokens=8, **LIVELY) as own:
                same = same and own.send("Hello").tokens == turns
            refused = refuses(lambda: next(stream), "this stream belongs to the parent process")
            stream.close()
            llm.close()
            return same and refused

        assert in_child(use) == 0
        assert next(stream)
        stream.close()
        assert llm.generate("Once", max_tokens=12, **LIVELY).tokens == expected


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_process_is_told_that_nodes_belong_to_its_parent(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = set(threading.enumerate())
    with over_nodes(path, monkeypatch, pages=20) as (llm, _):
        expected = llm.generate("Once", max_tokens=12, **LIVELY).tokens
        stream = llm.generate("Once", stream=True, max_tokens=None, **LIVELY)
        next(stream)
        session = llm.session(max_tokens=8, **LIVELY)
        session.send("Hello")
        words = "open the model in this one, too"

        def use() -> bool:
            asks: list[Callable[[], object]] = [
                lambda: llm.generate("Once", max_tokens=12),
                lambda: llm.generate("Once", stream=True),
                lambda: session.send("And then?"),
                lambda: anyio.run(asked.chat, "Hello"),
            ]
            told = all(refuses(ask, words) for ask in asks)
            refused = refuses(lambda: next(stream), "this stream belongs to the parent process")
            stream.close()
            session.close()
            llm.close()
            return told and refused

        asked = shoal.AsyncLLM.over(llm)
        assert in_child(use) == 0
        assert next(stream)
        stream.close()
        assert session.send("And then?").tokens
        session.close()
        assert llm.generate("Once", max_tokens=12, **LIVELY).tokens == expected
    assert [one for one in set(threading.enumerate()) - before if one.name == "shoal network"] == []
