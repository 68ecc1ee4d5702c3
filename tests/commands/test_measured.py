"""A device measures itself once with a model, and without its weights."""

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shoal import measured as kept
from shoal.engine.convert import convert
from shoal.engine.dummy_weights import DummyModel
from shoal.engine.measure import measure
from shoal.engine.memory import Arena
from shoal.engine.model_directory import Model, unit_file
from shoal.engine.stage import StageOptions

TINY = Path(__file__).resolve().parents[1] / "fixtures" / "tiny-llama"


@pytest.mark.parametrize("dtype", ["int8", "int4", "f32"])
def test_dummy_weights_are_like_those_of_the_files(tmp_path: Path, dtype: Any) -> None:
    convert(TINY, tmp_path / "whole", dtype=dtype)
    whole = Model.open(tmp_path / "whole")
    skeleton = tmp_path / "skeleton"
    skeleton.mkdir()
    for name in ("index.json", "config.json", "common.safetensors"):
        shutil.copy(whole.path / name, skeleton / name)
    dummy = DummyModel.open(skeleton)
    for u in range(whole.n_units):
        size = whole.index.files[unit_file(u)].size
        arena = Arena(size)
        weights = dummy.unit_weights(u, lambda name, arena=arena: dummy.open_file(name, arena))  # type: ignore[misc]
        assert arena.left == 0 or size % 64, "a dummy file has the size of the real one"
        for name, tensor in whole.unit_weights(u).items():
            mine = weights[name]
            assert (mine.rows, mine.cols, mine.type) == (tensor.rows, tensor.cols, tensor.type)
            for array, real in (
                (mine.data, tensor.data),
                (mine.scales, tensor.scales),
                (mine.mins, tensor.mins),
            ):
                assert (array is None) == (real is None)
                if array is not None and real is not None:
                    assert (array.dtype, array.shape) == (real.dtype, real.shape)
                    assert np.isfinite(array).all()
            assert mine.data.dtype != np.int8 or mine.data.min() > -128
    found = measure(Model.open(skeleton), StageOptions(), seconds=0.01)
    assert found.read_bytes_per_s > 0 and found.macs_per_s > 0


def test_a_measurement_is_used_again_in_the_same_conditions_alone(
    tiny_llama: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    rates = measure(tiny_llama, StageOptions(), seconds=0.01)
    calls: list[float] = []

    def counted(*_: Any, seconds: float, **__: Any) -> Any:
        calls.append(seconds)
        return rates

    monkeypatch.setattr(kept, "measure", counted)

    def measured(seconds: float = 0.5, room: int = 10**9, slow: float | None = 1.0, **options: Any) -> int:
        """The number of measurements so far."""
        stage = StageOptions("numpy", **options)
        found = kept.measured(tiny_llama, stage, seconds=seconds, room=room, slow=slow)
        assert found.rates == rates and found.resident > 0
        return len(calls)

    assert measured() == measured() == 1
    assert measured(threads=1) == 2
    assert measured(threads=1, room=1) == measured(threads=1, room=1) == 3
    assert measured(seconds=0.1) == 4, "a quick one counts for itself"
    (path, *_) = sorted((tmp_path / "shoal" / "measured").iterdir(), key=lambda p: p.stat().st_mtime_ns)
    path.write_text(path.read_text()[:-5])
    assert measured() == 5 and measured() == 5
    os.utime(path, (0, path.stat().st_mtime - kept.MOST_SECONDS))
    assert measured() == 6
    assert measured(slow=2.0) == measured(slow=2.0) == 7
    assert measured(slow=None) == 8 and measured(slow=None) == 9, "a changing speed is none to keep"
