"""Nodes that come and go, where the coordinator is to stay: as literal decisions, and with a fake stage."""

from types import ModuleType
from typing import Any

import pytest
import trio
from tests.net.clusters import (
    GONE,
    JOINS,
    THREE,
    after,
    arrived,
    chain,
    epoch,
    fresh,
    hello,
    kinds,
    said,
    serving,
)

from shoal.engine.errors import NoPlanError
from shoal.net.arrivals import MOST_MEMBERS
from shoal.net.errors import NetError, NodeLostError, UntrustedError
from shoal.net.events import (
    Dial,
    FilesHeld,
    Found,
    HangUp,
    Joined,
    Left,
    LinksMeasured,
    MakePlan,
    MeasureLinks,
    Pause,
    Planned,
    Redial,
    Removed,
    SendPing,
    StageBroken,
    StageLoaded,
    Tick,
    TryAnew,
)
from shoal.net.known import HEAD, KnownLinks, estimate
from shoal.net.members import ITSELF, SILENT_SECONDS, ClusterState
from shoal.net.messages import Held
from shoal.net.placement import COORDINATOR, plan_at
from shoal.net.plans import SETTLED_SECONDS
from shoal.planner import LinkSpeed

SHORT = NoPlanError("the devices lack 12 MB")


def staying(*names: str) -> ClusterState:
    return fresh(names, open_ended=True)


def test_it_begins_without_nodes_and_waits_for_as_long_as_it_takes() -> None:
    state, commands = after(staying(), Tick(), Tick(), now=1e6)
    assert (state.phase, commands) == ("gathering", [])
    state, commands = after(state, Found("host", 7001))
    assert commands == [Dial(0)]
    assert after(state, Found("host", 7001)) == (state, [])
    refused = NodeLostError("host:7001 cannot be reached")
    assert said(state, Left(0, refused)) == [str(refused)]
    state, _ = after(state, Left(0, refused), Tick(), now=1e6)
    assert state.phase == "gathering"
    state, commands = after(state, JOINS[0], LinksMeasured())
    assert commands == [MakePlan(1, (0,))]
    assert said(state, Planned(1, SHORT)) == ["waiting for devices: the devices lack 12 MB"]
    state, _ = after(state, Planned(1, SHORT), Tick(), now=1e6)
    assert state.phase == "waiting"
    state, commands = after(state, Found("host", 7002), JOINS[1], LinksMeasured())
    assert commands == [MakePlan(2, (0, 1))]
    assert said(state, Planned(2, SHORT)) == []  # once is enough


def test_the_loss_of_all_nodes_is_waited_for_and_what_cannot_be_used_is_left_out() -> None:
    state, _ = after(serving(open_ended=True), *(Left(i, GONE) for i in range(3)))
    assert after(state, Tick(), now=1e6)[0].phase == "waiting"
    state, commands = after(staying("a", "b"), JOINS[0], Joined(1, hello("b", 101, exact=False)))
    assert commands[0] == HangUp(1)
    assert (state.phase, state.alive()) == ("measuring", (0,))


SAME = 7 << 32


def seen(state: ClusterState, host: str, incarnation: int, **how: Any) -> Any:
    return after(state, Found(host, 7001, SAME + incarnation, **how))


def test_a_device_has_a_bounded_number_of_members() -> None:
    state = staying()
    for number in range(3 * MOST_MEMBERS):
        state, commands = seen(state, f"host{number}", number)
        assert bool(commands) == (number < MOST_MEMBERS)
    assert len(state.members) == MOST_MEMBERS
    assert after(state, Found("other", 7001, 8 << 32))[1] == [Dial(MOST_MEMBERS)]
    state, _ = after(state, Left(2, GONE))
    state, commands = seen(state, "again", 99)
    assert (commands, len(state.members)) == ([Redial(2)], MOST_MEMBERS)


def test_a_process_is_the_same_member_wherever_it_is() -> None:
    state, commands = seen(staying(), "host", 1)
    assert (commands, len(state.members)) == ([Dial(0)], 1)
    assert seen(state, "host", 1) == (state, [])
    state, _ = after(state, Joined(0, hello("a", SAME + 1)))
    assert seen(state, "host", 1) == (state, [])
    assert seen(state, "host", 1, anew=True)[1] == [SendPing(0), TryAnew(0)]
    moved, commands = seen(state, "elsewhere", 1)
    assert (commands, moved.members[0].host, len(moved.members)) == ([Redial(0)], "elsewhere", 1)
    other, commands = seen(state, "elsewhere", 2)  # a second node of that device
    assert (commands, len(other.members)) == ([Dial(1)], 2)
    for host in ("host", "elsewhere"):  # the device's node was started again
        again, commands = seen(after(state, Left(0, GONE))[0], host, 2)
        assert (commands, again.members[0].host, len(again.members)) == ([Redial(0)], host, 1)
    assert seen(after(state, Left(0, GONE))[0], "host", 1)[1] == [Redial(0)]
    for host in ("host", "elsewhere"):  # another device, which may have its address now
        other, commands = after(after(state, Left(0, GONE))[0], Found(host, 7001, (8 << 32) + 2))
        assert (commands, other.members[0].barred) == ([Dial(1)], host == "host")
        assert seen(other, "far", 3)[1] == [Dial(0) if host == "host" else Redial(0)]


def test_a_removed_node_is_not_used_until_it_is_added_again() -> None:
    state = serving(open_ended=True)
    removed = Removed(1, UntrustedError("b was revoked"))
    state, commands = after(state, removed)
    assert commands[:2] == [HangUp(1), Pause(state.epoch)]
    assert not state.members[1].may_return
    assert after(state, removed)[1] == []
    state, commands = after(state, Found("host", 7002))
    assert commands == [Dial(1)]
    assert after(state, Joined(1, hello("b", 101)))[0].alive() == (0, 1, 2)


def test_a_process_that_failed_is_not_dialled_when_it_tells_of_itself() -> None:
    state, _ = seen(staying(), "host", 1)
    state, _ = after(state, Joined(0, hello("a", SAME + 1)), Left(0, SHORT, greeted=True))
    moved, commands = seen(state, "elsewhere", 1)
    assert (commands, moved.members[0].host, moved.members[0].at_fault) == ([], "elsewhere", True)
    again, commands = seen(moved, "elsewhere", 2)
    assert (commands, again.members[0].at_fault) == ([Redial(0)], False)


def test_a_node_that_moves_in_mid_answer_begins_another_epoch_of_the_same_chain() -> None:
    state = serving(open_ended=True)
    state, commands = after(state, Found("elsewhere", 7009, 101))
    assert commands == [Redial(1)]
    state, _ = after(state, Joined(1, hello("b", 101)))
    state, _ = arrived(state)
    assert (state.phase, state.placement) == ("serving", THREE)


@pytest.mark.parametrize("moves", ["move", "reload"])
def test_answers_wait_for_the_first_nodes_and_go_on_with_later_ones(lab: ModuleType, moves: Any) -> None:
    def plan(nodes: Any, links: Any) -> Any:
        if len(nodes) < 2:
            raise SHORT
        return plan_at((0, 3, 6))(nodes, links)

    async def main() -> None:
        log: list[str] = []
        async with lab.network() as net:
            addresses = [net.add(name) for name in "abc"]
            how = {"open_ended": True, "moves": moves, "log": log.append}
            async with net.coordinator(9999, plan=plan, **how) as coordinator, trio.open_nursery() as tasks:

                async def one() -> None:
                    async with coordinator.generate([1, 2], max_tokens=40) as tokens:
                        got = []
                        async for token in tokens:
                            got.append(token)
                            if len(got) == 7:
                                coordinator.remove(*addresses[0])
                                coordinator.add(*addresses[2])
                            if len(got) == 20:
                                await net.kill(7002)
                                net.restart(7002)
                                coordinator.add(*addresses[1])
                        assert got == lab.oracle([1, 2], 40)

                tasks.start_soon(one)
                await trio.sleep(1000)
                assert coordinator.current is None
                for address in addresses[:2]:
                    coordinator.add(*address)
                await coordinator.chain()
            assert [node.label for node in coordinator.nodes] == ["b", "c"]
        assert "waiting for devices: the devices lack 12 MB" in log
        assert f"{NetError('a (host:7001) was removed')}" in log

    lab.run(main)


# --- what is known from the last start


def joins(device: int, *known: int) -> Joined:
    """A node of the device 1 or 2 joins as the member before that number."""
    return Joined(device - 1, hello("ab"[device - 1], device << 32 | 5), frozenset(known))


def test_the_first_plan_waits_for_the_devices_of_the_last_one_but_not_for_long() -> None:
    state, commands = after(fresh(("a", "b"), open_ended=True, expected=frozenset({1, 2})), joins(1), Tick())
    assert (state.phase, commands) == ("gathering", [])
    assert kinds(after(state, joins(2))[1]) == ["MeasureLinks"]
    state, _ = after(state, Left(1, GONE), Tick(), now=2.9)
    assert state.phase == "gathering"
    assert "MeasureLinks" in kinds(after(state, Tick(), now=3.1)[1])


def test_links_from_before_are_planned_with_and_measured_once_nothing_is_computed() -> None:
    state, commands = after(staying("a", "b"), joins(1, ITSELF), joins(2, ITSELF, 0))
    assert commands == [MakePlan(1, (0, 1))]
    state, _ = after(state, Planned(1, chain(("a", 0, 3), ("b", 3, 6))))
    state, _ = after(state, *(StageLoaded(i, epoch(1)) for i in (0, 1)), now=1.0)
    assert state.phase == "serving"
    later = 1.0 + SETTLED_SECONDS
    assert "MeasureLinks" not in kinds(after(state, Tick(), now=later - 0.1)[1])
    assert "MeasureLinks" not in kinds(after(state, Tick(busy=True), now=later)[1])
    state, commands = after(state, Tick(), now=later)
    assert commands[-1] == MeasureLinks(((ITSELF, 0), (ITSELF, 1), (0, 1)), again=True)
    state, commands = after(state, LinksMeasured(), Tick(), now=later + 1)
    assert state.phase == "serving" and "MeasureLinks" not in kinds(commands), "once is enough"


def test_a_node_that_joins_is_planned_with_after_one_measurement() -> None:
    state, _ = after(staying("a"), JOINS[0], LinksMeasured(), Planned(1, SHORT))
    state, commands = after(state, Found("host", 7002), JOINS[1])
    assert commands == [MeasureLinks(((ITSELF, 1),))]
    state, commands = after(state, LinksMeasured())
    assert commands == [MakePlan(2, (0, 1))]
    own = {
        (COORDINATOR, "a"): LinkSpeed(0.001, 5e6, 0.004),
        (COORDINATOR, "b"): LinkSpeed(0.002, 2e7, 0.003),
    }
    links = dict(own)
    estimate(state, links)
    between = LinkSpeed(0.003, 5e6, 0.007)
    assert links == own | {("a", "b"): between, ("b", "a"): between}


def estimated() -> ClusterState:
    """A chain over a and b, whose link was estimated, is served since time 0."""
    state, _ = after(staying("a", "b"), *JOINS[:2], LinksMeasured())
    state, _ = after(state, Planned(1, chain(("a", 0, 3), ("b", 3, 6))))
    state, _ = after(state, *(StageLoaded(i, epoch(1)) for i in (0, 1)))
    assert state.phase == "serving" and state.estimated
    return state


def test_an_estimated_link_is_measured_once_nothing_is_computed_or_fetched_and_planned_with() -> None:
    state, later, fetches = estimated(), SETTLED_SECONDS, Held(tuple(range(6)), 100, 50, "")
    busy, _ = after(state, FilesHeld(0, fetches), now=later - 1)
    assert "MeasureLinks" not in kinds(after(busy, Tick(), now=later)[1])
    assert "MeasureLinks" in kinds(after(busy, Tick(), now=later + SILENT_SECONDS)[1])
    state, commands = after(state, Tick(), now=later)
    assert commands[-1] == MeasureLinks(((0, 1),), again=True)
    assert "MakePlan" not in kinds(after(state, Tick(), now=later + 1)[1])
    state, _ = after(state, LinksMeasured(), now=later + 1)
    state, commands = after(state, Tick(), now=later + 1)
    assert kinds(commands)[-1] == "MakePlan" and state.trial
    assert not {"MeasureLinks", "MakePlan"} & {*kinds(after(state, Tick(), now=later + 2)[1])}


def test_an_estimated_link_that_has_failed_is_measured() -> None:
    state, _ = after(estimated(), StageBroken(0, epoch(1), GONE, 101), JOINS[1])
    links = {(COORDINATOR, label): LinkSpeed(0.001, 5e6) for label in "ab"}
    assert state.measuring == {(100, 101)}
    estimate(state, links)
    assert len(links) == 2, "a plan that is made meanwhile does not use it"


def test_links_of_devices_that_have_left_the_house_are_forgotten() -> None:
    links = dict.fromkeys(((HEAD, 1), (1, HEAD), (HEAD, 2), (2, HEAD), (1, 2), (2, 1)), LinkSpeed(0.001, 1e7))
    known = KnownLinks(links)
    known.keep({1, 3})
    assert known.links.keys() == {(HEAD, 1), (1, HEAD)}


def test_a_start_with_known_links_waits_for_no_measurement_and_corrects_them(lab: ModuleType) -> None:
    async def main() -> None:
        known, wrong = KnownLinks({}), LinkSpeed(0.25, 1e6)
        plans: list[tuple[list[str], Any]] = []

        def plan(nodes: Any, links: Any) -> Any:
            plans.append(([node.label for node in nodes], dict(links)))
            return plan_at((0, 3, 6))(nodes, links)

        async with lab.network() as net:
            addresses = [
                net.add(name, identity=lab.identity(name, number << 32 | 5))
                for number, name in enumerate("ab", 1)
            ]

            async def start(**options: Any) -> float:
                """How long a head needs to serve, until the links are measured."""
                begun, how = trio.current_time(), {"open_ended": True, "known_links": known}
                async with net.coordinator(9999, plan=plan, measure_links=True, **how, **options) as head:
                    for address in addresses:
                        head.add(*address)
                        await trio.sleep(0.1)
                    await head.chain()
                    took = trio.current_time() - begun
                    assert head.devices == {1, 2}
                    await trio.sleep(60)
                    assert wrong not in head.links.values()
                    return took

            measured = await start(expected=frozenset({1, 2}))
            assert {a for ends in known.links for a in ends} == {HEAD, 1, 2} and len(known.links) == 6
            known = KnownLinks(dict.fromkeys(known.links, wrong))
            plans.clear()
            assert await start(expected=frozenset({1, 2})) < measured
            names, links = plans[0]
            assert names == ["a", "b"] and set(links.values()) == {wrong} and len(links) == 6
            assert wrong not in known.links.values(), "what was measured is kept for the next start"

    lab.run(main)
