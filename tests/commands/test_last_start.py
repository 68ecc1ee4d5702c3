"""What a head keeps for its next start."""

from pathlib import Path

import pytest

from shoal import house, last_start
from shoal.net.known import HEAD
from shoal.planner import LinkSpeed

MODEL, OTHER = "ab" * 32, "cd" * 32
LINKS = {(HEAD, 7): LinkSpeed(0.001, 1e7, 0.002), (7, HEAD): LinkSpeed(0.001, 2e7), (7, 9): LinkSpeed(0, 1e9)}


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    house.directory().mkdir()
    return house.directory() / last_start.LAST


def test_links_are_known_with_every_model_and_devices_with_theirs() -> None:
    assert last_start.recalled(MODEL) == (frozenset(), {})
    last_start.keep(MODEL, {9, 7}, LINKS)
    assert last_start.recalled(MODEL) == ({7, 9}, LINKS)
    assert last_start.recalled(OTHER) == (frozenset(), LINKS)


@pytest.mark.parametrize(
    "damage", [("{", ""), ('"version":1', '"version":2'), ("10000000.0", "-1"), ("}]}", "}]")]
)
def test_a_damaged_file_counts_as_none(place: Path, damage: tuple[str, str]) -> None:
    last_start.keep(MODEL, {7}, LINKS)
    whole = place.read_text()
    assert whole.replace(*damage) != whole
    place.write_text(whole.replace(*damage))
    assert last_start.recalled(MODEL) == (frozenset(), {})
