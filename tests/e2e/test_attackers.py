"""Attackers of one house: real processes, sockets, TLS and stages, and a head that answers meanwhile. Each
attacker is refused and told why, and so is the user; the answers stay those of one process."""

from __future__ import annotations

import ssl
import threading
import time
from base64 import b64encode
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio
import trio.lowlevel
from tests.e2e.test_home import Device, Program, wait
from tests.houses import Houses
from tests.models import tiny_chat_model
from tests.pairing import attack, inviting
from tests.patience import LIMIT

import shoal
from shoal import house, pairing
from shoal.cluster_view import coordinator_identity
from shoal.engine.errors import ShoalError
from shoal.engine.model_directory import Model
from shoal.net.assignment import NodeParts
from shoal.net.dial import dial, open_tcp
from shoal.net.errors import NetError, NodeLostError, RemoteProtocolError, UntrustedError
from shoal.net.messages import Address, Fetch, GetBytes, GetSums, Held, Offer, PairedDevice, Peer
from shoal.net.node import Node
from shoal.net.pairing import Challenge, Invite, Join, Proof, Welcome, new_nonce, proof_of, transcript
from shoal.net.reachable import dial_head, relayed, stay_reachable
from shoal.net.relay import RequestStream
from shoal.net.requests import Alive, Announce, GetModel, Ready, Relay, Take
from shoal.net.reverse import MOST_SERVED
from shoal.net.slow import set_factor
from shoal.net.tls import Trust, der_of, key_of, open_tls, pairing_client, pairing_server, prefix_of
from shoal.pairing import Inviting
from shoal.planner import Device as Hardware
from shoal.processes import end

pytestmark = pytest.mark.slow
NO_FILES = SimpleNamespace(held=frozenset)
"""Those of a node that has none, so that the head tells it who has them."""
NO_ROOM = "it has not the memory that it has promised"
HOW: dict[str, Any] = {"max_tokens": 150, "temperature": 0.8, "seed": 5, "logit_bias": {2: -100, 3: -100}}


class Answers(threading.Thread):
    """Asks the head, again and again, until an answer is wrong."""

    def __init__(self, llm: shoal.LLM, wanted: str) -> None:
        super().__init__(daemon=True)
        self._llm, self._wanted = llm, wanted
        self.pieces = self.complete = 0
        self.wrong = ""
        self.enough = False

    def run(self) -> None:
        while not self.wrong and not self.enough:
            said = ""
            try:
                for text in self._llm.generate("Hello", stream=True, **HOW):
                    said += text
                    self.pieces += 1
            except ShoalError as error:
                self.wrong = repr(error)
            else:
                self.wrong = "" if said == self._wanted else said
            self.complete += 1

    @contextmanager
    def go_on(self) -> Iterator[None]:
        """An answer is under way when the block begins. All that end until then, and the one that runs at its
        end, are what they should be."""
        before = self.pieces
        wait(lambda: self.pieces > before or self.wrong, lambda: "an answer to begin")
        yield
        running = self.complete
        wait(lambda: self.complete > running or self.wrong, lambda: "an answer to end")
        assert not self.wrong


class Home:
    """A laptop, the head, which runs no layers; a phone and a tablet, of which either can hold the model; and
    a thief, whose device was paired."""

    def __init__(self, place: Path, model: Path) -> None:
        self.model = Model.open(model)
        self.laptop, self.phone, self.tablet, self.thief = (
            Device(place, name) for name in ("laptop", "phone", "tablet", "thief")
        )
        self.running: dict[str, Program] = {}
        self.slow = place / "slow"
        """How many times as slow as they are the phone and the tablet seem."""
        set_factor(self.slow, 1)

    def begin(self) -> None:
        """Starts the head and two nodes."""
        self.pair()
        options = ("--listen", "127.0.0.1:0", "--no-layers", "--no-http")
        self.running["laptop"] = self.laptop.starts("up", str(self.model.path), *options)
        _, _, port = self.head.says("devices connect to 127.0.0.1:").rpartition(":")
        self.address = "127.0.0.1", int(port)
        node = ("node", "--head", f"127.0.0.1:{port}", "--listen", "127.0.0.1:0", "--ram", "300")
        for device in (self.phone, self.tablet):
            self.running[device.name] = device.starts(
                *node, "--measure-seconds", "0.1", "--slow-file", str(self.slow)
            )
        self.head.says("ready:")

    @property
    def head(self) -> Program:
        return self.running["laptop"]

    def pair(self) -> None:
        """Pairs the devices, as `shoal invite` and `shoal join` do it."""
        with on(self.laptop):
            house.open_or_create("laptop")
        for device in (self.phone, self.tablet, self.thief):
            with on(device):
                own = PairedDevice(device.name, "device", b64encode(house.own_certificate()).decode())
            with on(self.laptop):
                house.change(partial(house.added, new=own))
        with on(self.laptop):
            devices = house.load()
        assert devices is not None
        for device in (self.phone, self.tablet, self.thief):
            with on(device):
                house.save_joined(devices)

    def trust(self, device: Device) -> Trust:
        """What the device knows of the house."""
        with on(device):
            devices = house.load()
            assert devices is not None
            return Trust(house.directory() / house.IDENTITY, devices)

    def where(self, device: Device) -> tuple[str, int]:
        """The address of the device's node."""
        line = self.running[device.name].says("listening on")
        port = line.partition("127.0.0.1:")[2].split()[0].strip(",;")
        return "127.0.0.1", int(port)

    def computing(self) -> Device:
        """The device that has the layers now."""
        (*_, ready) = (line for line in self.head.said.splitlines() if "ready:" in line)
        return self.phone if "phone: " in ready else self.tablet

    def identity(self, trust: Trust, name: str = "thief") -> Any:
        return replace(
            coordinator_identity(self.model), name=name, incarnation=trust.incarnation(), trust=trust
        )

    @asynccontextmanager
    async def line(self, trust: Trust) -> AsyncIterator[RequestStream]:
        """A connection to the head's port."""
        stream = await dial_head([self.address], trust)
        try:
            yield RequestStream(stream, "the head")
        finally:
            await trio.aclose_forcefully(stream)


@contextmanager
def on(device: Device) -> Iterator[None]:
    """What this process does is done on that device."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in device.environ.items():
            if name.startswith("XDG_"):
                patch.setenv(name, value)
        yield


def limited(main: Callable[[], Awaitable[None]]) -> None:
    async def run() -> None:
        with trio.fail_after(LIMIT):
            await main()

    trio.run(run)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    place = tmp_path_factory.mktemp("attacked")
    made = Home(place, tiny_chat_model(place))
    try:
        made.begin()
        with on(made.laptop):
            yield made
    finally:
        end([program.process for program in made.running.values()])


@pytest.fixture(scope="module")
def answers(home: Home) -> Iterator[Answers]:
    with shoal.LLM(home.model.path) as alone:
        wanted = alone.generate("Hello", **HOW).text
    with shoal.LLM(home.model.path, house=True) as llm:
        asking = Answers(llm, wanted)
        asking.start()
        yield asking
        asking.enough = True
        asking.join(LIMIT)


# --- strangers


def test_without_a_certificate(home: Home, answers: Answers) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["shoal"])

    async def main() -> None:
        for where in (home.address, home.where(home.phone)):
            stream = trio.SSLStream(await trio.open_tcp_stream(*where), context, https_compatible=True)
            with pytest.raises(trio.BrokenResourceError):  # an alert: a certificate is required
                await stream.receive_some()
            await trio.aclose_forcefully(stream)

    with answers.go_on():
        limited(main)
        for name in ("laptop", "phone"):
            home.running[name].says("has shown no certificate")


def test_with_the_certificate_of_another_house(home: Home, answers: Answers, tmp_path: Path) -> None:
    houses = Houses(tmp_path)
    trust = Trust(houses.own("x"), (*home.trust(home.thief).devices, houses.device("x")))

    async def main() -> None:
        async with home.line(trust) as line:
            await line.send(GetModel())
            with pytest.raises(UntrustedError, match="does not know this device"):
                await line.receive(Alive)
        with pytest.raises(UntrustedError, match="does not know this device"):
            async with dial(open_tcp, *home.where(home.phone), home.identity(trust), "control", seconds=60):
                pass

    with answers.go_on():
        limited(main)
        for name in ("laptop", "phone"):
            home.running[name].says("is not a device of this house")


# --- the handshake


@asynccontextmanager
async def listening(serve: Callable[[trio.SocketStream], Awaitable[None]]) -> AsyncIterator[tuple[str, int]]:
    """Serves whoever connects to that address."""

    async def handle(stream: trio.SocketStream) -> None:
        with suppress(trio.BrokenResourceError):
            async with stream:
                await serve(stream)

    async with trio.open_nursery() as tasks:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        tasks.start_soon(trio.serve_listeners, handle, listeners)
        host, port = listeners[0].socket.getsockname()[:2]
        yield host, port
        tasks.cancel_scope.cancel()


def forwarding(where: tuple[str, int], seen: bytearray) -> Callable[[trio.SocketStream], Awaitable[None]]:
    """Passes bytes to and from somebody else, and notes those that go there."""

    async def pump(source: trio.SocketStream, target: trio.SocketStream, note: bytearray) -> None:
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            async for data in source:
                note += data
                await target.send_all(data)
            await target.send_eof()

    async def serve(stream: trio.SocketStream) -> None:
        async with await trio.open_tcp_stream(*where) as far, trio.open_nursery() as tasks:
            tasks.start_soon(pump, stream, far, seen)
            tasks.start_soon(pump, far, stream, bytearray())

    return serve


async def echo(stream: trio.SocketStream) -> None:
    """Sends back what it hears."""
    async for data in stream:
        await stream.send_all(data)


def test_a_handshake_that_is_replayed(home: Home, answers: Answers) -> None:
    """What a device of the house has sent, sent again by somebody who has heard it."""
    seen = bytearray()

    async def main() -> None:
        async with listening(forwarding(home.address, seen)) as where:
            stream = await dial_head([where], home.trust(home.thief))
            line = RequestStream(stream, "the head")
            await line.send(Take("0" * 64))
            with pytest.raises(RemoteProtocolError, match="sent Take out of turn"):  # so it has heard that
                await line.receive(Ready)
            await trio.aclose_forcefully(stream)
        async with await trio.open_tcp_stream(*home.address) as again:
            await again.send_all(seen)
            heard = bytearray()
            with suppress(trio.BrokenResourceError):
                async for data in again:
                    heard += data
        assert heard.startswith(b"\x16\x03\x03")  # the head's part of a new handshake, with other keys

    with answers.go_on():
        limited(main)
        home.head.says("TLS 1.3 failed", "bad record mac")


def test_a_handshake_that_is_reflected(home: Home, answers: Answers) -> None:
    """A paired device gives the head's own port as that of its node. And a device that dials hears itself."""
    thief = home.trust(home.thief)

    async def main() -> None:
        async with listening(forwarding(home.address, bytearray())) as (_, port):
            async with home.line(thief) as line:
                await line.send(Announce("thief", thief.incarnation(), port, home.model.hash))
                await line.receive(Alive)
            says = partial(home.head.says, f"thief (127.0.0.1:{port})", "is laptop")
            await trio.to_thread.run_sync(says)
        async with listening(echo) as where:
            with pytest.raises(NetError, match=r"TLS 1\.3 failed"):
                await thief.dialled(await trio.open_tcp_stream(*where), "the head")

    with answers.go_on():
        limited(main)


# --- pairing


@pytest.fixture
def visitor(home: Home) -> Device:
    """A device that is of no house."""
    found = Device(home.laptop.place.parent, f"visitor-{time.monotonic_ns()}")
    (found.place / "config").mkdir()
    return found


def test_with_an_invite_that_has_expired_or_was_used(home: Home, answers: Answers, tmp_path: Path) -> None:
    houses = Houses(tmp_path)

    async def body(open_invite: Inviting, tasks: trio.Nursery) -> None:
        invite, state = open_invite.invite, open_invite.state
        until, state._expires = state._expires, trio.current_time() - 1
        assert "has expired" in await attack(invite, houses.device("a").certificate, invite.secret)
        state._expires = until
        assert await attack(invite, houses.device("a").certificate, invite.secret) == ""
        assert "has been used" in await attack(invite, houses.device("b").certificate, invite.secret)

    with answers.go_on():
        joined, log = inviting(body)
    assert isinstance(joined, PairedDevice) and joined.certificate == houses.device("a").certificate
    assert ["has expired" in line for line in log] == [True, False] and "has been used" in log[1]


def test_with_a_proof_that_is_replayed(home: Home, answers: Answers, tmp_path: Path) -> None:
    """A device has proved the secret on a connection that broke; somebody who has heard it says the same."""
    certificate = Houses(tmp_path).device("a").certificate

    async def body(open_invite: Inviting, tasks: trio.Nursery) -> None:
        invite, join = open_invite.invite, Join("phone", certificate, new_nonce())

        async def challenged() -> tuple[pairing._Line, Challenge]:
            raw = await trio.open_tcp_stream(*invite.addresses[0])
            line = pairing._Line(await open_tls(raw, "head", pairing_client(), server=False), "head")
            await line.send(join)
            return line, await line.receive(Challenge)

        line, challenge = await challenged()
        proof = Proof(proof_of(invite.secret, "device", transcript(invite.head, join, challenge)))
        await trio.aclose_forcefully(line._stream)
        line, _ = await challenged()
        await line.send(proof)
        with pytest.raises(UntrustedError, match="the secret is wrong"):
            await line.receive(Welcome)
        await trio.aclose_forcefully(line._stream)

    with answers.go_on():
        joined, log = inviting(body)
    assert joined is None and "has not joined: the secret is wrong" in log[-1]


def test_from_the_middle_of_a_pairing(home: Home, answers: Answers, visitor: Device, tmp_path: Path) -> None:
    """Somebody answers in the head's place with a certificate of his own: the device says nothing."""
    heard = bytearray()

    async def middle(stream: trio.SocketStream) -> None:
        own = pairing_server(Houses(tmp_path).own("x"))
        sealed = await open_tls(stream, "a device", own, server=True)
        try:
            heard.extend(await sealed.receive_some())
        finally:
            await trio.aclose_forcefully(sealed)

    async def main() -> None:
        key = key_of(house.own_certificate())
        async with listening(middle) as where:
            with (
                on(visitor),
                pytest.raises(UntrustedError, match="another device than the head answers"),
            ):
                await pairing.join_house(Invite((where,), key, bytes(16), 2_000_000_000), "visitor")

    with answers.go_on():
        limited(main)
    assert not heard
    with on(visitor):
        assert house.load() is None


def test_as_a_head_that_sends_the_proof_back(
    home: Home, answers: Answers, visitor: Device, tmp_path: Path
) -> None:
    """It has the head's key, as a copy of the head's files has, and not the secret of the invite."""
    own = house.directory() / house.IDENTITY

    async def false(stream: trio.SocketStream) -> None:
        sealed = await open_tls(stream, "a device", pairing_server(own), server=True)
        try:
            line = pairing._Line(sealed, "a device")
            join = await line.receive(Join)
            await line.send(Challenge(new_nonce()))
            proof = await line.receive(Proof)
            devices = (*home.trust(home.laptop).devices, PairedDevice(join.name, "device", join.certificate))
            await line.send(Welcome(devices, proof.mac))
            await line.finish()
        finally:
            await trio.aclose_forcefully(sealed)

    async def main() -> None:
        key = key_of(house.own_certificate())
        async with listening(false) as where:
            with on(visitor), pytest.raises(UntrustedError, match="does not know the secret"):
                await pairing.join_house(Invite((where,), key, bytes(16), 2_000_000_000), "visitor")

    with answers.go_on():
        limited(main)
    with on(visitor):
        assert house.load() is None


# --- a device that was paired


class FalseNode(Node):
    """A node that notes the tickets of the nodes that it may connect to, by their ports."""

    def __init__(self, parts: NodeParts) -> None:
        super().__init__(parts)
        self.peers = dict[int, Peer]()

    def _fetch(self, connection: Any, order: Fetch, fetcher: Any) -> None:
        self.peers |= {source.peer.port: source.peer for source in order.sources}

    async def _measure(self, coordinator: Any, peer: Peer) -> None:
        self.peers[peer.port] = peer
        await super()._measure(coordinator, peer)

    async def tell(self, message: Any) -> None:
        """Tells the head something. NodeLostError: it does not listen any more."""
        if self._manager is None:
            raise NodeLostError("the head has hung up")
        await self._manager._coordinator.send(message)


@asynccontextmanager
async def false_node(home: Home, log: list[str], **changes: Any) -> AsyncIterator[FalseNode]:
    """A node of the thief's device, which the head uses: it promises as much as one may, and loads
    nothing."""
    trust = home.trust(home.thief)
    me = home.identity(trust)
    hardware = Hardware("thief", ram_bytes=1 << 50, read_bytes_per_s=1e15, macs_per_s=1e18, base_bytes=1)

    def opens(first: int, last: int) -> Any:
        log.append(f"load {first}-{last}")
        raise ShoalError(NO_ROOM)

    parts = NodeParts(
        identity=me,
        offer=Offer(hardware, max_rows=64, threads=1, backend="native", exact=True),
        units=home.model.n_units,
        open_stage=opens,
        resident=lambda: 1,
        log=log.append,
        open_stream=relayed(lambda: [home.address], trust, log.append),
    )
    node, announce = FalseNode(replace(parts, **changes)), Announce("thief", me.incarnation, 0, me.model)
    async with trio.open_nursery() as tasks:
        tasks.start_soon(stay_reachable, lambda: [home.address], trust, announce, node.connected, log.append)
        yield node
        tasks.cancel_scope.cancel()


async def until(true: Callable[[], object]) -> None:
    while not true():  # noqa: ASYNC110 (what it waits for happens in another process)
        await trio.sleep(0.02)


def test_a_device_that_promises_more_ram_than_it_has(home: Home, answers: Answers) -> None:
    """The others have become slow, so it is given layers. It cannot load them, and is lost. What follows is
    in tests/net/test_transition.py."""
    log: list[str] = []
    loads = f"load 0-{home.model.n_units}"

    async def main() -> None:
        async with false_node(home, log) as node:
            set_factor(home.slow, 20)
            await until(lambda: loads in log or answers.wrong)
            set_factor(home.slow, 1)
            await until(lambda: not node.coordinated)

    with answers.go_on():
        limited(main)
        home.head.says(f"thief: {NO_ROOM}")


def test_a_device_that_asks_for_what_is_not_its_own(home: Home, answers: Answers) -> None:
    """Files of another device that are not of the model, bytes that a file has not, and files without the
    ticket that the head gives those that should fetch."""
    log: list[str] = []
    asked = home.computing()
    where = home.where(asked)

    async def main() -> None:
        async with false_node(home, log, files=NO_FILES) as node:
            await until(lambda: where[1] in node.peers or answers.wrong)
            ask = partial(dial, open_tcp, *where, node._parts.identity, "files", seconds=60)
            with pytest.raises(NetError, match="accepts files connections only from its coordinator"):
                async with ask() as (connection, _):
                    await connection.receive()
            for request in (
                GetBytes("../../../config/shoal/identity.pem", 0, 10),
                GetBytes("house.json", 0, 10),
                GetBytes("unit-000.safetensors", 0, 1 << 17),
                GetSums("../tiny/config.json"),
            ):
                async with ask(peer=node.peers[where[1]]) as (connection, _):
                    await connection.send(request)
                    with pytest.raises(RemoteProtocolError, match=r"thief .*asked for"):
                        await connection.receive()
            async with home.line(node._parts.identity.trust) as line:
                await line.send(Relay(Address("192.0.2.1", 22)))
                with pytest.raises(UntrustedError, match="is no node of this house"):
                    await line.receive(Ready)

    with answers.go_on():
        limited(main)
        home.running[asked.name].says("thief", "asked for", "identity.pem")
        home.running[asked.name].says("accepts files connections only")
        home.head.says("thief", "asked for 192.0.2.1:22, which is no node of this house")


def test_a_device_that_speaks_as_the_head(home: Home, answers: Answers) -> None:
    trust = home.trust(home.thief)
    (key,) = (key_of(der_of(device)) for device in trust.devices if device.role == "head")
    head = replace(home.identity(trust), incarnation=prefix_of(key) << 32 | 1)

    async def main() -> None:
        where = home.where(home.phone)
        for me, why in (
            (home.identity(trust, "laptop"), "is a device of the house and not its head"),
            (head, "claims to be another device of the house"),
        ):
            with pytest.raises(UntrustedError, match=why):
                async with dial(open_tcp, *where, me, "control", seconds=60) as (connection, _):
                    await connection.receive()
        stream = await trust.dialled(await trio.open_tcp_stream(*where), "the phone")
        try:
            line = RequestStream(stream, "the phone")
            await line.send(Take(trust.key))  # "I am the head, and pass you on"
            assert b"does not speak shoal's protocol" in await stream.receive_some()
        finally:
            await trio.aclose_forcefully(stream)

    with answers.go_on():
        limited(main)
        home.running["phone"].says("laptop of thief", "not its head")


def test_a_device_that_floods(home: Home, answers: Answers) -> None:
    """With connections, requests for the model, and reports."""
    trust, log, told = home.trust(home.thief), list[str](), home.head.said

    async def floods(node: FalseNode) -> None:
        for i in range(20_000):
            await node.tell(Held((i % 2,), 1, 0, f"a problem, for the {i}th time"))

    async def asks(stack: AsyncExitStack, *frames: Any) -> RequestStream:
        line = await stack.enter_async_context(home.line(trust))
        for frame in frames:
            await line.send(frame)
        return line

    async def main() -> None:
        async with AsyncExitStack() as stack:
            for _ in range(200):
                await stack.enter_async_context(await trio.open_tcp_stream(*home.address))
            many = [await asks(stack, GetModel()) for _ in range(MOST_SERVED)]
            with pytest.raises(NetError, match=f"has {MOST_SERVED} connections through the head, the most"):
                await (await asks(stack, GetModel())).receive(Alive)
            assert not await many[0].is_next()  # the model itself
        async with false_node(home, log, files=NO_FILES) as node:
            joined = partial(home.head.says, "thief (", ".shoal:1) ", after=told)
            await trio.to_thread.run_sync(joined)
            with pytest.raises(NodeLostError):
                await floods(node)

    with answers.go_on():
        limited(main)
        home.head.says("thief", "sent more reports than a node has")
        said = home.head.said.removeprefix(told).splitlines()
        assert len(said) < 150, said


def test_a_device_that_is_revoked(home: Home, answers: Answers) -> None:
    """The one that computes, in the middle of an answer. Its connections end, and it gets no other."""
    gone = home.computing()
    with answers.go_on():
        assert home.laptop.does("devices", "revoke", gone.name)[0] == 0
        home.head.says(gone.name, "is no longer a device of the house")
        home.running[gone.name].says("does not know this device any more")
        home.head.says("127.0.0.1", "is not a device of this house")
