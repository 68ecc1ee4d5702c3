"""The real model in each type that the gguf package quantises to, whole and in three parts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from bench.quality import all_logits, text_tokens
from tests.models import smollm2_dir, smollm2_gguf
from tests.weights.gguf_reference import Reference
from tests.weights.gguf_types import rewritten

from shoal.engine.convert import convert
from shoal.engine.generate import generate
from shoal.engine.model_directory import Model
from shoal.engine.stage import Stage, StageOptions
from shoal.engine.tokenizer import Tokenizer
from shoal.store import cache_directory

pytestmark = pytest.mark.oracle

POSITIONS = 32
# Ternary types are left out: nothing sensible is left of a model that was not trained for them.
KINDS = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"]


@pytest.fixture(scope="module")
def text() -> list[int]:
    return text_tokens(Tokenizer.open(smollm2_dir()), cache_directory() / "texts", POSITIONS)[:POSITIONS]


@pytest.mark.parametrize("kind", KINDS)
def test_the_real_model_in_each_type(tmp_path: Path, text: list[int], kind: str) -> None:
    whole = rewritten(smollm2_gguf(), tmp_path / "whole.gguf", kind=kind)
    parts = rewritten(whole[0], tmp_path / "parts.gguf", parts=3)
    assert len(parts) == 3
    expected = Reference(whole).logits(text)
    convert(whole[0], tmp_path / "f32", dtype="f32", origin="x")
    model = Model.open(tmp_path / "f32")
    with Stage(model, 0, model.n_units, StageOptions(backend="numpy", max_wanted=POSITIONS)) as stage:
        difference = np.abs(all_logits(stage, text) - expected).max()
        print(f"{kind}: largest difference of a logit over {POSITIONS} positions: {difference:.2e}")
        assert difference <= 1e-3
        assert next(generate(stage, text)) == expected[-1].argmax()
    convert(parts[1], tmp_path / "from-parts", dtype="f32", origin="x")
    assert Model.open(tmp_path / "from-parts").hash == model.hash
