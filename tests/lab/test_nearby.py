"""A head whose address changes while it is down, found by mDNS: namespaces on a bridge, whole programs."""

from __future__ import annotations

import json

import pytest
from bench import house as bench_house
from bench.lab import ground

from shoal.engine.model_directory import Model

pytestmark = [pytest.mark.lab, pytest.mark.slow]


@pytest.mark.whole_lab
def test_a_node_finds_its_head_under_another_address_and_keeps_it(smollm2: Model) -> None:
    with bench_house.opened(smollm2.path) as house:
        house.devices = house.devices[:2]
        for device in house.devices:
            device.ram_mb *= 4  # two are enough
        (phone,) = house.phones
        house.up()
        house.join(phone, house.invite())
        assert house.answer() == house.alone()
        bench_house.moved(house)
        assert house.rows[-1][1] == "True"
        kept = json.loads((phone.directory / "config/shoal/head.json").read_text())
        where = ground.address(bench_house.ELSEWHERE)
        assert kept["addresses"] == [{"host": where, "port": bench_house.PORT}]
