"""Every address of a name is checked and served, on one port, and named so that a coordinator can dial it."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import trio

from shoal.net import listen
from shoal.net.dial import open_tcp
from shoal.net.errors import AddressInUseError, NetError

REAL = socket.getaddrinfo
Names = Callable[[dict[str, Sequence[str]]], None]


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Names:
    """Gives names their addresses, in that order, as a hosts file does."""

    def give(table: dict[str, Sequence[str]]) -> None:
        def getaddrinfo(host: Any, port: Any, *args: Any, **kwargs: Any) -> Any:
            name = host.decode() if isinstance(host, bytes) else host
            if name in table:
                return [e for a in table[name] for e in REAL(a, port, *args, **kwargs)]
            return REAL(host, port, *args, **kwargs)

        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)

    return give


def serve(host: str, port: int = 0) -> list[str]:
    """The names under which a host is served; each has been dialled and found."""

    async def main() -> list[str]:
        listeners = await listen.listen(host, listen.addresses(host), port)
        found = listen.named(listeners)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.serve_listeners, _greet, listeners)
            for name in found:
                where, _, at = name.rpartition(":")
                stream = await open_tcp(where.strip("[]"), int(at))
                assert await stream.receive_some(1) == b"!"
                await stream.aclose()
            nursery.cancel_scope.cancel()
        return found

    return trio.run(main)


async def _greet(stream: trio.SocketStream) -> None:
    await stream.send_all(b"!")
    await stream.aclose()


def ports(found: Sequence[str]) -> set[str]:
    return {name.rpartition(":")[2] for name in found}


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("two", {"two": ["127.0.0.1", "127.0.0.2"]}),
        ("turned", {"turned": ["127.0.0.2", "127.0.0.1"]}),
        ("thrice", {"thrice": ["127.0.0.1", "127.0.0.1", "127.0.0.3"]}),
    ],
)
def test_all_addresses_of_a_name_are_served_on_one_port(
    names: Names, name: str, table: dict[str, list[str]]
) -> None:
    names(table)
    found = serve(name)
    assert [each.rpartition(":")[0] for each in found] == list(dict.fromkeys(table[name]))
    assert len(ports(found)) == 1 and ports(found) != {"0"}


def test_localhost_is_served_in_both_families_whichever_is_first(names: Names) -> None:
    names({"localhost": ["::1", "127.0.0.1"]})
    found = serve("localhost")
    assert [each.rpartition(":")[0] for each in found] == (["[::1]"] if has_ipv6() else []) + ["127.0.0.1"]
    assert len(ports(found)) == 1


def test_every_address_of_the_device_is_every_one_of_both_families() -> None:
    assert listen.addresses("::") == ("0.0.0.0", "::")
    assert listen.addresses("0.0.0.0") == ("0.0.0.0",)
    found = serve("::")
    own = [each.rpartition(":")[0] for each in found]
    assert own[0] == "127.0.0.1"  # what a coordinator on this device can use
    assert ("[::1]" in own) == has_ipv6()
    assert not {"0.0.0.0", "[::]"} & set(own)
    assert len(ports(found)) == 1


@pytest.mark.parametrize(
    ("host", "found"),
    [("127.1", ("127.0.0.1",)), ("0", ("0.0.0.0",)), ("::ffff:127.0.0.1", ("127.0.0.1",))],
)
def test_other_spellings_of_an_address(host: str, found: tuple[str, ...]) -> None:
    assert listen.addresses(host) == found


@pytest.mark.parametrize(
    ("addresses", "others"),
    [
        (["127.0.0.1"], None),
        (["127.9.9.9", "::1"], None),
        (["::1", "192.168.1.20"], "192.168.1.20"),
        (["10.0.0.1", "127.0.0.1"], "10.0.0.1"),
        (["::ffff:10.0.0.1"], "10.0.0.1"),
        (["fe80::1"], "fe80::1"),
        (["0.0.0.0"], "0.0.0.0"),
        (["::"], "0.0.0.0"),
    ],
)
def test_one_address_that_others_reach_is_enough(
    names: Names, addresses: list[str], others: str | None
) -> None:
    names({"name": addresses})
    assert listen.reachable(listen.addresses("name")) == others


def test_a_port_that_is_taken_on_one_of_the_addresses_is_in_use(names: Names) -> None:
    names({"two": ["127.0.0.1", "127.0.0.2"]})
    with socket.socket() as other:
        other.bind(("127.0.0.2", 0))
        other.listen()
        with pytest.raises(AddressInUseError, match=f"port {other.getsockname()[1]} of two"):
            serve("two", other.getsockname()[1])
        # What was opened before is closed again.
        with socket.socket() as first:
            first.bind(("127.0.0.1", other.getsockname()[1]))


def test_a_free_port_is_one_that_is_free_on_all(names: Names, monkeypatch: pytest.MonkeyPatch) -> None:
    names({"two": ["127.0.0.1", "127.0.0.2"]})
    opened, tries = trio.open_tcp_listeners, 0

    async def taken_at_first(port: int, *, host: str) -> list[trio.SocketListener]:
        nonlocal tries
        if host == "127.0.0.2":
            tries += 1
            if tries < 4:
                raise OSError(errno.EADDRINUSE, "in use")
        return await opened(port, host=host)

    monkeypatch.setattr(trio, "open_tcp_listeners", taken_at_first)
    assert len(serve("two")) == 2
    tries = -99
    with pytest.raises(AddressInUseError):
        serve("two")


def test_an_address_of_another_device_is_left_out_unless_it_is_the_only_one(names: Names) -> None:
    names({"moved": ["192.0.2.7", "127.0.0.1"], "gone": ["192.0.2.7"]})
    assert [each.rpartition(":")[0] for each in serve("moved")] == ["127.0.0.1"]
    with pytest.raises(NetError, match=r"cannot listen on gone:0: .*address"):
        serve("gone")


@pytest.mark.parametrize("host", ["no.such.host.invalid", "a" * 300, "ä..b", "not a name"])
def test_a_name_without_an_address_is_refused(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: Any, **__: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    if host.isascii() and len(host) < 64:  # no question goes out
        monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(NetError, match=r"cannot listen on .*127\.0\.0\.1"):
        listen.addresses(host)


def test_a_coordinator_tries_all_addresses_of_a_name(names: Names) -> None:
    """The node listens on the second only."""
    names({"node": ["127.0.0.2", "127.0.0.1"]})

    async def main() -> None:
        (listener,) = await listen.listen("127.0.0.1", ["127.0.0.1"], 0)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.serve_listeners, _greet, [listener])
            async with await open_tcp("node", listener.socket.getsockname()[1]) as stream:
                assert await stream.receive_some(1) == b"!"
            nursery.cancel_scope.cancel()

    trio.run(main)
