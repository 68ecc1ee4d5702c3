"""Which copies of weights devices should hold."""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

import pytest
from tests.planner.test_moves import LINKS, MODEL, STAGES, question

from shoal.net.pace import slowed
from shoal.planner import Assignment, Cluster, Device, cost
from shoal.planner.copies import copies


def roomy(
    files: Mapping[str, frozenset[int]] = MappingProxyType({}), **free: int
) -> dict[str, tuple[int, ...]]:
    """Copies on devices that have so many bytes more than their stages need."""
    asked = question(6)
    devices = []
    for stage in STAGES:
        device = asked.cluster.device(stage.device)
        need = cost.range_ram_bytes(MODEL, device, asked.workload, stage.first, stage.last)
        devices.append(replace(device, ram_bytes=need + free.get(stage.device, 0)))
    return copies(replace(asked, cluster=Cluster(tuple(devices), LINKS, "h")), STAGES, slowed, files)


def test_units_whose_files_are_there_go_first() -> None:
    """So a device that has some fetches no others for the same room."""
    free = {"a": 2_000_000, "c": 3_000_000}
    assert roomy({"c": frozenset({5, 7, 8})}, **free) == {"a": (4, 5), "b": (), "c": (5, 6, 4)}
    assert roomy({"a": frozenset({0, 5, 6}), "c": frozenset()}, **free)["a"] == (5, 6)


def test_without_room_there_are_none() -> None:
    assert roomy() == {"a": (), "b": (), "c": ()}
    assert roomy(a=999_999) == {"a": (), "b": (), "c": ()}


def test_the_nearest_layers_come_first_within_the_cap() -> None:
    found = roomy(a=2_000_000, b=1_500_000, c=3_000_000)
    assert found["a"] == (4, 5)
    assert found["b"] in {(3,), (7,)}
    assert found["c"] == (6, 5, 4)


@pytest.mark.parametrize("free", [0, 1_000_000, 3_000_000, 5_000_000, 50_000_000])
def test_copies_fit_and_are_of_other_units(free: int) -> None:
    for stage in STAGES:
        held = roomy(a=free, b=free, c=free)[stage.device]
        assert sum(MODEL.units[u].bytes for u in held) <= free
        assert len(set(held)) == len(held)
        assert not set(held) & set(range(stage.first, stage.last))


def test_what_a_slow_or_lost_device_would_give_away_is_there() -> None:
    """With room, each change that a device's slowness makes best finds its weights."""
    asked = question(6)
    devices = tuple(replace(d, ram_bytes=40_000_000) for d in asked.cluster.devices)
    asked = replace(asked, cluster=Cluster(devices, LINKS, "h"))
    found = copies(asked, STAGES, slowed)
    assert set(found["a"]) >= {4, 5, 6}
    assert set(found["c"]) >= {4, 5, 6}
    assert set(found["b"]) == {*range(4), *range(7, 11)}


def test_one_device_alone_has_no_copies() -> None:
    asked = question()
    alone = Cluster((Device("a", 90_000_000, 1e9, 1e9),), LINKS_OF_ONE, "h")
    assert copies(replace(asked, cluster=alone), [Assignment("a", 0, 11)], slowed) == {"a": ()}


LINKS_OF_ONE = {ends: link for ends, link in LINKS.items() if set(ends) == {"a", "h"}}
