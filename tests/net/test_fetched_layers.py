"""A coordinator and nodes that lack files: layers move to where files arrive, while answers go on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise, permutations
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import trio
from tests.models import TINY
from tests.net.test_moving import stages, until

from shoal.engine.convert import convert
from shoal.engine.errors import ModelFileError
from shoal.engine.generate import generate
from shoal.engine.model_directory import Model
from shoal.engine.stage import Stage, StageOptions
from shoal.held_files import HeldFiles, make_skeleton
from shoal.net import files as net_files
from shoal.net.coordinator import Coordinator, CoordinatorOptions
from shoal.net.files import Room, pieces
from shoal.net.identity import shape_of
from shoal.net.placement import COORDINATOR, FilesMissingError, Links, NodeInfo, Placement
from shoal.network_planner import NetworkPlanner
from shoal.planner import Assignment, Device, LinkSpeed, Workload

PIECE = 32 * 1024
SIZE = 12 * PIECE + 100
"""Bytes of the file of each unit."""
UNITS = range(6)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(net_files, "PIECE", PIECE)


def content(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest() * (SIZE // 32) + bytes(SIZE % 32)


@dataclass
class Shelf:
    """Files in memory. `given` and `got` are the bytes that were read and written."""

    whole: dict[str, bytes]
    parts: dict[str, ShelfPart] = field(default_factory=dict)
    given: int = 0
    got: int = 0

    def held(self) -> frozenset[int]:
        return frozenset(u for u in UNITS if str(u) in self.whole)

    def progress(self, units: Collection[int]) -> tuple[int, int]:
        parts = {u: self.parts[str(u)].bytes for u in units if str(u) in self.parts}
        return SIZE * len(units), sum(SIZE if str(u) in self.whole else parts.get(u, 0) for u in units)

    def names(self, units: Sequence[int]) -> tuple[str, ...]:
        return tuple(map(str, units))

    def read(self, name: str, first: int, last: int, ahead: int = 0) -> bytes:
        self.given += last - first
        return self.whole[name][first:last]

    def sum(self, name: str, piece: int) -> bytes | None:
        data = self.whole[name][piece * PIECE : (piece + 1) * PIECE]
        return hashlib.sha256(data).digest() if data else None

    def make_room(self, units: Sequence[int], in_use: Collection[int]) -> Room:
        return Room(tuple(name for name in self.names(units) if name not in self.whole))

    def part(self, name: str) -> ShelfPart | None:
        return None if name in self.whole else self.parts.setdefault(name, ShelfPart(self, name))


@dataclass
class ShelfPart:
    shelf: Shelf
    name: str
    size: int = SIZE
    data: bytearray = field(default_factory=lambda: bytearray(SIZE))
    have: dict[int, tuple[bytes, str]] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        return min(SIZE, len(self.have) * PIECE)

    def write(self, at: int, data: bytes | bytearray) -> None:
        self.shelf.got += len(data)
        self.data[at : at + len(data)] = data

    def keep(self, piece: int, digest: bytes, source: str) -> None:
        self.have[piece] = digest, source

    def forget(self, pieces: Collection[int]) -> None:
        for piece in pieces:
            del self.have[piece]

    def finish(self, busy: Callable[[], bool]) -> bool:
        assert len(self.have) == pieces(SIZE) and self.data == content(self.name)
        self.shelf.whole[self.name] = bytes(self.data)
        del self.shelf.parts[self.name]
        return True

    def close(self) -> None:
        return


def shelf(*units: int) -> Shelf:
    return Shelf({str(u): content(str(u)) for u in units})


def balanced(without: str = "") -> Callable[[Sequence[NodeInfo], Links], Placement]:
    """A planner: the largest stage decides. Nodes keep their order, and those in `without` hold nothing in
    RAM."""

    def plan(nodes: Sequence[NodeInfo], links: Links) -> Placement:
        able = [node for node in nodes if node.label not in without]
        target = min(cuts(able), key=largest)
        wanted = {one.device: tuple(range(one.first, one.last)) for one in target}
        held = {node.label: frozenset(UNITS) if node.held is None else node.held for node in able}
        found = [
            cut for cut in cuts(able)
            if all(held[one.device].issuperset(range(one.first, one.last)) for one in cut)
        ]  # fmt: skip
        if not found:
            raise FilesMissingError("files are missing", wanted)
        best = min(found, key=largest)
        return Placement(tuple(best), 4, tokens_per_s=60 / largest(best), target=wanted)

    return plan


def largest(stages: Sequence[Assignment]) -> int:
    return max(stage.last - stage.first for stage in stages)


def cuts(nodes: Sequence[NodeInfo]) -> list[list[Assignment]]:
    """All chains of any of these nodes in their order."""
    edges: list[list[int]] = [[0]]
    for at in range(len(nodes)):
        last = at == len(nodes) - 1
        edges = [[*one, b] for one in edges for b in ([6] if last else range(one[-1], 7))]
    return [
        [Assignment(node.label, a, b) for node, (a, b) in zip(nodes, pairwise(one), strict=True) if a < b]
        for one in edges
    ]


async def answers_until(
    lab: ModuleType, coordinator: Any, over: Callable[[], bool], prompt: Sequence[int] = (3, 1, 4, 1, 5)
) -> int:
    """Computes answers, which are those of one process; returns how many."""
    for number in range(1000):
        if over():
            return number
        got = await lab.collect(coordinator, [number % 90, *prompt], 40)
        assert got == lab.oracle([number % 90, *prompt], 40)
    raise AssertionError("it has not happened while 1000 answers were computed")


def test_the_head_begins_alone_and_layers_move_as_their_files_arrive(lab: ModuleType) -> None:
    """No answer waits for a byte, and no byte arrives twice."""

    async def main() -> None:
        async with lab.network() as net:
            shelves = {"a": shelf(*UNITS), "b": shelf(), "c": shelf(4)}
            for name, files in shelves.items():
                net.add(name, hop=lab.slow_hop(0.02), files=files)
            said = list[str]()
            async with net.coordinator(plan=balanced(), log=said.append) as coordinator:
                assert coordinator.placement.stages == (Assignment("a", 0, 6),)
                target = tuple(stages("a2 b4 c6"))
                assert (
                    await answers_until(lab, coordinator, lambda: coordinator.placement.stages == target) > 1
                )
                assert coordinator.recoveries == 0 and not any(move.aborted for move in coordinator.moves)
                assert {one.label: (one.wanted, one.got) for one in coordinator.fetches} == {
                    "a": (2 * SIZE, 2 * SIZE), "b": (2 * SIZE, 2 * SIZE), "c": (2 * SIZE, 2 * SIZE),
                }  # fmt: skip
            assert [shelves[name].got for name in "abc"] == [0, 2 * SIZE, SIZE]
            assert any("has all files that it should hold" in line for line in said)

    lab.run(main)


def test_before_a_plan_is_possible_sources_may_vanish_and_come_back(lab: ModuleType) -> None:
    """Neither holds the model with the other's help, and the one that has all files holds nothing in RAM."""

    async def main() -> None:
        async with lab.network() as net:
            a, b, full = shelf(0, 1, 2), shelf(3), shelf(*UNITS)
            for name, files in {"a": a, "b": b, "full": full}.items():
                net.add(name, hop=lab.slow_hop(0.02), files=files)
            said = list[str]()

            async def vanish() -> None:
                await until(lambda: b.got > PIECE)
                await net.kill(7003)
                before = b.got
                await trio.sleep(30)
                assert before <= b.got < 2 * SIZE
                net.restart(7003)

            async with trio.open_nursery() as tasks:
                tasks.start_soon(vanish)
                async with net.coordinator(plan=balanced("full"), log=said.append) as coordinator:
                    assert coordinator.placement.stages == tuple(stages("a3 b6"))
                    assert b.held() >= {3, 4, 5} and a.got == 0
                    assert b.got < 2 * SIZE + PIECE, "whole pieces are not fetched again"
                    got = await lab.collect(coordinator, [1, 2, 3], 20)
                    assert got == lab.oracle([1, 2, 3], 20)
            assert said[0] == "waiting for weights. files are missing"
            assert any(line.startswith("fetching weights: ") for line in said)

    lab.run(main)


def test_a_node_that_says_it_has_files_and_has_not_is_not_used_again(lab: ModuleType) -> None:
    """It can join before the first plan, or while answers are computed."""

    def broken(first: int, last: int) -> Any:
        raise ModelFileError(f"units [{first}, {last}) are not there")

    async def main() -> None:
        async with lab.network() as net:
            for name in "abc":
                net.add(name, hop=lab.slow_hop(0.02), **({"open_stage": broken} if name != "a" else {}))
            net.nodes[7003].up = False
            said = list[str]()
            async with net.coordinator(plan=balanced(), log=said.append) as coordinator:
                assert coordinator.placement.stages == tuple(stages("a6"))
                net.nodes[7003].up = True
                start = trio.current_time()
                await answers_until(lab, coordinator, lambda: trio.current_time() - start > 12)
                assert coordinator.placement.stages == tuple(stages("a6"))
                assert len([move for move in coordinator.moves if move.aborted]) == 1
            assert len([line for line in said if "are not there" in line]) >= 2

    lab.run(main)


def test_real_stages_serve_what_is_fetched_while_the_rest_is_on_its_way(
    lab: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A quick device without any file takes all layers from a slow one, with the real planner, files and
    stages."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    convert(TINY, tmp_path / "model", dtype="int8")
    model = Model.open(tmp_path / "model")
    small = {name: (tmp_path / "model" / name).read_bytes() for name in ("config.json", *model.index.common)}
    path = make_skeleton(model.hash, (tmp_path / "model" / "index.json").read_bytes(), small)
    prompt, n = [5, 6, 7], model.n_units
    with Stage(model, 0, n) as stage:
        expected = list(generate(stage, prompt, max_tokens=10, end=()))
    plans = NetworkPlanner(model, Workload(64))
    links = {ends: LinkSpeed(0.001, 1e8) for ends in permutations((COORDINATOR, "slow", "quick"), 2)}

    async def main() -> None:
        async with lab.network() as net:
            for name, where, rate in (("slow", tmp_path / "model", 1e6), ("quick", path, 1e9)):
                own = Model.open(where)
                net.add(
                    name,
                    model=model.hash,
                    units=n,
                    files=HeldFiles(where),
                    offer=replace(lab.OFFER, device=Device(name, 10**9, rate, rate)),
                    open_stage=lambda a, b, own=own: Stage(
                        own, a, b, StageOptions(threads=1, keep_rows=True)
                    ),
                    stateless=frozenset(u for u, unit in enumerate(model.program.units) if not unit.states),
                    hop=lab.slow_hop(0.1),
                )
            options = CoordinatorOptions(hop=lab.inline, open_stream=net.open_stream, measure_links=False)
            async with Coordinator.open(
                [("host", port) for port in net.nodes],
                lab.identity("laptop", 99, model.hash),
                shape_of(model),
                lambda nodes, _: plans(nodes, links),
                options,
            ) as coordinator:
                seen = [coordinator.placement.stages]
                while coordinator.placement.stages != (Assignment("quick", 0, n),):
                    assert await lab.collect(coordinator, prompt, 10) == expected
                    if coordinator.placement.stages != seen[-1]:
                        seen.append(coordinator.placement.stages)
                assert coordinator.recoveries == 0 and len(seen) > 2

    lab.run(main)
