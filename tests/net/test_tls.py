"""Chains over TLS, on real sockets with threads, and strangers who try to get in."""

from __future__ import annotations

import itertools
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import trio
from tests.houses import Houses
from tests.patience import LIMIT

from shoal.engine.errors import ShoalError
from shoal.net import coordinator, tags
from shoal.net.assignment import NodeParts
from shoal.net.connection import in_thread
from shoal.net.coordinator import Coordinator, CoordinatorOptions
from shoal.net.dial import dial, open_tcp
from shoal.net.errors import MismatchError, NetError, NodeLostError, RemoteProtocolError, UntrustedError
from shoal.net.messages import PROTOCOL, Address
from shoal.net.messages import House as HouseList
from shoal.net.node import Node
from shoal.net.placement import plan_at
from shoal.net.tls import Trust
from shoal.net.wire import HEADER, MAGIC, WireProtocol
from shoal.planner import Assignment


@pytest.fixture
def houses(tmp_path: Path) -> Houses:
    return Houses(tmp_path)


class House:
    """A head and nodes of a house, each with what it knows of it."""

    def __init__(self, lab: ModuleType, houses: Houses) -> None:
        self.lab, self.houses = lab, houses
        self.trusts: dict[str, Trust] = {}
        self.addresses: dict[str, tuple[str, int]] = {}
        self.net: Any = None

    def identity(self, name: str, trust: Trust) -> Any:
        return replace(self.lab.identity(name, trust.incarnation()), trust=trust)

    @asynccontextmanager
    async def coordinator(self, plan: Any, trust: Trust | None = None, **how: Any) -> AsyncIterator[Any]:
        me = self.identity("laptop", trust or self.trusts["head"])
        options = CoordinatorOptions(**how)
        addresses = list(self.addresses.values())
        async with Coordinator.open(addresses, me, self.lab.SHAPE, plan, options) as coordinator:
            yield coordinator


@asynccontextmanager
async def house(
    lab: ModuleType,
    houses: Houses,
    *names: str,
    change: Callable[[NodeParts], NodeParts] = lambda parts: parts,
) -> AsyncIterator[House]:
    """The nodes listen, and know each other and the head."""
    async with trio.open_nursery() as tasks:
        made, net = House(lab, houses), lab.FakeNetwork(tasks)
        made.net = net
        made.trusts["head"] = houses.trust("head", ["head", *names])
        for i, name in enumerate(names):
            net.add(name)
            node, trust = net.nodes[7001 + i], houses.trust(name, ["head", *names])
            made.trusts[name] = trust
            parts = replace(node.parts, hop=in_thread, open_stream=open_tcp, own_thread=True, spin=True)
            node.node = Node(change(replace(parts, identity=made.identity(name, trust))))
            listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
            await tasks.start(node.node.serve, listeners)
            made.addresses[name] = listeners[0].socket.getsockname()[:2]
        yield made
        tasks.cancel_scope.cancel()


def limited(main: Any) -> None:
    async def run() -> None:
        with trio.fail_after(LIMIT):
            await main()

    trio.run(run)


def test_a_chain_over_tls_gives_the_same_tokens(lab: ModuleType, houses: Houses) -> None:
    async def main() -> None:
        async with (
            house(lab, houses, "a", "b", "c") as made,
            made.coordinator(plan_at((0, 2, 4, 6), 4)) as head,
        ):

            async def one(seed: int) -> None:
                prompt = [seed] * (5 * seed + 1)
                assert await lab.collect(head, prompt, 10) == lab.oracle(prompt, 10)

            async with trio.open_nursery() as tasks:
                for seed in range(4):
                    tasks.start_soon(one, seed)
            assert all(link.latency_s < 1 and link.bytes_per_s > 1e5 for link in head.links.values())

    limited(main)


@pytest.mark.slow
def test_layers_move_over_tls(lab: ModuleType, houses: Houses, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tags, "CHUNK", 4)

    async def main() -> None:
        async with (
            house(lab, houses, "a", "b", "c") as made,
            made.coordinator(plan_at((0, 2, 4, 6), 4), measure_links=False) as head,
        ):
            edges = [(0, 1, 4, 6), (0, 0, 3, 6)]

            async def one(seed: int) -> None:
                while len(head.moves) < len(edges):
                    prompt = [seed] * 12
                    assert await lab.collect(head, prompt, 20) == lab.oracle(prompt, 20)

            async with trio.open_nursery() as tasks:
                for seed in range(2):
                    tasks.start_soon(one, seed)
                for count, cut in enumerate(edges):
                    ranges = zip("abc", itertools.pairwise(cut), strict=True)
                    head.move(
                        [Assignment(name, first, last) for name, (first, last) in ranges if first < last], ""
                    )
                    while len(head.moves) <= count:  # noqa: ASYNC110
                        await trio.sleep(0.001)
            assert {move.moved.failure for move in head.moves} <= {""}

    limited(main)


# --- strangers


def contexts(
    houses: Houses, name: str | None, version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3
) -> ssl.SSLContext:
    """What an attacker connects with: any certificate or none, and no check of the node's."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.minimum_version, context.maximum_version = min(version, ssl.TLSVersion.TLSv1_2), version
    context.set_alpn_protocols(["shoal"])
    if name is not None:
        context.load_cert_chain(houses.own(name))
    return context


async def greeted(made: House, context: ssl.SSLContext) -> bytes:
    """What a node answers to a stranger that says Hello over TLS, before it ends the connection."""
    raw = await trio.open_tcp_stream(*made.addresses["a"])
    stream = trio.SSLStream(raw, context, https_compatible=True)
    me, answer = made.lab.identity("stranger", 66), b""
    hello = WireProtocol(dialled=True).send(me.hello("control"))
    with suppress(trio.BrokenResourceError):
        await stream.send_all(b"".join(hello))
        while data := await stream.receive_some(4096):
            answer += data
    await trio.aclose_forcefully(raw)
    return answer


@pytest.mark.parametrize(
    ("shown", "version", "why"),
    [
        (None, ssl.TLSVersion.TLSv1_3, "has shown no certificate"),
        ("stranger", ssl.TLSVersion.TLSv1_3, "is not a device of this house"),
        ("b", ssl.TLSVersion.TLSv1_2, "unsupported protocol"),
    ],
    ids=["no certificate", "of another house", "TLS 1.2"],
)
def test_a_stranger_hears_nothing_while_an_answer_goes_on(
    lab: ModuleType, houses: Houses, shown: str | None, version: ssl.TLSVersion, why: str
) -> None:
    async def main() -> None:
        async with house(lab, houses, "a", "b") as made, made.coordinator(plan_at((0, 3, 6), 4)) as head:
            async with head.generate([1, 2], max_tokens=40) as tokens:
                got = [await anext(tokens)]
                assert await greeted(made, contexts(houses, shown, version)) == b""
                got += [token async for token in tokens]
            assert got == lab.oracle([1, 2], 40)
            log = made.net.nodes[7001].log
            assert any(why in line for line in log), log

    limited(main)


def test_plain_text_is_answered_with_the_reason_and_a_garbled_handshake_with_an_alert(
    lab: ModuleType, houses: Houses
) -> None:
    async def main() -> None:
        async with house(lab, houses, "a") as made:
            for sent, heard in ((b"SHOL" + bytes(8), b"SHOL"), (b"\x16\x03\x01\x00\x05hello", b"\x15\x03")):
                stream = await trio.open_tcp_stream(*made.addresses["a"])
                await stream.send_all(sent)
                answer = b""
                while data := await stream.receive_some(4096):
                    answer += data
                assert answer.startswith(heard)
                assert (b"only devices of the house" in answer) == (heard == b"SHOL")
                await stream.aclose()
            with pytest.raises(
                UntrustedError, match=r"only devices of the house may connect here.*shoal join"
            ):
                async with dial(
                    open_tcp, *made.addresses["a"], lab.identity("laptop", 9), "control", seconds=5
                ):  # fmt: skip
                    pass

    limited(main)


def test_a_dialling_side_says_what_is_wrong(lab: ModuleType, houses: Houses) -> None:
    """Another house at the address; a node that has no house; a node that does not know this device."""

    async def main() -> None:
        async with house(lab, houses, "a") as made:

            async def fails(trust: Trust, where: tuple[str, int], match: str) -> None:
                with pytest.raises(UntrustedError, match=match):
                    async with dial(open_tcp, *where, made.identity("x", trust), "control", seconds=5):
                        pass

            other = Trust(houses.own("b"), (houses.device("b", "head"),))
            await fails(other, made.addresses["a"], "is not a device of this house")
            knows = Trust(houses.own("b"), (houses.device("b", "head"), houses.device("a")))
            await fails(knows, made.addresses["a"], "does not know this device")
            async with trio.open_nursery() as tasks:
                net = lab.FakeNetwork(tasks)
                net.add("plain")
                (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
                await tasks.start(net.nodes[7001].node.serve, [listener])
                await fails(made.trusts["head"], listener.socket.getsockname()[:2], "speaks plain text")
                tasks.cancel_scope.cancel()

    limited(main)


def test_devices_with_other_versions_are_named_on_both_sides(lab: ModuleType, houses: Houses) -> None:
    newer = HEADER.pack(MAGIC, PROTOCOL + 1, 1, 0)
    older = f"of shoal's protocol and this device {PROTOCOL}: upgrade shoal on this one"

    async def main() -> None:
        async with house(lab, houses, "a") as made, trio.open_nursery() as tasks:
            stream = await trio.open_tcp_stream(*made.addresses["a"])
            async with await made.trusts["head"].dialled(stream, "a") as head:
                await head.send_all(newer)
                while await head.receive_some():
                    pass
            (line,) = made.net.nodes[7001].log
            assert line.endswith(f"version {PROTOCOL + 1} {older}")

            async def answer(stream: trio.SocketStream) -> None:
                async with stream, await made.trusts["a"].accepted(stream, "head") as node:
                    await node.send_all(newer)
                    while await node.receive_some():
                        pass

            (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
            tasks.start_soon(trio.serve_listeners, answer, [listener])
            host, port = listener.socket.getsockname()[:2]
            me = made.identity("laptop", made.trusts["head"])
            words = rf"a \({host}:{port}\): it speaks version {PROTOCOL + 1} {older}"
            with pytest.raises(MismatchError, match=words):
                async with dial(open_tcp, host, port, me, "control", seconds=5):
                    pass
            tasks.cancel_scope.cancel()

    limited(main)


def test_a_device_of_the_house_cannot_be_its_head_nor_pass_for_another(
    lab: ModuleType, houses: Houses
) -> None:
    async def main() -> None:
        async with house(lab, houses, "a", "b") as made, made.coordinator(plan_at((0, 3, 6), 4)) as head:

            async def refused(me: Any, purpose: Any, match: str) -> None:
                with pytest.raises(UntrustedError, match=match):
                    async with dial(open_tcp, *made.addresses["a"], me, purpose, seconds=5) as (there, _):
                        await there.receive()

            mine = made.identity("laptop", made.trusts["b"])
            for _ in range(3):
                await refused(mine, "control", "is a device of the house and not its head")
            log = made.net.nodes[7001].log
            assert len([line for line in log if "not its head" in line]) == 1, "it may try for ever"
            for purpose in ("step", "bulk", "control"):
                for other in ("head", "a"):
                    false = replace(mine, incarnation=made.trusts[other].incarnation())
                    await refused(false, purpose, "claims to be another device of the house")
            assert await lab.collect(head, [7], 5) == lab.oracle([7], 5)

    limited(main)


def test_a_process_bears_the_name_of_its_device_in_the_house(lab: ModuleType, houses: Houses) -> None:
    """So no device passes for another to those who read what is said."""

    async def main() -> None:
        async with house(lab, houses, "a", "b") as made:
            long = "x" * 59
            names = (
                ("a", "a of b"),
                ("b", "b"),
                ("the other b", "the other b"),
                (f"{long}!", f"{long} of b"),
            )
            for name, shown in names:
                me = made.identity(name, made.trusts["b"])
                with pytest.raises(UntrustedError):
                    async with dial(open_tcp, *made.addresses["a"], me, "control", seconds=60) as (there, _):
                        await there.receive()
                said = made.net.nodes[7001].log[-1]
                assert said.startswith(f"{shown} (127.0.0.1:")

    limited(main)


def test_a_device_may_use_a_node_of_its_own(lab: ModuleType, houses: Houses) -> None:
    async def main() -> None:
        async with (
            house(lab, houses, "a") as made,
            made.coordinator(plan_at((0, 6)), made.trusts["a"]) as own,
        ):
            assert await lab.collect(own, [7], 5) == lab.oracle([7], 5)

    limited(main)


def test_nodes_learn_of_a_device_that_has_joined_later(lab: ModuleType, houses: Houses) -> None:
    """a was paired before b, so only the head's list lets b dial it."""

    async def main() -> None:
        async with house(lab, houses, "a", "b") as made:
            kept: list[Any] = []
            trust = made.trusts["a"]
            trust.update(houses.devices("head", "a"))
            trust._keep = lambda *told: kept.append(told)
            async with made.coordinator(plan_at((0, 3, 6), 4), measure_links=True) as head:
                assert await lab.collect(head, [7], 5) == lab.oracle([7], 5)
            assert [({device.name for device in devices}, where) for devices, where in kept] == [
                ({"head", "a", "b"}, ())
            ]

    limited(main)


def test_nodes_learn_of_another_address_of_the_head_while_they_are_connected(
    lab: ModuleType, houses: Houses
) -> None:
    async def main() -> None:
        async with house(lab, houses, "a") as made:
            kept: list[Any] = []
            made.trusts["a"]._keep = lambda *told: kept.append(told)
            for where in (
                (Address("10.0.0.9", 7077),),
                (Address("10.0.0.8", 7077), Address("fd00::8", 7077)),
            ):
                made.trusts["head"].moved(where)
            async with made.coordinator(plan_at((0, 6)), measure_links=False):
                made.trusts["head"].moved((Address("10.0.0.7", 7077),))
                while len(kept) < 2:  # noqa: ASYNC110 (it ends when the node has heard)
                    await trio.sleep(0.01)
            assert kept == [
                (made.trusts["a"].devices, (Address("10.0.0.8", 7077), Address("fd00::8", 7077))),
                (made.trusts["a"].devices, (Address("10.0.0.7", 7077),)),
            ]

    limited(main)


def test_a_list_that_changes_while_a_node_is_told_of_it_reaches_the_node(
    lab: ModuleType, houses: Houses
) -> None:
    """The node has not joined then, so it does not hear of the change as the others do."""

    async def main() -> None:
        async with house(lab, houses, "a", "b") as made:
            head, node = made.trusts["head"], made.trusts["a"]
            del made.addresses["b"]
            hear = node.hear

            def revoked_meanwhile(*told: Any) -> None:
                head.update(houses.devices("head", "a"))
                hear(*told)

            node.hear = revoked_meanwhile
            async with made.coordinator(plan_at((0, 6)), measure_links=False):
                assert node.devices == houses.devices("head", "a")

    limited(main)


def test_a_list_that_cannot_be_put_in_force_is_refused(houses: Houses) -> None:
    trust = houses.trust("a", ["head", "a", "b"])
    devices = houses.devices("head", "a")
    houses.own("a").unlink()
    with pytest.raises(ValueError, match="cannot be read"):
        trust.hear(devices)


def test_a_revoked_device_loses_all_connections_and_the_answer_goes_on(
    lab: ModuleType, houses: Houses, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coordinator, "TICK_SECONDS", 0.01)  # else the answer may end before the list is seen

    async def main() -> None:
        async with house(lab, houses, "a", "b", "c") as made:
            trust = made.trusts["head"]
            listed: list[Any] = []
            trust._look = lambda: listed.pop() if listed else None

            def plan(nodes: Any, links: Any) -> Any:
                names = {node.label for node in nodes}
                return plan_at((0, 2, 4, 6) if "b" in names else (0, 3, 6), 4)(nodes, links)

            async with made.coordinator(plan, measure_links=False) as head:
                async with head.generate([1, 2], max_tokens=200) as tokens:
                    got = [await anext(tokens)]
                    listed.append(houses.devices("head", "a", "c"))
                    got += [token async for token in tokens]
                assert got == lab.oracle([1, 2], 200)
                assert [node.label for node in head.nodes] == ["a", "c"] and head.recoveries >= 1
                for name in ("a", "c"):
                    assert {device.name for device in made.trusts[name].devices} == {"head", "a", "c"}
                me = made.identity("b", made.trusts["b"])
                with pytest.raises(UntrustedError, match="does not know this device"):
                    async with dial(open_tcp, *made.addresses["a"], me, "step", seconds=5):
                        pass

    limited(main)


def test_slow_handshakes_end_in_time_and_keep_nobody_out(lab: ModuleType, houses: Houses) -> None:
    """200 connections that say a byte of a handshake, and one that sends a byte now and then."""

    def hasty(parts: NodeParts) -> NodeParts:
        return replace(parts, timing=replace(parts.timing, handshake=0.5))

    async def main() -> None:
        async with house(lab, houses, "a", change=hasty) as made:
            start = trio.current_time()
            slow = await trio.open_tcp_stream(*made.addresses["a"])
            async with trio.open_nursery() as tasks:

                async def drip() -> None:
                    with suppress(trio.BrokenResourceError):
                        for byte in b"\x16\x03\x01\x02\x00" + bytes(500):
                            await slow.send_all(bytes([byte]))
                            await trio.sleep(0.02)

                tasks.start_soon(drip)
                with suppress(trio.BrokenResourceError):
                    assert await slow.receive_some(1) == b""
                assert trio.current_time() - start < 3
                tasks.cancel_scope.cancel()
            idle = [await trio.open_tcp_stream(*made.addresses["a"]) for _ in range(200)]
            for stream in idle:
                with suppress(trio.BrokenResourceError):
                    await stream.send_all(b"\x16")
            async with made.coordinator(plan_at((0, 6)), measure_links=False) as head:
                assert await lab.collect(head, [7], 5) == lab.oracle([7], 5)
            for stream in (slow, *idle):
                await stream.aclose()

    limited(main)


def test_a_peer_that_is_silent_in_its_handshake_is_lost(houses: Houses, lab: ModuleType) -> None:
    async def main() -> None:
        me = replace(lab.identity("laptop", 1), trust=houses.trust("head", ["head", "a"]))
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        with pytest.raises(NodeLostError, match=r"did not answer within 0\.2 s"):
            async with dial(open_tcp, *listener.socket.getsockname()[:2], me, "control", seconds=0.2):
                pass
        await listener.aclose()

    limited(main)


def test_a_handshake_that_took_all_the_time_leaves_none_for_hello(
    lab: ModuleType, houses: Houses, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other tasks may run between the last step of TLS and what follows it."""
    accepted = Trust.accepted

    async def late(trust: Trust, stream: trio.abc.Stream, who: str) -> Any:
        opened = await accepted(trust, stream, who)
        monkeypatch.setattr(trio, "current_time", lambda: now() + 60)
        return opened

    now = trio.current_time

    async def main() -> None:
        async with house(lab, houses, "a") as made:
            monkeypatch.setattr(Trust, "accepted", late)
            stream = await trio.open_tcp_stream(*made.addresses["a"])
            opened = await made.trusts["head"].dialled(stream, "a")
            assert await opened.receive_some() == b""
            await opened.aclose()
            (line,) = made.net.nodes[7001].log
            assert "did not say Hello within 0 s" in line

    limited(main)


def test_a_device_that_has_just_paired_is_let_in_before_the_head_looks_at_its_list(houses: Houses) -> None:
    """The next look tells the others; of a list that cannot be used, it tells the reason."""

    async def main() -> None:
        lists: list[Any] = [houses.devices("head", "a")]
        looks = lambda: lists.pop() if lists else None  # noqa: E731
        head = Trust(houses.own("head"), houses.devices("head"), look=looks)
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")

        async def let_in() -> None:
            opened = await head.accepted(await listener.accept(), "a device")
            assert opened.device.name == "a"
            await trio.aclose_forcefully(opened)

        async def a_connects() -> None:
            async with trio.open_nursery() as tasks:
                tasks.start_soon(let_in)
                stream = await trio.open_tcp_stream(*listener.socket.getsockname()[:2])
                await trio.aclose_forcefully(await houses.trust("a").dialled(stream, "head"))

        await a_connects()
        assert (head.refresh(), head.refresh()) == (True, False)
        lists.append(())
        await a_connects()
        with pytest.raises(ValueError, match="1 to 64 devices"):
            head.refresh()
        assert not head.refresh()
        lists.append(())
        await a_connects()
        lists.append(houses.devices("head", "a"))
        assert head.refresh() and not head.refresh(), "it was repaired before anybody was told"
        await listener.aclose()

    limited(main)


def test_a_handshake_that_never_ends_is_cut_by_its_length(houses: Houses) -> None:
    async def main() -> None:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        client = await trio.open_tcp_stream(*listener.socket.getsockname()[:2])
        server = await listener.accept()
        async with trio.open_nursery() as tasks:

            async def flood() -> None:  # records of a ClientHello that is said to be of 16 MiB
                with suppress(trio.BrokenResourceError):
                    await client.send_all(b"\x16\x03\x01\x40\x00\x01\xff\xff\xff" + bytes(16380))
                    for _ in range(1000):
                        await client.send_all(b"\x16\x03\x01\x40\x00" + bytes(16384))
                        await trio.lowlevel.checkpoint()

            tasks.start_soon(flood)
            with pytest.raises(NetError, match=r"TLS 1\.3 failed"):
                await houses.trust("head", ["head"]).accepted(server, "a stranger")
            tasks.cancel_scope.cancel()
        await client.aclose()
        await listener.aclose()

    limited(main)


def test_a_list_is_taken_from_the_head_and_on_its_own_device_from_the_file(
    lab: ModuleType, houses: Houses
) -> None:
    """A list that cannot be one of the house changes nothing, and ends the connection that brought it."""

    async def main() -> None:
        async with house(lab, houses, "a") as made:
            (node,) = made.net.nodes.values()
            node, trust = node.node, made.trusts["a"]
            head = SimpleNamespace(peer="laptop", device=trust.devices[0])
            for devices in (
                houses.devices("head"),
                houses.devices("a"),
                (*houses.devices("head", "a"), replace(houses.device("b"), certificate="AAAA")),
            ):
                with pytest.raises(RemoteProtocolError, match="sent a list of its house"):
                    node._learn(head, HouseList(devices))
            assert trust.devices == houses.devices("head", "a")
            node._learn(head, HouseList(houses.devices("head", "a", "b")))
            assert trust.devices == houses.devices("head", "a", "b")

            own = made.trusts["head"]
            own._look = lambda: houses.devices("head", "a", "c")
            node._parts = replace(node._parts, identity=made.identity("laptop", own))
            before_it_was_renamed = replace(own.own, name="laptop-1")
            for device in (own.own, before_it_was_renamed):
                node._learn(SimpleNamespace(peer="laptop", device=device), HouseList(houses.devices("head")))
                assert own.devices == houses.devices("head", "a", "c")

    limited(main)


def test_a_list_that_was_damaged_meanwhile_ends_no_answer(lab: ModuleType, houses: Houses) -> None:
    async def main() -> None:
        log: list[str] = []
        async with house(lab, houses, "a") as made:
            trust, broken = made.trusts["head"], [ShoalError("house.json is damaged")]

            def look() -> None:
                if broken:
                    raise broken.pop()

            async with made.coordinator(plan_at((0, 6)), measure_links=False, log=log.append) as head:
                trust._look = look
                while broken:  # noqa: ASYNC110
                    await trio.sleep(0.01)
                assert await lab.collect(head, [7], 5) == lab.oracle([7], 5)
        assert "the changed list of the house is not used: house.json is damaged" in log

    limited(main)
