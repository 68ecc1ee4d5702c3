"""A house whose ends stay home, as its owner types it: `shoal up --private`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.e2e.test_home import House, ram_mb

from shoal.processes import end

pytestmark = pytest.mark.slow


def test_a_private_house_has_both_ends_on_its_head(smollm2: Path, tmp_path: Path) -> None:
    """The laptop cannot hold all layers. Before the phone has joined, answers wait; then the phone gets
    layers and neither the embedding nor the LM head."""
    house = House(tmp_path, smollm2)
    house.ram = ("--ram", str(ram_mb(smollm2) + 30))
    try:
        code, alone, _ = house.phone.does("run", str(smollm2), "Hello", "-n", "6", "--threads", "1")
        assert code == 0
        laptop = house.up(str(smollm2), "--private")
        laptop.says("own node:", "as end of laptop: the LM head")
        laptop.says("waiting for devices: No plan: both ends of the model are to stay home (--private)")
        house.joins(house.phone)
        laptop.says("both ends stay home, on laptop")
        code, out, err = house.laptop.does("run", str(smollm2), "Hello", "-n", "6")
        assert (code, out) == (0, alone), err
        status = json.loads(house.laptop.does("top", "--json")[1])
        chain = [device for device in status["devices"] if device["units"] is not None]
        assert [device["name"] for device in chain] == ["laptop", "phone", "end of laptop"]
        assert [chain[0]["units"][0], chain[2]["units"]] == [0, [status["units"] - 1, status["units"]]]
        assert status["plan"]["ends"].startswith("both ends stay home, on laptop")
        assert "so that it needs layers" in house.laptop.does("up", "--private", "--no-layers")[2]
    finally:
        end([program.process for program in house.running.values()])
