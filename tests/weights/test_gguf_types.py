"""A model in each type of GGUF, whole and in three parts: its f32 directory computes what the file says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from bench.quality import all_logits
from tests.weights.conftest import TINY
from tests.weights.gguf_files import write_tiny
from tests.weights.gguf_reference import Reference
from tests.weights.gguf_types import SCALES, WRITTEN, rewritten, write_random

from shoal.engine.checkpoint import open_checkpoint
from shoal.engine.convert import convert
from shoal.engine.generate import generate
from shoal.engine.model_directory import Model
from shoal.engine.stage import Stage, StageOptions

TOKENS = [3, 60, 17, 0, 42, 9, 33]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*WRITTEN, *SCALES])
def test_a_model_in_each_type(tmp_path: Path, kind: str) -> None:
    path = write_random(tmp_path / "x.gguf", kind)
    expected = Reference([path]).logits(TOKENS)
    assert expected.std() > 0.1  # or the comparison would say nothing
    convert(path, tmp_path / "model", dtype="f32")
    model = Model.open(tmp_path / "model")
    with Stage(model, 0, model.n_units, StageOptions(backend="numpy", max_wanted=len(TOKENS))) as stage:
        assert np.abs(all_logits(stage, TOKENS) - expected).max() <= 1e-4
        assert next(generate(stage, TOKENS)) == expected[-1].argmax()
    parts = rewritten(path, tmp_path / "y.gguf", parts=3)
    assert len(parts) == 3
    np.testing.assert_allclose(Reference(parts).logits(TOKENS), expected)
    whole, together = open_checkpoint(path), open_checkpoint(parts[2])
    assert together.config == whole.config
    assert set(together.names) == set(whole.names)
    for name in whole.names:
        np.testing.assert_array_equal(together.tensor(name), whole.tensor(name))


def test_f64_is_rounded_to_f32(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "x.gguf", dtype=np.float64)
    original, doubles = open_checkpoint(TINY), open_checkpoint(path)
    for name in original.names:
        np.testing.assert_array_equal(doubles.tensor(name), original.tensor(name))
