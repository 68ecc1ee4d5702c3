"""Nodes that dial their head, and nodes between which it passes bytes: over real sockets with TLS."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import given, strategies
from tests.houses import Houses
from tests.patience import LIMIT

from shoal import house_node
from shoal.engine.errors import NoPlanError
from shoal.house_node import HouseNode
from shoal.net import reachable
from shoal.net.connection import in_thread
from shoal.net.coordinator import Coordinator, CoordinatorOptions
from shoal.net.dial import OpenStream, dial
from shoal.net.errors import MismatchError, NetError, RemoteProtocolError, UntrustedError
from shoal.net.messages import Address, Peer
from shoal.net.node import Node
from shoal.net.placement import plan_at
from shoal.net.reachable import RETRY_SECONDS, _Ways, dial_head, relayed, stay_reachable
from shoal.net.relay import IDLE_SECONDS, RequestStream, pass_bytes
from shoal.net.requests import HEADER, MAGIC, Alive, Announce, GetModel, Ready, Relay, Take, decode, encode
from shoal.net.reverse import MOST_NODES, MOST_WAITING, Device, DeviceListener
from shoal.net.tls import TlsStream, Trust


@dataclass
class Home:
    """A head with its port for devices, and nodes that dial it."""

    lab: ModuleType
    houses: Houses
    names: tuple[str, ...]
    net: Any
    tasks: trio.Nursery
    head: Trust
    listener: DeviceListener
    address: tuple[str, int]
    log: list[str]
    devices: list[Device] = field(default_factory=list)
    trusts: dict[str, Trust] = field(default_factory=dict)
    nodes: dict[str, Node] = field(default_factory=dict)
    ways: dict[str, OpenStream] = field(default_factory=dict)
    announced: dict[str, Announce] = field(default_factory=dict)
    lines: list[RequestStream] = field(default_factory=list)
    scopes: dict[str, trio.CancelScope] = field(default_factory=dict)
    search: Callable[[], Awaitable[object]] = trio.sleep_forever

    def identity(self, name: str, trust: Trust) -> Any:
        return replace(self.lab.identity(name, trust.incarnation()), trust=trust)

    def start(self, name: str) -> None:
        """A node that dials the head, and listens on no port."""
        trust = self.trusts[name] = self.houses.trust(name, ["head", *self.names])
        self.net.add(name)
        fake = list(self.net.nodes.values())[-1]
        me, log = self.identity(name, trust), self.log.append
        self.ways[name] = relayed(lambda: [self.address], trust, log)
        parts = replace(
            fake.parts, identity=me, hop=in_thread, own_thread=True, spin=True, log=log,
            open_stream=self.ways[name],
        )  # fmt: skip
        self.nodes[name] = Node(parts)
        self.announced[name] = Announce(name, me.incarnation, 0, me.model)
        self.stay(name)

    def stay(self, name: str) -> None:
        """It keeps connections at the head, until `scopes[name]` is cancelled."""
        self.scopes[name] = trio.CancelScope()
        self.tasks.start_soon(self._stay, name)

    async def _stay(self, name: str) -> None:
        connected, say = self.nodes[name].connected, self.log.append
        with self.scopes[name]:
            await stay_reachable(
                lambda: [self.address],
                self.trusts[name],
                self.announced[name],
                connected,
                say,
                self.search,
            )

    def line(self, stream: TlsStream) -> RequestStream:
        """Frames over a stream, which is closed at the end."""
        self.lines.append(RequestStream(stream, "the head"))
        return self.lines[-1]

    async def listens(self, name: str) -> tuple[str, int]:
        """The node also listens from now on, which it tells at its next announcement."""
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        await self.tasks.start(self.nodes[name].serve, [listener])
        host, port = listener.socket.getsockname()[:2]
        self.announced[name] = replace(self.announced[name], port=port)
        return host, port

    @asynccontextmanager
    async def coordinator(self, plan: Any, **how: Any) -> AsyncIterator[Coordinator]:
        how = {"open_ended": True, "log": self.log.append, **how}
        options = CoordinatorOptions(open_stream=self.listener.open_stream, **how)
        async with Coordinator.open(
            (), self.listener._identity, self.lab.SHAPE, plan, options
        ) as coordinator:

            def arrived(device: Device) -> None:
                self.devices.append(device)
                coordinator.add(device.host, device.port, device.incarnation, anew=device.anew)

            self.listener.on_device(arrived)
            yield coordinator


@asynccontextmanager
async def home(lab: ModuleType, houses: Houses, *names: str) -> AsyncIterator[Home]:
    async with trio.open_nursery() as tasks:
        trust, log = houses.trust("head", ["head", *names]), list[str]()
        me = replace(lab.identity("laptop", trust.incarnation()), trust=trust)
        listener = DeviceListener(me, log.append)
        (socket,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        await tasks.start(partial(listener.serve, [socket]))
        address = socket.socket.getsockname()[:2]
        made = Home(lab, houses, names, lab.FakeNetwork(tasks), tasks, trust, listener, address, log)
        yield made
        for line in made.lines:
            await trio.aclose_forcefully(line.stream)
        tasks.cancel_scope.cancel()


@pytest.fixture
def houses(tmp_path: Path) -> Houses:
    return Houses(tmp_path)


def limited(main: Any) -> None:
    async def run() -> None:
        with trio.fail_after(LIMIT):
            await main()

    trio.run(run)


def halves(nodes: Any, links: Any) -> Any:
    """Waits for two nodes, and gives each one half."""
    if len(nodes) < 2:
        raise NoPlanError("another node is needed")
    return plan_at((0, 3, 6), 4)(nodes, links)


async def until(condition: Callable[[], object]) -> None:
    while not condition():  # noqa: ASYNC110
        await trio.sleep(0.01)


def test_nodes_that_listen_nowhere_serve_a_chain_through_the_head(lab: ModuleType, houses: Houses) -> None:
    """The two are next to each other: their rows pass the head."""

    async def main() -> None:
        async with home(lab, houses, "a", "b") as made, made.coordinator(halves) as coordinator:

            async def one(seed: int) -> None:
                prompt = [seed] * (5 * seed + 1)
                assert await lab.collect(coordinator, prompt, 10) == lab.oracle(prompt, 10)

            async with trio.open_nursery() as tasks:
                for seed in range(4):
                    tasks.start_soon(one, seed)
                made.start("a")
                made.start("b")
            assert {device.host.partition(".")[2] for device in made.devices} == {"shoal"}
            assert len(coordinator.links) == 6
            assert all(link.latency_s < 1 and link.bytes_per_s > 1e5 for link in coordinator.links.values())

    limited(main)


def test_a_connection_that_breaks_and_a_node_that_moves_change_no_token(
    lab: ModuleType, houses: Houses
) -> None:
    async def main() -> None:
        async with home(lab, houses, "a", "b") as made, made.coordinator(halves) as coordinator:
            made.start("a")
            made.start("b")
            async with coordinator.generate([1, 2], max_tokens=200) as tokens:
                got = [await anext(tokens)]
                control = coordinator._controls[1].connection
                assert control is not None
                await trio.aclose_forcefully(control._stream)
                got.append(await anext(tokens))
                moving = coordinator.nodes[-1].label
                made.scopes[moving].cancel()  # all of its connections end
                chain = coordinator.current
                await until(lambda: chain is None or chain.ended)
                where = await made.listens(moving)
                made.stay(moving)
                got += [token async for token in tokens]
            assert got == lab.oracle([1, 2], 200)
            assert where in {(node.host, node.port) for node in coordinator.nodes}
            assert sorted(member.label for member in coordinator._state.members) == ["a", "b"]

    limited(main)


def test_whoever_may_not_is_told_why_while_an_answer_goes_on(lab: ModuleType, houses: Houses) -> None:
    async def main() -> None:
        async with home(lab, houses, "a", "b", "c") as made, made.coordinator(halves) as coordinator:
            made.start("a")
            made.start("b")
            c = houses.trust("c", ["head", "a", "b", "c"])
            true = replace(made.announced["a"], name="c", incarnation=c.incarnation())

            async def refused(wish: Any, kind: Any, match: str) -> None:
                line = made.line(await dial_head([made.address], c))
                await line.send(wish)
                with pytest.raises(kind, match=match):
                    await line.receive(Ready, Alive)

            async with coordinator.generate([1, 2], max_tokens=200) as tokens:
                got = [await anext(tokens)]
                false = replace(true, incarnation=made.announced["b"].incarnation)
                await refused(false, UntrustedError, "claims to be another device of the house")
                await refused(replace(true, model="bb" * 32), MismatchError, "c has the model bbbb")
                for where in (made.address, ("127.0.0.1", 1), ("00000000.shoal", 1)):
                    await refused(Relay(Address(*where)), UntrustedError, "is no node of this house")
                await refused(Take("0" * 64), RemoteProtocolError, "sent Take out of turn")
                await refused(GetModel(), NetError, "has no model to give")
                stranger = houses.trust("x", ["head", "x"])
                line = made.line(await dial_head([made.address], stranger))
                with pytest.raises(UntrustedError, match="does not know this device"):
                    await line.receive(Alive)
                node = await trio.open_tcp_stream(*await made.listens("a"))
                opened = made.line(await c.dialled(node, "a"))
                await opened.send(Take(made.head.key))  # it is not the head, which alone may say this
                assert b"does not speak shoal's protocol" in await opened.stream.receive_some()
                got.append(await anext(tokens))
                waits = made.line(await dial_head([made.address], c))
                await waits.send(true)
                await waits.receive(Alive)
                await until(lambda: any(device.name == "c" for device in made.devices))
                made.head.update(houses.devices("head", "a", "b"))  # revoked while it waits
                with pytest.raises(NetError, match="is lost"):
                    await waits.receive(Take)
                await refused(true, UntrustedError, "does not know this device")
                got += [token async for token in tokens]
            assert got == lab.oracle([1, 2], 200)

    limited(main)


def test_a_relay_reaches_a_node_that_only_listens_and_vouches_for_who_asks(
    lab: ModuleType, houses: Houses
) -> None:
    async def main() -> None:
        async with home(lab, houses, "a", "b") as made, made.coordinator(halves) as coordinator:
            made.start("a")
            made.start("b")
            await coordinator.chain()
            where = await made.listens("a")
            made.scopes["a"].cancel()
            made.stay("a")
            await until(lambda: any((device.host, device.port) == where for device in made.devices))
            direct = await made.ways["b"](*where)
            assert isinstance(direct, TlsStream) and made.line(direct).stream.addresses[1] == where
            made.scopes["a"].cancel()
            await until(lambda: not made.listener._nodes[where].waiting)
            far = await _Ways(lambda: [made.address], made.trusts["b"], made.log.append)._through_head(*where)
            assert far.device.name == "a" and far.addresses[1] == made.address
            false = replace(made.identity("b", made.trusts["b"]), incarnation=made.head.incarnation())

            async def given(host: str, port: int) -> TlsStream:
                return made.line(far).stream

            with pytest.raises(UntrustedError, match="is b and claims to be another device of the house"):
                async with dial(given, *where, false, "control", seconds=60):
                    pass

    limited(main)


@pytest.mark.parametrize("what", ["_slept", "_own_address"])
def test_a_node_that_was_asleep_or_is_elsewhere_dials_anew(
    lab: ModuleType, houses: Houses, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    async def main() -> None:
        async with home(lab, houses, "a") as made, made.coordinator(plan_at((0, 6))) as coordinator:
            made.start("a")
            await coordinator.chain()
            before = getattr(reachable, what)
            monkeypatch.setattr(reachable, what, lambda *args: 1e9 if what == "_slept" else "10.0.0.9")
            await until(lambda: any(device.anew for device in made.devices))
            monkeypatch.setattr(reachable, what, before)
            assert {(d.host, d.incarnation) for d in made.devices} == {
                (coordinator.nodes[0].host, made.announced["a"].incarnation)
            }
            assert await lab.collect(coordinator, [7], 5) == lab.oracle([7], 5)

    limited(main)


def test_a_device_with_two_addresses_stays_under_the_first(lab: ModuleType, houses: Houses) -> None:
    async def main() -> None:
        async with home(lab, houses, "a") as made:
            found: list[Device] = []
            made.listener.on_device(found.append)
            trust = houses.trust("a", ["head", "a"])
            says = Announce("a", trust.incarnation(), 7000, made.listener._identity.model)
            for here, anew in (("127.0.0.1", False), ("127.0.0.2", False), ("127.0.0.3", True)):
                raw = await trio.open_tcp_stream(*made.address, local_address=here)
                line = made.line(await trust.dialled(raw, "the head"))
                await line.send(replace(says, anew=anew))
                await line.receive(Alive)
                await line.send(Alive())
            assert [device.host for device in found] == ["127.0.0.1", "127.0.0.3"]

    limited(main)


def test_a_head_that_is_away_is_said_once_and_so_is_its_return(lab: ModuleType, houses: Houses) -> None:
    async def main() -> None:
        async with home(lab, houses, "a") as made, made.coordinator(plan_at((0, 6))) as coordinator:
            there = made.address
            with socket.socket() as nobody:
                nobody.bind(("127.0.0.1", 0))
                made.address = nobody.getsockname()
                made.start("a")
                await until(lambda: any("trying again" in line for line in made.log))
                await trio.sleep(2 * RETRY_SECONDS)
                made.address = there
                await coordinator.chain()
            said = [line for line in made.log if "the head of the house" in line]
            assert len(said) == 2 and "cannot be reached (Connection refused)" in said[0]
            assert said[1] == "the head of the house is there again"
            assert await lab.collect(coordinator, [7], 5) == lab.oracle([7], 5)

    limited(main)


def test_a_device_has_a_bounded_number_of_nodes_and_connections(lab: ModuleType, houses: Houses) -> None:
    async def main() -> None:
        async with home(lab, houses, "a") as made:
            trust = houses.trust("a", ["head", "a"])

            async def wait(incarnation: int) -> RequestStream:
                line = made.line(await dial_head([made.address], trust))
                await line.send(Announce("a", incarnation, 0, made.listener._identity.model))
                await line.receive(Alive)
                await line.send(Alive())
                return line

            many = [trust.incarnation() for _ in range(MOST_NODES)]
            lines = [await wait(incarnation) for incarnation in many]
            with pytest.raises(NetError, match=f"has {MOST_NODES} nodes here"):
                await wait(trust.incarnation())
            lines += [await wait(many[0]) for _ in range(MOST_WAITING)]
            with pytest.raises(NetError, match="is lost"):  # the oldest has ended
                await lines[0].receive(Take)
            assert len(made.listener._nodes) == MOST_NODES

    limited(main)


def test_a_node_that_gets_no_model_hears_why(lab: ModuleType, houses: Houses) -> None:
    async def main() -> None:
        async with home(lab, houses, "a") as made:
            for name, kind, words in (
                ("a", NetError, "the head of the house: this head has no model to give"),
                ("x", UntrustedError, "does not know this device any more: pair it again"),
            ):
                asks = HouseNode(houses.trust(name, ["head", name]), (made.address,), made.log.append)
                with pytest.raises(kind, match=words):
                    await asks.find_model()

    limited(main)


def test_a_node_waits_while_a_stranger_has_the_address_of_its_head(
    lab: ModuleType, houses: Houses, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after the head has got another address, and another program the old one. It is no reason to end."""
    monkeypatch.setattr(house_node, "_PAUSES", (0.02,))

    async def main() -> None:
        async with home(lab, houses, "a") as made, trio.open_nursery() as tasks:
            theirs = Trust(houses.own("x"), [houses.device("x", "head")])
            (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")

            async def answer(stream: trio.SocketStream) -> None:
                with suppress(NetError):
                    await theirs.accepted(stream, "somebody")

            tasks.start_soon(trio.serve_listeners, answer, [listener])
            addresses = [listener.socket.getsockname()[:2]]
            asks = HouseNode(houses.trust("a", ["head", "a"]), addresses, made.log.append)
            tasks.start_soon(asks.find_model)
            await until(lambda: made.log)
            assert "waiting for the head of the house" in made.log[0]
            assert "is not a device of this house" in made.log[0]
            tasks.cancel_scope.cancel()
            both = (*addresses, made.address)
            asks = HouseNode(houses.trust("a", ["head", "a"]), both, made.log.append)
            with pytest.raises(NetError, match="this head has no model to give"):
                await asks.find_model()

    limited(main)


def test_a_node_dials_its_head_at_once_where_that_is_found_and_then_looks_no_more(
    lab: ModuleType, houses: Houses, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reachable, "RETRY_SECONDS", LIMIT)
    monkeypatch.setattr(reachable, "REFUSED_SECONDS", 0.0)

    async def main() -> None:
        async with home(lab, houses, "a") as made, made.coordinator(halves):
            true = made.address
            with socket.create_server(("127.0.0.1", 0)) as gone:
                made.address = gone.getsockname()
            searches = list[str]()

            async def search() -> None:
                searches.append("begun")
                if len(searches) == 1:
                    made.address = true
                    return
                try:
                    await trio.sleep_forever()
                finally:
                    searches.append("ended")

            made.search = search
            made.start("a")
            await until(lambda: made.devices and searches[-1:] == ["ended"])
            assert any("the head of the house is there again" in line for line in made.log)
            assert searches == ["begun", "begun", "ended"]

    limited(main)


def test_another_device_at_an_address_is_not_taken_for_the_node_that_the_head_knows_there(
    lab: ModuleType, houses: Houses
) -> None:
    """Two networks may use the same addresses. The way through the head leads to the right one."""

    async def main() -> None:
        async with home(lab, houses, "a", "b", "c") as made, made.coordinator(halves) as coordinator:
            for name in "abc":
                made.start(name)
            await coordinator.chain()
            where, other = await made.listens("a"), await made.listens("c")
            made.scopes["a"].cancel()
            made.stay("a")
            await until(lambda: any((device.host, device.port) == where for device in made.devices))
            ways = _Ways(lambda: [made.address], made.trusts["b"], made.log.append)
            directly = ways._directly
            ways._directly = lambda host, port: directly(*other)  # type: ignore[method-assign]
            me, a = made.identity("b", made.trusts["b"]), made.announced["a"]
            await until(lambda: made.nodes["a"]._limits._served)
            served = made.nodes["a"]._limits._served
            assert served is not None
            peer = Peer("a", *where, a.incarnation, served.ticket)
            wrong = await ways.open_stream(*where)
            assert made.line(wrong).stream.device.name == "c"
            async with dial(ways.open_stream, *where, me, "files", seconds=60, peer=peer) as (_, hello):
                assert (hello.name, hello.incarnation) == ("a", a.incarnation)

    limited(main)


def test_a_way_that_stays_closed_is_said_once(
    lab: ModuleType, houses: Houses, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reachable, "AGAIN_SECONDS", 0.0)

    async def main() -> None:
        async with home(lab, houses, "a") as made:
            ways = _Ways(lambda: [made.address], houses.trust("a", ["head", "a"]), made.log.append)
            with socket.socket() as nobody:
                nobody.bind(("127.0.0.1", 0))
                for _ in range(3):
                    with pytest.raises(UntrustedError, match="is no node of this house"):
                        await ways.open_stream(*nobody.getsockname())
            assert len([line for line in made.log if "go through the head" in line]) == 1

    limited(main)


def test_bytes_of_one_direction_keep_a_relay_open() -> None:
    """Pages go to their taker for as long as they need, and nothing comes back."""

    async def main() -> None:
        (giver, one), (other, taker) = (trio.testing.memory_stream_pair() for _ in range(2))
        with trio.fail_after(9 * IDLE_SECONDS):
            await passed(giver, one, other, taker)

    async def passed(giver: Any, one: Any, other: Any, taker: Any) -> None:
        async with trio.open_nursery() as tasks:
            tasks.start_soon(pass_bytes, one, other)
            for _ in range(5):
                await trio.sleep(0.9 * IDLE_SECONDS)
                await giver.send_all(b"page")
                assert await taker.receive_some() == b"page"
            ended = trio.current_time() + IDLE_SECONDS
        assert trio.current_time() == ended

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_a_node_that_refuses_a_relay_is_named_to_who_asks_and_harms_nobody(
    lab: ModuleType, houses: Houses
) -> None:
    async def main() -> None:
        async with home(lab, houses, "a", "b") as made:
            a, b = (houses.trust(name, ["head", "a", "b"]) for name in "ab")
            (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")

            async def bad(raw: trio.SocketStream) -> None:
                line = made.line(await b.accepted(raw, "the head"))
                await line.receive(Take)
                await line.refuse(NoPlanError("it has no wish to"))

            made.tasks.start_soon(trio.serve_listeners, bad, [listener])
            port = listener.socket.getsockname()[1]
            waits = made.line(await dial_head([made.address], b))
            await waits.send(Announce("b", b.incarnation(), port, made.listener._identity.model))
            await waits.receive(Alive)
            await trio.aclose_forcefully(waits.stream)
            await until(lambda: not made.listener._nodes["127.0.0.1", port].waiting)
            with pytest.raises(NetError, match=r"b .*it has no wish to"):
                await _Ways(lambda: [made.address], a, made.log.append)._through_head("127.0.0.1", port)
            assert not any("Traceback" in line for line in made.log)

    limited(main)


def test_connections_that_end_without_a_word_are_not_logged(lab: ModuleType, houses: Houses) -> None:
    async def main() -> None:
        async with home(lab, houses, "a", "b") as made:
            made.start("a")
            where, b = await made.listens("a"), houses.trust("b", ["head", "a", "b"])
            for trust in (made.head, b):
                for seal in (False, True):
                    stream: Any = await trio.open_tcp_stream(*where)
                    if seal:
                        stream = await trust.dialled(stream, "a")
                    await trio.aclose_forcefully(stream)
            stream = await b.dialled(await trio.open_tcp_stream(*where), "a")
            await stream.send_all(b"SHOL")
            await trio.aclose_forcefully(stream)
            await until(lambda: made.log)
            assert len(made.log) == 1 and "ended after 4 bytes" in made.log[0]

    limited(main)


@given(strategies.binary(max_size=200), strategies.integers(0, 8), strategies.integers(0, 1 << 32))
def test_a_frame_is_complete_or_refused(data: bytes, kind: int, size: int) -> None:
    for body in (data, HEADER.pack(MAGIC, kind, size & 0xFFFFFFFF) + data, encode(Alive()) + data):
        try:
            found = decode(body)
        except RemoteProtocolError:
            continue
        assert found is None or encode(found[0]) == body[: found[1]]
