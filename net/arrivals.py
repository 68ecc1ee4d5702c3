"""Which member of a coordinator a node is that can be reached at some address: decisions without I/O.

Where a house has a head that stays (net/reverse.py), its devices come and go, with other addresses and
other processes. What is known of a node is its address and, if it has told it, the incarnation of its
process, which begins with the hash of its device's key. So the same process is the same member, wherever it
is; another process at the same address has replaced the one before; and a device whose node is lost has
started it again.
"""

from __future__ import annotations

from dataclasses import replace

from .events import Command, Dial, Found, Redial, SendPing, TryAnew
from .members import ClusterState, Member, device_of
from .transition import Outcome

MOST_MEMBERS = 8
"""The most processes of a device that are members and not lost. That is more than may connect at a time
(reverse.MOST_NODES), since the loss of some may not have been noticed yet."""


def found(state: ClusterState, event: Found, now: float) -> Outcome:
    """Finds the member, or adds one, and has it dialled at its address."""
    member = _member(state, event)
    for i, other in enumerate(state.members):  # its address belongs to another device now
        if i != member and other.lost is not None and (other.host, other.port) == (event.host, event.port):
            state = state.changed(i, barred=True)
    if member is None and _crowds(state, event):
        return state, ()
    if member is None:
        member = len(state.members)
        new = Member(event.host, event.port, announced=event.incarnation)
        return replace(state, members=(*state.members, new)), (Dial(member),)
    before = state.members[member]
    same = event.incarnation in (None, before.incarnation)
    moved = (before.host, before.port) != (event.host, event.port)
    state = state.changed(
        member,
        host=event.host,
        port=event.port,
        announced=before.announced if same else event.incarnation,
        barred=False,
    )
    if before.barred:
        return state.changed(member, lost=before.lost if before.hello else None), (Dial(member),)
    commands: tuple[Command, ...] = ()
    if before.faulty is not None and event.incarnation == before.faulty:
        pass  # that process would fail again
    elif moved or not same or before.lost is not None:
        commands = (Redial(member),)
    elif event.anew and before.alive:  # the connection may work still
        commands = (SendPing(member), TryAnew(member))
        state = state.changed(member, heartbeat=before.heartbeat.ping(now))
    return state, commands


def _member(state: ClusterState, event: Found) -> int | None:
    """The member that the node is; None: a new one. Those that may be dialled go first."""
    order = sorted(range(len(state.members)), key=lambda i: state.members[i].barred)
    same = [i for i in order if event.incarnation in (None, state.members[i].incarnation)]
    alike = [i for i in order if _may_be(state.members[i], event)]
    there = [i for i in alike if (state.members[i].host, state.members[i].port) == (event.host, event.port)]
    if event.incarnation is None:
        return next(iter(there), None)
    known = [i for i in alike if state.members[i].incarnation is not None]
    gone = [i for i in known if state.members[i].lost is not None]
    return next(iter((*same, *there, *gone)), None)


def _crowds(state: ClusterState, event: Found) -> bool:
    """Whether a device has as many members as it may have."""
    if event.incarnation is None:
        return False
    known = (member.incarnation for member in state.members if member.lost is None)
    devices = [device_of(one) for one in known if one is not None]
    return devices.count(device_of(event.incarnation)) >= MOST_MEMBERS


def _may_be(member: Member, event: Found) -> bool:
    """Whether a node may be on the device of a member."""
    if event.incarnation is None or member.incarnation is None:
        return True
    return device_of(member.incarnation) == device_of(event.incarnation)
