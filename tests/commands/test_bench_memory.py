"""bench/memory.py: what a process holds at most, taken apart."""

from __future__ import annotations

from pathlib import Path

import pytest
from bench import memory

from shoal.engine.convert import convert
from shoal.engine.shards import Model

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"


@pytest.fixture
def tiny(tmp_path: Path) -> Model:
    convert(FIXTURES / "tiny-llama", tmp_path / "tiny")
    return Model.open(tmp_path / "tiny")


def test_what_is_neither_shards_nor_keys_is_the_rest(tiny: Model) -> None:
    shards = sum(path.stat().st_size for path in tiny.path.glob("*.safetensors"))
    ((process, *numbers),) = memory.parts(tiny, {"node": 100_000_000})
    peak, of_shards, state, rest, mib = map(float, numbers)
    assert (process, peak) == ("node", 100)
    assert of_shards == pytest.approx(shards / 1e6, abs=0.05)
    assert peak == pytest.approx(of_shards + state + rest, abs=0.2)
    assert mib == pytest.approx(rest / 1.048576, abs=0.1)


@pytest.mark.slow
def test_an_answer_that_fails_is_told(tiny: Model) -> None:
    with pytest.raises(RuntimeError, match=r"no tokenizer\.json"):
        memory.node_peak(tiny.path, 1)
