"""Finding a head by mDNS: real zeroconf over the loopback interface, and those who announce other things."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio
import trio.testing
import zeroconf
from hypothesis import given
from hypothesis import strategies as st
from tests.houses import Houses
from tests.patience import LIMIT

from shoal import house, house_node, mdns, nearby, pairing
from shoal.home_networks import is_private
from shoal.house_node import HouseNode
from shoal.mdns import MOST_PLACES, TYPE, is_of, tag
from shoal.net.errors import NetError
from shoal.net.messages import PROTOCOL, Address
from shoal.net.pairing import Invite
from shoal.net.tls import Trust

KEY, OTHER = "ab" * 32, "cd" * 32
LO = "127.0.0.1"
Name = st.text(max_size=80) | st.from_regex("[0-9a-f]{16}", fullmatch=True).map(lambda s: f"{s}.{TYPE}")
Properties = st.dictionaries(st.sampled_from([b"tag", b"v"]) | st.binary(), st.none() | st.binary())


class Program:
    """A process of shoal.mdns over the loopback interface."""

    def __init__(self, *words: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "shoal.mdns", *words, LO], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def says(self, *places: str) -> None:
        """Waits for a line with these places and no other."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if sorted(line.decode().split()) == sorted(places):
                return
        raise AssertionError(f"it has ended with {self.process.wait()}")

    def end(self) -> int:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        code = self.process.wait(LIMIT)
        self.process.stdout.close()
        return code


@contextmanager
def program(*words: str) -> Iterator[Program]:
    made = Program(*words)
    timer = threading.Timer(LIMIT, made.process.kill)
    timer.start()
    try:
        yield made
        assert made.end() == 0
    finally:
        timer.cancel()
        timer.join()
        if made.process.poll() is None:
            made.process.kill()
            made.end()


def announcing(key: str, port: int, purpose: str = "node") -> Any:
    return program("announce", purpose, key, str(PROTOCOL), str(port))


@pytest.fixture
def loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process looks over the loopback interface."""
    process = nearby._process
    monkeypatch.setattr(nearby, "_process", lambda *words: process(*words, LO))


def limited(main: Callable[[], Awaitable[None]]) -> None:
    async def run() -> None:
        with trio.fail_after(LIMIT):
            await main()

    trio.run(run)


async def until(true: Callable[[], object]) -> None:
    while not true():  # noqa: ASYNC110
        await trio.sleep(0.01)


@asynccontextmanager
async def device(trust: Trust) -> AsyncIterator[tuple[int, list[NetError | None]]]:
    """A device that answers with TLS: its port, and how each connection went."""
    went = list[NetError | None]()

    async def serve(raw: trio.SocketStream) -> None:
        stream: trio.abc.Stream = raw
        try:
            stream = await trust.accepted(raw, "somebody")
            went.append(None)
        except NetError as error:
            went.append(error)
        await trio.aclose_forcefully(stream)

    (listener,) = await trio.open_tcp_listeners(0, host=LO)
    async with trio.open_nursery() as tasks:
        tasks.start_soon(trio.serve_listeners, serve, [listener])
        yield listener.socket.getsockname()[1], went
        tasks.cancel_scope.cancel()


# --- what is announced


@pytest.mark.slow
def test_a_head_is_found_as_long_as_it_is_announced() -> None:
    with program("look", "node", KEY) as look, announcing(KEY, 7077), announcing(KEY, 99, "join"):
        with announcing(KEY, 7078), announcing(OTHER, 7079):
            look.says(f"{LO}:7077", f"{LO}:7078")
        look.says(f"{LO}:7077")


@pytest.mark.slow
def test_an_announcement_tells_nobody_which_head_it_is_or_whose() -> None:
    heard: list[tuple[str, zeroconf.ServiceInfo]] = []
    changed = threading.Condition()

    def hear(zeroconf: Any, service_type: str, name: str, state_change: Any) -> None:
        with changed:
            added = state_change.name == "Added"
            info = zeroconf.get_service_info(service_type, name, 3000) if added else None
            if info is not None and is_of(("node", KEY), name, info.properties):
                heard.append((name, info))
            changed.notify_all()

    with ExitStack() as stack:
        responder = zeroconf.Zeroconf([LO], ip_version=zeroconf.IPVersion.V4Only)
        stack.callback(responder.close)
        stack.callback(zeroconf.ServiceBrowser(responder, TYPE, handlers=[hear]).cancel)
        for _ in range(2):
            stack.enter_context(announcing(KEY, 7077))
        with changed:
            assert changed.wait_for(lambda: len(heard) == 2, LIMIT)
    (one_name, one), (two_name, two) = heard
    assert one_name != two_name and one.server != two.server
    assert one.properties.keys() == {b"v", b"tag"} and one.properties[b"v"] == str(PROTOCOL).encode()
    assert one.properties[b"tag"] != two.properties[b"tag"]
    said = f"{one_name} {one.server} {one.properties}".lower()
    assert KEY[:8] not in said and socket.gethostname().lower() not in said
    assert not is_of(("node", OTHER), one_name, one.properties)
    assert not is_of(("join", KEY), one_name, one.properties)


@given(Name, Properties)
def test_no_announcement_of_strangers_is_taken_for_the_heads(
    name: str, properties: dict[bytes, bytes | None]
) -> None:
    assert not is_of(("node", KEY), name, properties)
    salt = "0123456789abcdef"
    true = {**properties, b"tag": tag(salt, "node", KEY).encode()}
    assert is_of(("node", KEY), f"{salt}.{TYPE}", true)
    assert not is_of(("node", KEY), name, true)


@given(st.ip_addresses(v=4).map(str) | st.text(max_size=40))
def test_only_addresses_of_homes_are_dialled(address: str) -> None:
    home = address.startswith(("10.", "192.168.", "169.254.")) or any(
        address.startswith(f"172.{n}.") for n in range(16, 32)
    )
    with suppress(OSError):
        socket.inet_pton(socket.AF_INET, address)
        assert is_private(address) == home
        return
    assert not is_private(address)


@pytest.mark.slow
def test_looking_goes_on_whatever_is_sent() -> None:
    """Records that lead nowhere, more than are kept, and bytes that are none."""
    salts = [f"{n:016x}" for n in range(2 * MOST_PLACES)]
    hostile: list[tuple[str, int, Any, list[str]]] = [
        ("f" * 16, 7001, {"tag": "x" * 200}, [LO]),
        ("e" * 16, 7002, b"", [LO]),
        ("d" * 16, 7003, b"\x04tag=\xff\xff\x00\xc3", [LO]),
        ("c" * 16, 0, {"tag": tag("c" * 16, "node", KEY)}, [LO]),
        ("b" * 16, 7004, {"tag": tag("b" * 16, "node", KEY)}, ["8.8.8.8"]),
        ("not \xe9" * 9, 7005, {"tag": tag("a" * 16, "node", KEY)}, [LO]),
        *((salt, 7100 + n, {"tag": tag(salt, "node", OTHER)}, [LO]) for n, salt in enumerate(salts)),
    ]
    draw = random.Random(22)
    with ExitStack() as stack:
        responder = zeroconf.Zeroconf([LO], ip_version=zeroconf.IPVersion.V4Only)
        stack.callback(responder.close)
        raw = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        raw.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(LO))
        look = stack.enter_context(program("look", "node", KEY))
        stack.enter_context(announcing(KEY, 7076))
        look.says(f"{LO}:7076")
        for n, (name, port, properties, addresses) in enumerate(hostile):
            info = zeroconf.ServiceInfo(
                TYPE, f"{name}.{TYPE}", port, properties=properties, server=f"h{n}.local.",
                parsed_addresses=addresses,
            )  # fmt: skip
            responder.send(responder.generate_service_broadcast(info, None))
            for size in (3, 12, 40, 400):
                head = bytes([0, 0, 0x84, 0, 0, 0, 0, draw.randrange(9), 0, draw.randrange(3)])
                raw.sendto(head + draw.randbytes(size), ("224.0.0.251", 5353))
        stack.enter_context(announcing(KEY, 7077))
        look.says(f"{LO}:7076", f"{LO}:7077")


def test_each_address_of_this_device_is_used_as_long_as_it_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that comes later, and again one where mDNS has failed."""
    own, events = [["10.0.0.1", "10.0.0.2"]], list[str]()
    monkeypatch.setattr(mdns, "LOOK_SECONDS", 0.001)
    monkeypatch.setattr(mdns, "_own_addresses", lambda: own[0])

    async def serve(address: str) -> None:
        events.append(f"+{address}")
        if events.count(f"+{address}") == 1 and address == "10.0.0.2":
            raise OSError("no such device")
        try:
            await asyncio.Event().wait()
        finally:
            events.append(f"-{address}")

    async def main() -> None:
        task = asyncio.create_task(mdns._on_each((), serve))

        async def until(*expected: str) -> None:
            async with asyncio.timeout(LIMIT):
                while sorted(events) != sorted(expected):  # noqa: ASYNC110
                    await asyncio.sleep(0.001)
            events.clear()

        await until("+10.0.0.1", "+10.0.0.2", "+10.0.0.2")
        own[0] = ["10.0.0.2", "10.0.0.3"]
        await until("-10.0.0.1", "+10.0.0.3")
        task.cancel()
        await until("-10.0.0.2", "-10.0.0.3")

    asyncio.run(main())


# --- who uses it


@pytest.mark.slow
@pytest.mark.usefixtures("loopback")
def test_a_liar_costs_refused_connections_and_the_head_is_found(tmp_path: Path) -> None:
    """The liar has heard the announcement of the head, and says the same for itself."""
    houses = Houses(tmp_path)
    node, thief = houses.trust("a", ["head", "a"]), Trust(houses.own("x"), [houses.device("x", "head")])
    known = [(LO, 9)]

    async def main() -> None:
        found: list[tuple[str, int]] = []

        async def look() -> None:
            found.append(await nearby.find_head(node, lambda: known))

        head = houses.trust("head", ["head", "a"])
        async with device(head) as (port, reached), device(thief) as (lie, tried):
            with announcing(head.key, lie):
                async with trio.open_nursery() as tasks:
                    tasks.start_soon(look)
                    await until(lambda: tried)
                    assert not found
                    with announcing(head.key, port):
                        await until(lambda: found)
            assert found == [(LO, port)] and reached == [None]
            assert all(isinstance(error, NetError) for error in tried), "it has seen nobody's Hello"

    limited(main)


def test_however_much_is_announced_a_device_dials_once_a_second_and_what_was_said_last() -> None:
    async def main() -> None:
        send, receive = trio.testing.memory_stream_one_way_pair()
        for n in range(1000):
            await send.send_all("".join(f"10.0.{n % 250}.{m}:7077 " for m in range(8)).encode() + b"\n")
        await send.send_all(b"10.9.9.9:1 10.9.9.9:2\n10.8.8.8:")
        send.close()
        dialled = [(trio.current_time(), place) async for place in nearby._places(receive)]
        assert [place for _, place in dialled] == [("10.9.9.9", 1), ("10.9.9.9", 2)]
        assert dialled[1][0] - dialled[0][0] >= nearby.PAUSE_SECONDS

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


@pytest.mark.slow
@pytest.mark.usefixtures("loopback")
def test_a_node_whose_head_has_another_address_asks_it_there_and_keeps_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    houses, log = Houses(tmp_path), list[str]()
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "a"))
    with house.locked():
        pass
    (tmp_path / "a/shoal/device.pem").symlink_to(houses.own("a"))
    with socket.create_server((LO, 0)) as gone:
        old = Address(LO, gone.getsockname()[1])
    house.save_joined(houses.devices("head", "a"), (old,))
    monkeypatch.setattr(house_node, "_PAUSES", (LIMIT,))

    async def main() -> None:
        trust = house.trust()
        assert trust is not None
        head = houses.trust("head", ["head", "a"])
        asks = HouseNode(trust, (), log.append, mdns=True)

        async def answer(stream: Any) -> None:
            with suppress(NetError):
                await trio.aclose_forcefully(await head.accepted(stream, "a"))

        (listener,) = await trio.open_tcp_listeners(0, host=LO)
        port = listener.socket.getsockname()[1]
        async with trio.open_nursery() as tasks:
            tasks.start_soon(trio.serve_listeners, answer, [listener])
            with announcing(head.key, port):
                tasks.start_soon(asks.find_model)
                await until(lambda: house.head_addresses() != (old,))
            assert house.head_addresses() == (Address(LO, port), old)
            assert asks.addresses() == ((LO, port), (LO, old.port))
            assert any(f"is at {LO}:{port}, found by mDNS" in line for line in log)
            tasks.cancel_scope.cancel()

    limited(main)


def test_where_the_disk_is_full_a_node_goes_to_the_head_where_that_was_found_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, log = Address(LO, 1), list[str]()
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "a"))
    houses, write = Houses(tmp_path), house._write
    house.save_joined(houses.devices("head", "a"), (old,))

    def full(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    async def main() -> None:
        asks = HouseNode(houses.trust("a", ["head", "a"]), (), log.append, mdns=True)

        async def search(port: int) -> tuple[tuple[str, int], ...]:
            async def find(*given: Any) -> tuple[str, int]:
                return LO, port

            monkeypatch.setattr(house_node, "find_head", find)
            await asks._search()
            return asks.addresses()

        monkeypatch.setattr(house, "_write", full)
        assert await search(2) == ((LO, 2), (LO, 1))
        assert await search(3) == ((LO, 3), (LO, 1))
        assert house.head_addresses() == (old,) and "cannot be kept" in log[-1]
        monkeypatch.setattr(house, "_write", write)
        assert await search(4) == ((LO, 4), (LO, 1))

    trio.run(main)


@pytest.mark.slow
@pytest.mark.usefixtures("loopback")
def test_a_device_that_joins_finds_the_head_which_is_not_where_the_token_says(tmp_path: Path) -> None:
    houses = Houses(tmp_path)
    head, thief = houses.trust("head", ["head", "a"]), Trust(houses.own("x"), [houses.device("x", "head")])

    async def main() -> None:
        context = pairing.pairing_server(houses.own("head"))

        async def welcome(raw: trio.SocketStream) -> None:
            with suppress(NetError, trio.BrokenResourceError):
                stream = await pairing.open_tls(raw, "a device", context, server=True)
                async with stream:
                    await stream.receive_some()

        (listener,) = await trio.open_tcp_listeners(0, host=LO)
        port = listener.socket.getsockname()[1]
        async with device(thief) as (lie, _), trio.open_nursery() as tasks:
            tasks.start_soon(trio.serve_listeners, welcome, [listener])
            with announcing(head.key, lie, "join"), announcing(head.key, port, "join"):
                line = None
                while line is None:  # it looks for ten seconds at a time
                    line = await pairing._found(Invite(((LO, 9),), head.key, bytes(16), 2_000_000_000))
            assert line.who == f"{LO}:{port}"
            await line.close()
            tasks.cancel_scope.cancel()

    limited(main)


# --- when it is not used


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """The processes that would have been started, which end at once."""
    words = list[tuple[str, ...]]()

    class Ended:
        async def wait(self) -> int:
            return 3

    @asynccontextmanager
    async def process(*given: str) -> AsyncIterator[Any]:
        words.append(given)
        yield Ended()

    monkeypatch.setattr(nearby, "_process", process)
    return words


def test_a_head_is_announced_where_others_reach_it_and_nowhere_else(started: list[tuple[str, ...]]) -> None:
    said = list[str]()

    async def main() -> None:
        for host, expected in ((LO, []), ("0.0.0.0", [()])):
            listeners = await trio.open_tcp_listeners(0, host=host)
            port = str(listeners[0].socket.getsockname()[1])
            await nearby.announce("node", KEY, listeners, said.append)
            head = ("announce", "node", KEY, str(PROTOCOL), port)
            assert started == [(*head, *addresses) for addresses in expected]
            for listener in listeners:
                await listener.aclose()

    trio.run(main)
    assert "announced in the local network by mDNS" in said[0]
    assert said[1] == "not announced by mDNS any more: its process has ended with code 3"


@pytest.mark.parametrize(
    ("hosts", "told"),
    [
        (("203.0.113.9",), None),
        (("100.64.0.1", "10.0.0.2", "203.0.113.9", "192.168.1.2"), ("10.0.0.2", "192.168.1.2")),
        (("203.0.113.9", "0.0.0.0"), ()),  # the process looks for the private ones itself
    ],
)
def test_only_addresses_of_homes_are_announced(
    started: list[tuple[str, ...]], hosts: tuple[str, ...], told: tuple[str, ...] | None
) -> None:
    def listener(host: str) -> Any:
        bound = SimpleNamespace(family=socket.AF_INET, getsockname=lambda: (host, 7077))
        return SimpleNamespace(socket=bound)

    trio.run(nearby.announce, "node", KEY, list(map(listener, hosts)), lambda text: None)
    assert started == ([] if told is None else [("announce", "node", KEY, str(PROTOCOL), "7077", *told)])


def test_without_zeroconf_nothing_is_announced_or_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, started: list[tuple[str, ...]]
) -> None:
    monkeypatch.setattr(nearby.importlib.util, "find_spec", lambda name: None)
    trust = Houses(tmp_path).trust("a")

    async def main() -> None:
        listeners = await trio.open_tcp_listeners(0, host="0.0.0.0")
        await nearby.announce("node", KEY, listeners, lambda text: pytest.fail(text))
        assert await pairing._found(Invite(((LO, 9),), KEY, bytes(16), 0)) is None
        with trio.move_on_after(3600):
            await nearby.find_head(trust, list)
        for listener in listeners:
            await listener.aclose()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    assert started == []


def test_where_no_process_can_be_started_all_else_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node tries it again later."""
    tries, said = list[float](), list[str]()

    async def full(*given: Any, **more: Any) -> trio.Process:
        tries.append(trio.current_time())
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(trio.lowlevel, "open_process", full)
    trust = Houses(tmp_path).trust("a", ["head", "a"])

    async def main() -> None:
        listeners = await trio.open_tcp_listeners(0, host="0.0.0.0")
        await nearby.announce("node", KEY, listeners, said.append)
        for listener in listeners:
            await listener.aclose()
        assert await pairing._found(Invite(((LO, 9),), KEY, bytes(16), 0)) is None
        tries.clear()
        with trio.move_on_after(3.5 * nearby._RESTART_SECONDS) as scope:
            await nearby.find_head(trust, list)
        assert scope.cancelled_caught and len(tries) == 4

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    assert said == ["not announced by mDNS: [Errno 24] Too many open files"]


@pytest.mark.parametrize("how", [{"mdns": False, "given": ()}, {"mdns": True, "given": ((LO, 9),)}])
def test_no_mdns_and_an_address_on_the_command_line_are_heeded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, started: list[tuple[str, ...]], how: dict[str, Any]
) -> None:
    monkeypatch.setattr(HouseNode, "addresses", lambda self: ((LO, 9),))
    asks = HouseNode(Houses(tmp_path).trust("a"), how["given"], lambda line: None, mdns=how["mdns"])

    async def main() -> None:
        with trio.move_on_after(3600) as scope:
            await asks._search()
        assert scope.cancelled_caught

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    assert started == []
