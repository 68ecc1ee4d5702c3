"""The token of an invite, the proofs of both sides, and messages as attackers send them."""

from __future__ import annotations

import base64
import secrets
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.houses import Houses

from shoal.net.errors import NetError, RemoteProtocolError, UntrustedError
from shoal.net.messages import Address, PairedDevice
from shoal.net.pairing import (
    MOST_ATTEMPTS,
    Challenge,
    Invite,
    InviteState,
    Join,
    Proof,
    Refused,
    Welcome,
    body_size,
    check_welcome,
    decode,
    encode,
    new_nonce,
    proof_of,
    read_token,
    transcript,
)

SECRET = bytes(range(16))
HEAD, PHONE = (base64.b64encode(name * 40).decode() for name in (b"head", b"phone"))


def key(certificate: str) -> str:
    import hashlib

    return hashlib.sha256(base64.b64decode(certificate)).hexdigest()


INVITE = Invite((("192.168.1.5", 7001), ("fd00::5", 7001)), key(HEAD), SECRET, 1_800_000_000)
JOIN, CHALLENGE = Join("phone", PHONE, "11" * 32), Challenge("22" * 32)
DEVICES = (PairedDevice("laptop", "head", HEAD), PairedDevice("phone", "device", PHONE))


def said(join: Join = JOIN, challenge: Challenge = CHALLENGE) -> bytes:
    return transcript(INVITE.head, join, challenge)


def proof(secret: bytes = SECRET, join: Join = JOIN, challenge: Challenge = CHALLENGE) -> Proof:
    return Proof(proof_of(secret, "device", said(join, challenge)))


def state() -> InviteState:
    return InviteState(SECRET, INVITE.head, 100.0)


def test_a_token_says_what_the_invite_says_however_it_is_typed() -> None:
    token = INVITE.token()
    assert read_token(token) == INVITE
    assert read_token(f"  {token[:40].lower()}\n {token[40:]} ") == INVITE
    assert set(token) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-"), "the letters of a small QR code"
    assert SECRET.hex() not in repr(INVITE) and "secret hidden" in repr(INVITE)


@given(st.integers(7, 10_000), st.sampled_from("ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"))
def test_a_token_with_a_wrong_or_missing_letter_is_refused(place: int, letter: str) -> None:
    token = INVITE.token()
    place = 7 + place % (len(token) - 8)  # the last letter has bits that mean nothing
    with pytest.raises(UntrustedError, match="no token of `shoal invite`"):
        read_token(token[:place])
    if token[place] != letter:
        with pytest.raises(UntrustedError, match="no token of `shoal invite`"):
            read_token(token[:place] + letter + token[place + 1 :])


@given(st.binary(max_size=200))
def test_any_bytes_in_the_place_of_a_token_are_refused(data: bytes) -> None:
    with pytest.raises(UntrustedError):
        read_token("SHOAL1-" + base64.b32encode(data).decode())


def test_both_sides_prove_the_secret_once() -> None:
    at = state()
    assert at.admit(JOIN, CHALLENGE, proof(), 50.0) == said() and at.over
    with pytest.raises(UntrustedError, match="has been used"):
        at.admit(JOIN, CHALLENGE, proof(), 50.0)
    check_welcome(INVITE, JOIN, CHALLENGE, Welcome(DEVICES, proof_of(SECRET, "head", said(), DEVICES)))


def test_an_expired_invite_is_refused_although_the_secret_is_right() -> None:
    with pytest.raises(UntrustedError, match="has expired"):
        state().admit(JOIN, CHALLENGE, proof(), 100.0)


def test_wrong_secrets_end_an_invite() -> None:
    at = state()
    for _ in range(MOST_ATTEMPTS):
        assert not at.over
        with pytest.raises(UntrustedError, match="the secret is wrong"):
            at.admit(JOIN, CHALLENGE, proof(secrets.token_bytes(16)), 1.0)
    with pytest.raises(UntrustedError, match="wrong secrets were tried"):
        at.admit(JOIN, CHALLENGE, proof(), 1.0)


def test_a_proof_is_for_one_connection_one_certificate_and_one_side() -> None:
    """Replayed, with another certificate or name, reflected by the head or by the device."""
    other = Join("phone", base64.b64encode(b"thief" * 40).decode(), JOIN.nonce)
    for join, challenge, shown in (
        (JOIN, Challenge(new_nonce()), proof()),
        (replace(JOIN, nonce=new_nonce()), CHALLENGE, proof()),
        (other, CHALLENGE, proof()),
        (replace(JOIN, name="laptop"), CHALLENGE, proof()),
        (JOIN, CHALLENGE, Proof(proof_of(SECRET, "head", said()))),
    ):
        with pytest.raises(UntrustedError, match="the secret is wrong"):
            state().admit(join, challenge, shown, 1.0)
    more = (*DEVICES, PairedDevice("thief", "device", other.certificate))
    for welcome in (
        Welcome(DEVICES, proof().mac),
        Welcome(DEVICES, proof_of(SECRET, "device", said(), DEVICES)),
        Welcome(more, proof_of(SECRET, "head", said(), DEVICES)),
        Welcome(DEVICES, proof_of(bytes(16), "head", said(), DEVICES)),
        Welcome(DEVICES, proof_of(SECRET, "head", said(), DEVICES), (Address("10.0.0.66", 7077),)),
    ):
        with pytest.raises(UntrustedError, match="does not know the secret"):
            check_welcome(INVITE, JOIN, CHALLENGE, welcome)


@pytest.mark.parametrize(
    "devices",
    [
        *((), DEVICES[1:], (replace(DEVICES[0], role="device"), DEVICES[1])),
        *(
            (*DEVICES, replace(DEVICES[1], certificate="!")),
            (*DEVICES, PairedDevice("phone", "device", "bm8=")),
        ),
    ],
    ids=["empty", "no head", "two devices", "no base64", "a name twice"],
)
def test_a_list_that_is_none_of_a_house_is_refused(devices: tuple[PairedDevice, ...]) -> None:
    with pytest.raises(NetError, match="none of a house"):
        check_welcome(INVITE, JOIN, CHALLENGE, Welcome(devices, proof_of(SECRET, "head", said(), devices)))


@pytest.mark.parametrize(
    "devices", [DEVICES[:1], (replace(DEVICES[0], role="device"), replace(DEVICES[1], role="head"))]
)
def test_a_list_without_the_head_or_the_device_is_refused(devices: tuple[PairedDevice, ...]) -> None:
    with pytest.raises(NetError, match="without itself or this one"):
        check_welcome(INVITE, JOIN, CHALLENGE, Welcome(devices, proof_of(SECRET, "head", said(), devices)))


def test_sizes_are_checked_before_a_body_is_read() -> None:
    frame = encode(Refused("used"))
    assert decode(frame[:5], frame[5:]) == Refused("used")
    assert body_size(frame[:5], Welcome) == len(frame) - 5
    with pytest.raises(RemoteProtocolError, match="more than are allowed"):
        body_size(b"\x00\xff\xff\xff\x7f", Join)
    with pytest.raises(RemoteProtocolError, match="does not speak shoal's pairing protocol"):
        body_size(b"\x03\x01\x00\x00\x00", Join)


@given(st.binary(max_size=300))
def test_any_body_is_a_message_or_one_of_our_errors(body: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        decode(b"\x00" + len(body).to_bytes(4, "little"), body)


def test_a_house_lists_no_two_devices_that_could_pass_for_each_other(tmp_path: Path) -> None:
    from shoal.net.tls import Trust

    houses = Houses(tmp_path)
    head, phone = houses.devices("head", "a")
    for devices, match in (
        ((head, replace(phone, name="head")), "the same name or key"),
        ((head, phone, replace(phone, name="other")), "the same name or key"),
        ((replace(head, role="device"), phone), "no device is the head"),
        ((phone, replace(phone, role="head")), "the same name or key"),
        ((phone,), "no device is the head"),
        ((), "1 to 64 devices"),
    ):
        with pytest.raises(ValueError, match=match):
            Trust(houses.own("head"), devices)
    with pytest.raises(ValueError, match="not in the list"):
        Trust(houses.own("b"), (head, phone))
