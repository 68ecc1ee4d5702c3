"""bench.lap --lab: nodes in namespaces of their own answer as one process does, and nothing is left."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bench import chain, lap
from bench.lab import ground

from shoal.engine.model_directory import Model

pytestmark = [pytest.mark.lab, pytest.mark.slow]


@pytest.mark.whole_lab
def test_laps_are_measured_on_the_bridge(
    smollm2: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chain, "_MEASURE_SECONDS", 0.1)
    monkeypatch.setattr(lap, "_REST_SECONDS", 0.2)
    output = tmp_path / "out.json"
    arguments = [str(smollm2.path), "--lab", "--rounds", "1", "--tokens", "32", "-o", str(output)]
    assert lap.main(arguments) == 0
    samples = {s["figure"]: s["value"] for s in json.loads(output.read_text())["samples"]}
    assert 0 < samples["beside computing, ms, p50"] < samples["beside computing, ms, p95"]
    assert ground.LOCK.read_text(encoding="ascii") == ""


def test_a_machine_without_namespaces_is_told(smollm2: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ground, "lacks_namespaces", lambda: "everything")
    with pytest.raises(SystemExit, match="this machine lacks everything"):
        lap.main([str(smollm2.path), "--lab", "--rounds", "1"])
