"""Pairing over sockets, as `shoal invite` and `shoal join` do it, and those who try to get between."""

from __future__ import annotations

import errno
import os
import select
import socket
import stat
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import trio
import trio.testing
from tests.houses import Houses
from tests.pairing import attack, inviting

from shoal import house, up
from shoal.cli import main
from shoal.engine.errors import ShoalError
from shoal.house_node import HouseNode
from shoal.net.errors import NodeLostError
from shoal.net.messages import Address, PairedDevice
from shoal.net.pairing import MOST_ATTEMPTS, Invite
from shoal.net.tls import open_tls, pairing_client
from shoal.pairing import MOST_CONNECTIONS, Inviting, join_house


@pytest.fixture
def devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """`with devices(name)`: what this process does is done on that device."""

    @contextmanager
    def on(name: str) -> Iterator[None]:
        with monkeypatch.context() as patch:
            patch.setenv("XDG_CONFIG_HOME", str(tmp_path / name))
            yield

    return on


@pytest.fixture
def head(devices: Callable[[str], Any]) -> Iterator[None]:
    with devices("head"):
        house.open_or_create("laptop")
        yield


@pytest.mark.usefixtures("head")
def test_a_device_joins_and_both_keep_the_same_list(devices: Callable[[str], Any], tmp_path: Path) -> None:
    async def body(open_invite: Inviting, tasks: trio.Nursery) -> None:
        with devices("phone"):
            own = house.own_certificate()
        # Both sides run in this process, so the device's part that touches files is done as it does it.
        assert (
            await attack(open_invite.invite, b64encode(own).decode(), open_invite.invite.secret, "phone")
            == ""
        )

    joined, log = inviting(body)
    assert isinstance(joined, PairedDevice) and joined.name == "phone" and log == []
    listed = house.load()
    assert listed is not None and [(device.name, device.role) for device in listed] == [
        ("laptop", "head"),
        ("phone", "device"),
    ]
    for file in (tmp_path / "head/shoal").iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, file
    with devices("phone"):
        house.save_joined(listed, (Address("192.168.1.5", 7077),))
        trust = house.trust()
        assert trust is not None and trust.own.name == "phone"
        house.keep_head(())  # a head that tells nothing
        assert house.head_addresses() == (Address("192.168.1.5", 7077),)
        house.keep_head((Address("192.168.1.6", 7078),))
        assert house.head_addresses() == (Address("192.168.1.6", 7078),)
        running = HouseNode(trust, (), log.append)
        before = running.addresses()
        house.leave()
        assert running.addresses() == before == (("192.168.1.6", 7078),), "it goes on until it is stopped"
        house.keep_head((Address("192.168.1.7", 7077),))
        assert house.head_addresses() == (), "a house that was left"


@pytest.mark.usefixtures("head")
def test_an_invite_ends_after_wrong_secrets_and_nobody_has_joined() -> None:
    async def body(open_invite: Inviting, tasks: trio.Nursery) -> None:
        own = b64encode(house.own_certificate()).decode()
        for _ in range(MOST_ATTEMPTS):
            assert "the secret is wrong" in await attack(open_invite.invite, own, os.urandom(16))

    ended, log = inviting(body)
    assert "somebody has tried wrong secrets" in str(ended)
    assert len(log) == MOST_ATTEMPTS and all("has not joined" in line for line in log)
    devices = house.load()
    assert devices is not None and len(devices) == 1


@pytest.mark.usefixtures("head")
@pytest.mark.parametrize("kind", ["garbage", "changed"])
def test_a_certificate_that_shoal_does_not_make_is_refused_and_the_invite_stays_open(
    kind: str, tmp_path: Path
) -> None:
    houses = Houses(tmp_path)
    good = b64decode(houses.device("a").certificate)
    bad = b"garbage" if kind == "garbage" else good[:-1] + bytes([good[-1] ^ 1])

    async def body(open_invite: Inviting, tasks: trio.Nursery) -> None:
        invite = open_invite.invite
        assert "its certificate cannot be used" in await attack(
            invite, b64encode(bad).decode(), invite.secret
        )
        assert await attack(invite, houses.device("a").certificate, invite.secret) == ""

    joined, _ = inviting(body)
    assert isinstance(joined, PairedDevice)


@pytest.mark.usefixtures("head")
def test_strangers_that_say_nothing_or_too_much_keep_no_device_out(tmp_path: Path) -> None:
    """Idle connections, plain text, and a message that is announced with 4 GB."""
    houses = Houses(tmp_path)

    async def body(open_invite: Inviting, tasks: trio.Nursery) -> None:
        invite = open_invite.invite
        where = invite.addresses[0]
        idle = [await trio.open_tcp_stream(*where) for _ in range(30)]
        for stream in idle:
            with suppress(trio.BrokenResourceError):
                await stream.send_all(b"\x16")
        plain = await trio.open_tcp_stream(*where)
        await plain.send_all(b"GET / HTTP/1.1\r\n\r\n")
        liar = await open_tls(await trio.open_tcp_stream(*where), "head", pairing_client(), server=False)
        await liar.send_all(b"\x00\xff\xff\xff\xff")
        assert b"more than are allowed" in await liar.receive_some()
        assert await attack(invite, houses.device("a").certificate, invite.secret) == ""
        for stream in (*idle, plain, liar):
            await trio.aclose_forcefully(stream)

    joined, log = inviting(body)
    assert isinstance(joined, PairedDevice) and any("more than are allowed" in line for line in log)


@pytest.mark.usefixtures("head")
def test_many_connections_at_once_keep_no_more_places_than_there_are() -> None:
    """Those that have sent something are accepted together, before a task of any of them has run."""

    async def body(open_invite: Inviting, tasks: trio.Nursery) -> None:
        flood = [socket.create_connection(open_invite.invite.addresses[0]) for _ in range(30)]
        for stream in flood:
            stream.sendall(b"\x16")
        await trio.testing.wait_all_tasks_blocked(0.2)
        ended, _, _ = select.select(flood, [], [], 0)
        assert len(flood) - len(ended) == MOST_CONNECTIONS
        for stream in flood:
            stream.close()

    inviting(body)


def test_a_head_that_is_gone_is_said_with_what_to_check(devices: Callable[[str], Any]) -> None:
    with (
        devices("phone"),
        pytest.raises(NodeLostError, match=r"check that `shoal invite` still waits.*may have expired"),
    ):
        trio.run(join_house, Invite((("127.0.0.1", 9),), "ab" * 32, bytes(16), 1), "phone")


@pytest.mark.usefixtures("head")
def test_devices_are_listed_renamed_and_revoked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    houses = Houses(tmp_path)
    for name in ("a", "b"):
        house.change(lambda known, name=name: house.added(known, replace(houses.device(name), name="phone")))  # type: ignore[misc]
    assert main(["devices", "rename", "phone-2", "tablet"]) == 0
    assert main(["devices", "revoke", "phone"]) == 0
    capsys.readouterr()
    assert main(["devices"]) == 0
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()[2:]] == [
        ["laptop", "head"], ["tablet", "device"],
    ]  # fmt: skip
    for wrong in (
        ["revoke", "phone"],
        ["revoke", "laptop"],
        ["rename", "tablet", "laptop"],
        ["rename", "tablet"],
    ):
        assert main(["devices", *wrong]) != 0
    assert "shoal: error: there is no device 'phone'; there are: laptop, tablet" in capsys.readouterr().err


@pytest.mark.usefixtures("head")
def test_a_list_that_no_message_could_carry_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    def filled(devices: tuple[PairedDevice, ...]) -> list[PairedDevice]:
        return [*devices, *(PairedDevice(f"d{i}", "device", f"{i:04}{'x' * 1424}") for i in range(41))]

    assert len(house.change(filled)) == 42
    assert main(["devices", "rename", "d7", "\N{FAMILY}" * 64]) == 1
    assert "would be longer than a message may be" in capsys.readouterr().err
    assert main(["devices", "rename", "d7", "phone"]) == 0


@pytest.mark.usefixtures("head")
def test_a_full_disk_is_said_to_the_device_and_leaves_the_invite_open(
    devices: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    async def body(open_invite: Inviting, tasks: trio.Nursery) -> None:
        with devices("phone"):
            own = b64encode(house.own_certificate()).decode()
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            said = await attack(open_invite.invite, own, open_invite.invite.secret, "phone")
        assert "house.json cannot be written" in said and "free space there" in said
        assert house.load() is not None and len(house.load() or ()) == 1
        assert await attack(open_invite.invite, own, open_invite.invite.secret, "phone") == ""

    joined, log = inviting(body)
    assert isinstance(joined, PairedDevice) and joined.name == "phone"
    assert len(log) == 1 and "has not joined" in log[0]


def test_only_the_head_changes_the_house(devices: Callable[[str], Any], tmp_path: Path) -> None:
    houses = Houses(tmp_path)
    with devices("phone"):
        own = PairedDevice("phone", "device", b64encode(house.own_certificate()).decode())
        house.save_joined((houses.device("head"), own))
        for command in (["devices", "revoke", "phone"], ["invite"]):
            assert main(command) == 18
        assert main(["devices", "leave"]) == 0 and house.load() is None


@pytest.mark.usefixtures("head")
def test_files_that_others_may_read_or_that_are_damaged_are_not_used(tmp_path: Path) -> None:
    place = tmp_path / "head/shoal"
    (place / house.IDENTITY).chmod(0o640)
    with pytest.raises(ShoalError, match=r"other users may read.*chmod 600"):
        house.trust()
    (place / house.IDENTITY).chmod(0o600)
    assert house.trust() is not None
    (place / house.HOUSE).write_text('{"version": 1}')
    with pytest.raises(ShoalError, match="is damaged"):
        house.trust()
    (place / house.HOUSE).unlink()
    assert house.trust() is None


@pytest.mark.usefixtures("head")
def test_a_list_that_was_changed_is_seen_by_a_process_that_runs(tmp_path: Path) -> None:
    trust = house.trust()
    assert trust is not None and not trust.refresh()
    house.change(lambda devices: house.added(devices, Houses(tmp_path).device("a")))
    assert trust.refresh() and not trust.refresh()
    assert [device.name for device in trust.devices] == ["laptop", "a"]


def test_a_process_that_still_runs_does_not_bring_back_a_house_that_was_left(
    tmp_path: Path, devices: Callable[[str], Any]
) -> None:
    """Its head could otherwise get into the house that the device has joined since."""
    old, new = Houses(tmp_path / "old"), Houses(tmp_path / "new")
    for houses in (old, new):
        houses.place.mkdir()
    with devices("phone"):
        own = PairedDevice("phone", "device", b64encode(house.own_certificate()).decode())
        first = house_of(old, own)
        house.save_joined(first)
        trust = house.trust()
        assert trust is not None
        trust.hear((*first, old.device("b")))
        assert house.load() == (*first, old.device("b"))
        house.leave()
        trust.hear((*first, old.device("c")))
        assert house.load() is None
        house.save_joined(house_of(new, own))
        trust.hear(first)
        assert house.load() == house_of(new, own)


def house_of(houses: Houses, own: PairedDevice) -> tuple[PairedDevice, ...]:
    return (houses.device("head"), own)


def test_a_head_whose_address_changes_goes_on_although_that_cannot_be_kept(
    head: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    trust, said, nothing = house.trust(), list[str](), cast("Any", None)
    assert trust is not None
    (house.directory() / house.HEAD).mkdir(
        mode=0o700
    )  # as if the disk were full: no file can be written there
    monkeypatch.setattr(up, "named", lambda listeners: ["192.0.2.9:7077"])
    up._Head(nothing, nothing, nothing, nothing, nothing, said.append, nothing, nothing)._look_where(
        trust, ()
    )
    assert trust.addresses == (Address("192.0.2.9", 7077),)
    assert "cannot be kept" in said[0] and "192.0.2.9:7077" in said[1]
