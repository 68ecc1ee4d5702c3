"""Files that travel from node to node over sockets: what arrives, from whom, and what is refused."""

import hashlib
import random
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import trio
import trio.testing

from shoal.engine.index import FileEntry, Index, UnitEntry
from shoal.held_files import HeldFiles, fetched_directory, make_skeleton
from shoal.net import files as net_files
from shoal.net.connection import Connection, in_thread
from shoal.net.dial import dial, open_tcp
from shoal.net.errors import NetError
from shoal.net.fetching import Fetcher
from shoal.net.messages import (
    Fetch,
    FileBytes,
    GetBytes,
    GetSums,
    Held,
    Message,
    Peer,
    Ping,
    Pong,
    Source,
    Sums,
)
from shoal.net.node import Node
from shoal.part_file import PartFile

PIECE = 64 * 1024
SIZES = (5 * PIECE, 3 * PIECE + 17, 1, 12 * PIECE)
UNITS = range(len(SIZES))
SMALL = {"config.json": b"{}", "common.safetensors": b"common"}


def unit(u: int) -> str:
    return f"unit-{u:03d}.safetensors"


def contents() -> dict[str, bytes]:
    return {unit(u): random.Random(u).randbytes(size) for u, size in enumerate(SIZES)}


def index() -> bytes:
    """The index of a model whose last unit also uses the file of unit 0."""
    every = contents() | SMALL
    entries = {name: FileEntry(len(data), hashlib.sha256(data).hexdigest()) for name, data in every.items()}
    units = [UnitEntry(f"u{u}", (unit(u),) if u < UNITS[-1] else (unit(u), unit(0))) for u in UNITS]
    return Index("f32", "llama", "local", None, entries, ("common.safetensors",), tuple(units)).to_json()


HASH = hashlib.sha256(index()).hexdigest()


@dataclass
class Watched:
    """The files of a source, which counts the bytes that it reads, and may do something else."""

    files: HeldFiles
    change: Callable[[str, int, bytes], bytes] = lambda name, first, data: data
    slow: float = 0.0
    given: int = 0

    def read(self, name: str, first: int, last: int, ahead: int = 0) -> bytes:
        time.sleep(self.slow)
        data = self.change(name, first, self.files.read(name, first, last, ahead))
        self.given += len(data)
        return data

    def __getattr__(self, name: str) -> Any:
        return getattr(self.files, name)


@dataclass
class House:
    """Nodes that listen on ports of their own."""

    lab: ModuleType
    place: Path
    tasks: trio.Nursery
    peers: dict[str, Peer] = field(default_factory=dict)
    controls: dict[str, Connection] = field(default_factory=dict)
    scopes: dict[str, trio.CancelScope] = field(default_factory=dict)
    callers: dict[str, trio.CancelScope] = field(default_factory=dict)
    logs: dict[str, list[str]] = field(default_factory=dict)

    async def add(self, name: str, files: Any) -> None:
        number, log = 500 + len(self.peers), self.logs.setdefault(name, [])
        net = self.lab.FakeNetwork(self.tasks)
        net.add(name, model=HASH, files=files, hop=in_thread, open_stream=open_tcp, log=log.append)
        me = self.lab.identity(name, number, HASH)
        parts = replace(net.nodes[7001].parts, identity=me, units=len(SIZES))
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        self.scopes[name] = await self.tasks.start(_serve, Node(parts), listeners)
        port = listeners[0].socket.getsockname()[1]
        ready = trio.Event()
        self.tasks.start_soon(self._coordinate, name, number, port, ready)
        await ready.wait()

    async def _coordinate(self, name: str, number: int, port: int, ready: trio.Event) -> None:
        with self.callers.setdefault(name, trio.CancelScope()):
            me = self.lab.identity("laptop", 9, HASH)
            async with dial(open_tcp, "127.0.0.1", port, me, "control", seconds=30) as (control, hello):
                self.controls[name] = control
                self.peers[name] = Peer(name, "127.0.0.1", port, number, hello.ticket)
                ready.set()
                while True:
                    await control.send(Ping(1))
                    await trio.sleep(1)

    def kill(self, name: str) -> None:
        self.callers[name].cancel()
        self.scopes[name].cancel()

    async def heard(self, name: str) -> Held:
        while not isinstance(message := await self.controls[name].receive(), Held):
            assert isinstance(message, Pong)
        return message

    def source(self, name: str, units: Sequence[int] = UNITS) -> Source:
        return Source(self.peers[name], tuple(units))

    async def fetch(
        self, name: str, units: Sequence[int], *sources: Source, until: Callable[[Held], bool] | None = None
    ) -> list[Held]:
        """Orders files, and returns the reports until all units are held."""
        await self.controls[name].send(Fetch(tuple(units), sources))
        heard = [await self.heard(name)]
        while not (until(heard[-1]) if until else set(units) <= set(heard[-1].units)):
            heard.append(await self.heard(name))
        return heard


async def _serve(node: Any, listeners: Any, task_status: trio.TaskStatus[trio.CancelScope]) -> None:
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as tasks:
            await tasks.start(node.serve, listeners)
            task_status.started(scope)


@asynccontextmanager
async def nodes(lab: ModuleType, place: Path) -> AsyncIterator[House]:
    with trio.fail_after(120):
        async with trio.open_nursery() as tasks:
            yield House(lab, place, tasks)
            tasks.cancel_scope.cancel()


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(net_files, "PIECE", PIECE)
    return tmp_path


def whole(place: Path, units: Sequence[int] = UNITS) -> Watched:
    """The files of a source that has these units."""
    path = place / f"source-{len(list(place.iterdir()))}"
    path.mkdir()
    every = contents() | SMALL | {"index.json": index()}
    absent = {unit(u) for u in UNITS if u not in units}
    for name in every.keys() - absent:
        (path / name).write_bytes(every[name])
    return Watched(HeldFiles(path))


def empty() -> HeldFiles:
    """The files of a node that has none yet, or those that were left."""
    return HeldFiles(make_skeleton(HASH, index(), SMALL))


def there() -> dict[str, bytes]:
    """The files of units that were fetched."""
    path = fetched_directory() / HASH
    return {file.name: file.read_bytes() for file in path.iterdir() if file.name.startswith("unit-")}


def test_files_come_from_all_that_have_them_and_most_from_the_fastest(lab: ModuleType, place: Path) -> None:
    async def main() -> None:
        async with nodes(lab, place) as house:
            fast, slow, part = whole(place), whole(place), whole(place, [1])
            slow.slow = 0.02
            for name, files in {"fast": fast, "slow": slow, "part": part, "new": empty()}.items():
                await house.add(name, files)
            assert house.controls["new"] is not None
            heard = await house.fetch(
                "new", UNITS, house.source("fast"), house.source("slow"), house.source("part", [1])
            )
            assert there() == contents()
            assert fast.given > slow.given > 0
            assert heard[-1] == Held(tuple(UNITS), sum(SIZES), sum(SIZES), "")
            assert any(set(UNITS) > set(held.units) for held in heard)
            assert [held.got for held in heard] == sorted(held.got for held in heard)

            before = fast.given + slow.given + part.given
            assert (await house.fetch("new", [0], house.source("fast")))[-1].got == SIZES[0]
            assert fast.given + slow.given + part.given == before, "nothing is fetched twice"

    trio.run(main)


@pytest.mark.parametrize("teller", ["liar", "honest"])
def test_a_wrong_byte_is_found_named_and_fetched_elsewhere(lab: ModuleType, place: Path, teller: str) -> None:
    async def main() -> None:
        async with nodes(lab, place) as house:
            liar, honest = whole(place), whole(place)

            def flipped(name: str, first: int, data: bytes) -> bytes:
                return bytes([data[0] ^ 1]) + data[1:] if (name, first // PIECE) == (unit(3), 4) else data

            liar.change = flipped
            for name, files in {"liar": liar, "honest": honest, "new": empty()}.items():
                await house.add(name, files)
            first, second = (house.source(teller), house.source({"liar": "honest"}.get(teller, "liar")))
            # Only the first tells sums: the other one comes when it has.
            await house.fetch("new", [3], first, until=lambda held: held.got > 0)
            await house.fetch("new", UNITS, first, second)
            assert there() == contents()
            given, log = liar.given, house.logs["new"]
            assert any("liar has sent wrong bytes of unit-003.safetensors" in line for line in log) == (
                given >= 12 * PIECE or teller == "liar"
            )
            assert not any("honest has sent" in line for line in log)

    trio.run(main)


def test_a_source_that_dies_is_replaced_by_others(lab: ModuleType, place: Path) -> None:
    async def main() -> None:
        async with nodes(lab, place) as house:
            dying, other = whole(place), whole(place)
            token = trio.lowlevel.current_trio_token()

            def dies(name: str, first: int, data: bytes) -> bytes:
                if dying.given > 6 * PIECE:
                    trio.from_thread.run_sync(house.kill, "dying", trio_token=token)
                return data

            dying.change = dies
            for name, files in {"dying": dying, "other": other, "new": empty()}.items():
                await house.add(name, files)
            await house.fetch("new", UNITS, house.source("dying"), until=lambda held: bool(held.problem))
            assert 6 * PIECE < dying.given < sum(SIZES)
            await house.fetch("new", UNITS, house.source("dying"), house.source("other"))
            assert there() == contents()
            # At most what was on its way is fetched again.
            assert dying.given + other.given < sum(SIZES) + 2 * PIECE * 4

    trio.run(main)


def test_a_node_that_is_killed_goes_on_without_fetching_a_piece_again(lab: ModuleType, place: Path) -> None:
    async def main() -> None:
        async with nodes(lab, place) as house:
            source = whole(place)
            await house.add("source", source)
            for turn in range(4):
                files = empty()
                await house.add(f"new{turn}", files)
                enough = (turn + 1) * 5 * PIECE
                await house.fetch(
                    f"new{turn}", UNITS, house.source("source"), until=lambda held, e=enough: held.got >= e
                )
                house.kill(f"new{turn}")
                while files._parts:  # noqa: ASYNC110
                    await trio.sleep(0.01)
            kept = sum(SIZES) - (sum(SIZES) - files.progress(UNITS)[1])
            assert kept >= 20 * PIECE
            before = source.given
            # A crash that loses what was written last, and power that tears the record.
            path = fetched_directory() / HASH / f"{unit(3)}.part"
            if path.exists():
                data = bytearray(path.read_bytes())
                data[:PIECE] = bytes(PIECE)
                path.write_bytes(data)
            await house.add("last", empty())
            await house.fetch("last", UNITS, house.source("source"))
            assert there() == contents()
            assert source.given - before <= sum(SIZES) - kept + 2 * PIECE

    trio.run(main)


def test_an_order_that_changes_while_a_file_is_being_finished_harms_nothing(
    lab: ModuleType, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began, go_on, finish = threading.Event(), threading.Event(), PartFile.finish

    def waits(part: PartFile, busy: Callable[[], bool]) -> bool:
        began.set()
        assert go_on.wait(60)
        return finish(part, busy)

    monkeypatch.setattr(PartFile, "finish", waits)

    async def main() -> None:
        async with nodes(lab, place) as house:
            await house.add("source", whole(place))
            files = empty()
            await house.add("new", files)
            await house.controls["new"].send(Fetch((1,), (house.source("source"),)))
            await in_thread(began.wait)
            await house.controls["new"].send(Fetch((), ()))
            await trio.testing.wait_all_tasks_blocked(0.1)
            go_on.set()
            heard = await house.fetch("new", UNITS, house.source("source"))
            assert there() == contents() and heard[-1].problem == ""
            assert not any("failed" in line for line in house.logs["new"])

    trio.run(main)


def test_files_that_an_order_drops_may_end_while_another_of_them_is_closed(
    lab: ModuleType, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Closing the first waits for its hash, and meanwhile the second becomes whole."""
    waits, both = threading.Event(), threading.Semaphore(0)
    finish, close = PartFile.finish, Fetcher._close
    first = list[str]()

    def finishes(part: PartFile, busy: Callable[[], bool]) -> bool:
        both.release()
        assert waits.wait(60)
        return finish(part, busy)

    async def closes(fetcher: Fetcher, opened: Any) -> None:
        if first:
            first.clear()
            waits.set()
            while len(fetcher._open) > 1 or fetcher._finishing:  # noqa: ASYNC110
                await trio.sleep(0.01)
        await close(fetcher, opened)

    monkeypatch.setattr(PartFile, "finish", finishes)
    monkeypatch.setattr(Fetcher, "_close", closes)

    async def main() -> None:
        async with nodes(lab, place) as house:
            await house.add("source", whole(place))
            await house.add("new", empty())
            await house.controls["new"].send(Fetch((0, 1), (house.source("source"),)))
            for _ in range(2):
                await in_thread(both.acquire)
            first.append("the next one that is closed")
            await house.controls["new"].send(Fetch((), ()))
            await in_thread(waits.wait)
            await house.fetch("new", UNITS, house.source("source"))
            assert there() == contents()
            assert not any("failed" in line for line in house.logs["new"])

    trio.run(main)


HOSTILE: dict[str, tuple[Message, str]] = {
    "a path": (GetBytes("../index.json", 0, 1), "the file ../index.json, which the model has not"),
    "the index": (GetBytes("index.json", 0, 1), "the file index.json, which the model has not"),
    "another model's": (GetBytes("unit-999.safetensors", 0, 1), "which the model has not"),
    "past the end": (GetBytes(unit(2), 0, 2), "which has 1"),
    "far away": (GetBytes(unit(2), 2**60 - 1, 2**60), "which has 1"),
    "what is not here": (GetBytes(unit(0), 0, 1), "is not on this device"),
    "sums of a path": (GetSums("/etc/passwd"), "which the model has not"),
    "sums of what is not here": (GetSums(unit(0)), "is not on this device"),
}


def test_only_bytes_of_the_models_files_are_given(lab: ModuleType, place: Path) -> None:
    async def main() -> None:
        async with nodes(lab, place) as house:
            await house.add("a", whole(place, [1, 2]))
            await house.add("none", None)

            @asynccontextmanager
            async def asking(name: str, ticket: int | None = None) -> AsyncIterator[Connection]:
                peer, me = house.peers[name], lab.identity("b", 77, HASH)
                shown = peer if ticket is None else replace(peer, ticket=ticket)
                async with dial(open_tcp, peer.host, peer.port, me, "files", seconds=30, peer=shown) as (
                    c,
                    _,
                ):
                    yield c

            for what, (request, why) in HOSTILE.items():
                async with asking("a") as connection:
                    await connection.send(request)
                    with pytest.raises(NetError) as caught:
                        await connection.receive()
                    assert why in str(caught.value), what
            with pytest.raises(NetError, match="only from its coordinator"):
                async with asking("a", ticket=house.peers["a"].ticket ^ 1):
                    pytest.fail("a stranger was let in")
            async with asking("none") as connection:
                with pytest.raises(NetError, match="has no files to give"):
                    await connection.receive()
            async with asking("a") as connection:
                await connection.send(GetSums(unit(1)))
                firsts = range(0, 3 * PIECE, PIECE // 8)
                for first in firsts:
                    await connection.send(GetBytes(unit(1), first, first + PIECE // 8))
                got = [await connection.receive() for _ in range(len(firsts) + 1)]
            data = b"".join(message.data for message in got if isinstance(message, FileBytes))
            assert data == contents()[unit(1)][: 3 * PIECE]
            (sums,) = [message for message in got if isinstance(message, Sums)]
            assert sums.sums[:32] == hashlib.sha256(data[:PIECE]).digest() and len(sums.sums) == 4 * 32
            await house.controls["a"].send(Fetch((99,), ()))
            with pytest.raises(NetError, match="files of units that the model of 4 has not"):
                await house.heard("a")

    trio.run(main)
