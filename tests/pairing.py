"""Pairing over sockets in one process, whose device is the head: an open invite, and those who use it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import trio
from tests.patience import LIMIT

from shoal.net.errors import UntrustedError
from shoal.net.pairing import Challenge, Invite, Join, Proof, Welcome, new_nonce, proof_of, transcript
from shoal.net.tls import open_tls, pairing_client
from shoal.pairing import Inviting, _Line


def inviting(
    body: Callable[[Inviting, Any], Awaitable[None]], seconds: float = 30.0
) -> tuple[Any, list[str]]:
    """Runs `body` while an invite is open; what it ended with, and its log."""
    log: list[str] = []
    ended: list[Any] = []

    async def run() -> None:
        with trio.fail_after(LIMIT):
            open_invite = await Inviting.open(("127.0.0.1", 0), seconds, log.append)

            async def wait() -> None:
                try:
                    ended.append(await open_invite.wait(seconds))
                except UntrustedError as error:
                    ended.append(error)

            async with trio.open_nursery() as tasks:
                tasks.start_soon(wait)
                await body(open_invite, tasks)
                if not ended and not open_invite.state.over:
                    tasks.cancel_scope.cancel()

    trio.run(run)
    return (ended[0] if ended else None), log


async def attack(invite: Invite, certificate: str, secret: bytes, name: str = "thief") -> str:
    """Tries to join as a device that has this certificate; the reason why it may not."""
    raw = await trio.open_tcp_stream(*invite.addresses[0])
    stream = await open_tls(raw, "head", pairing_client(), server=False)
    try:
        line, join = _Line(stream, "head"), Join(name, certificate, new_nonce())
        await line.send(join)
        try:
            challenge = await line.receive(Challenge)
            said = transcript(invite.head, join, challenge)
            await line.send(Proof(proof_of(secret, "device", said)))
            await line.receive(Welcome)
        except UntrustedError as error:
            return str(error)
        return ""
    finally:
        await trio.aclose_forcefully(stream)
