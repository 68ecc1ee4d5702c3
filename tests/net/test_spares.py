"""Copies of weights that nodes hold beside those of their stages: which, when, and who is told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import pytest
import trio
from tests.net.hand import Hand, with_nodes
from tests.net.test_moving import moved, until, with_chain

from shoal.net.coordinator import Coordinator
from shoal.net.copies import Copies
from shoal.net.errors import RemoteProtocolError
from shoal.net.messages import Spare
from shoal.net.placement import Links, NodeInfo, Outcome, Placement, Proposal, Usage


def load(
    copies: Copies, own: range = range(0), room: int = 99, held: frozenset[int] = frozenset()
) -> frozenset[int]:
    """What a stage holds once nothing is to be done."""
    while (units := copies.next(held, own)) is not None:
        held = frozenset(units[:room])
        copies.held(units, held)
    return held


def test_copies_are_loaded_one_after_another_in_their_order() -> None:
    copies = Copies()
    assert copies.next(frozenset(), range(2, 4)) is None
    copies.order([4, 1, 3, 4, 5])  # a unit of the stage, and one twice
    assert copies.next(frozenset(), range(2, 4)) == (4,)
    copies.held((4,), frozenset({4}))
    assert copies.next(frozenset({4}), range(2, 4)) == (4, 1)
    assert load(copies, range(2, 4), held=frozenset({4})) == {4, 1, 5}
    copies.order([5, 0])
    assert load(copies, range(2, 4), held=frozenset({4, 1, 5})) == {0, 5}


def test_what_has_no_room_is_not_tried_again_before_the_next_order() -> None:
    copies = Copies()
    copies.order([1, 2, 3, 4])
    assert load(copies, room=2) == {1, 2}
    assert copies.next(frozenset({1, 2}), range(0)) is None
    copies.order([1, 2, 3, 4])
    assert copies.next(frozenset({1, 2}), range(0)) == (1, 2, 3)


def test_what_keys_and_values_have_displaced_is_not_loaded_again() -> None:
    copies = Copies()
    copies.order([1, 2, 3])
    held = load(copies)
    assert held == {1, 2, 3}
    assert copies.next(frozenset({1}), range(0)) is None
    copies.order([1, 2, 3])
    assert copies.next(frozenset({1}), range(0)) == (1, 2)


def test_another_stage_holds_none_and_units_that_become_its_own_are_dropped() -> None:
    copies = Copies()
    copies.order([1, 2, 3])
    held = load(copies)
    assert copies.next(held, range(2, 5)) == (1,)
    copies.held((1,), frozenset({1}))
    assert copies.next(frozenset({1}), range(2, 5)) is None
    assert load(copies, held=frozenset({1})) == {1, 2, 3}  # the stage has given them away again
    copies.renew()
    assert load(copies) == {1, 2, 3}


def test_news_are_told_once() -> None:
    copies = Copies()
    assert copies.news(frozenset()) is None
    assert copies.news(frozenset({3, 1})) == (1, 3)
    assert copies.news(frozenset({3, 1})) is None
    assert copies.news(frozenset()) == ()


class Wants:
    """A rebalancer that only wants copies."""

    def __init__(self, **units: tuple[int, ...]) -> None:
        self.units = units
        self.usages: list[Usage] = []

    def look(
        self, nodes: Sequence[NodeInfo], links: Links, placement: Placement, usage: Usage, now: float
    ) -> Proposal | None:
        self.usages.append(usage)
        return None

    def happened(self, outcome: Outcome) -> None:
        raise AssertionError("nothing was proposed")

    def copies(
        self, nodes: Sequence[NodeInfo], links: Links, placement: Placement
    ) -> Mapping[str, tuple[int, ...]]:
        return self.units

    def held(self, name: str) -> frozenset[int]:
        """What the coordinator has heard of a node."""
        return self.usages[-1].copies.get(name, frozenset()) if self.usages else frozenset()


def test_nodes_load_copies_and_tell(lab: ModuleType) -> None:
    wants = Wants(a=(2, 3, 1), c=(3,))

    async def test(net: Any, coordinator: Coordinator) -> None:
        await until(lambda: wants.held("a") == {2, 3} and wants.held("c") == {3})
        (a,), (c,) = net.nodes[7001].stages, net.nodes[7003].stages
        assert (a.held, c.held) == ({2, 3}, {3})
        a.copies = 1
        a.hold((2, 3))  # keys and values have displaced one
        await until(lambda: wants.held("a") == {2})
        await trio.sleep(5)
        assert a.held == {2}
        move = await moved(coordinator, "a3 b4 c6")
        assert not move.aborted
        await until(lambda: wants.held("a") == frozenset())
        got = await lab.collect(coordinator, [5, 6, 7], 20)
        assert got == lab.oracle([5, 6, 7], 20)

    with_chain(lab, test, rebalancer=wants)


def test_copies_wait_for_a_stage_that_computes(lab: ModuleType) -> None:
    """A node whose stage is always busy loads nothing."""
    wants = Wants(a=(3,))

    async def test(net: Any, coordinator: Coordinator) -> None:
        (a,) = net.nodes[7001].stages
        async with trio.open_nursery() as tasks:
            for number in range(3):
                tasks.start_soon(lab.collect, coordinator, [number, 6, 7], 50)
            await trio.sleep(0.2)
            assert a.held == frozenset()
        await until(lambda: a.held == {3})

    with_chain(lab, test, rebalancer=wants)


@pytest.mark.parametrize("units", [(6,), (2, 600)])
def test_units_that_the_model_has_not_are_refused(lab: ModuleType, units: tuple[int, ...]) -> None:
    async def test(hand: Hand) -> None:
        await hand.controls[7001].send(Spare(units))
        with pytest.raises(RemoteProtocolError, match="copies of units that the model"):
            await hand.controls[7001].receive()

    with_nodes(lab, test, "a")
