"""Logits against transformers, which loads the same GGUF: f32 nearly equal, int8 within stated bounds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench.quality import Comparison, all_logits, text_tokens, windows
from tests.models import smollm2_dir, smollm2_gguf

from shoal.engine.model_directory import Model
from shoal.engine.stage import Stage, StageOptions
from shoal.engine.tokenizer import Tokenizer
from shoal.store import cache_directory

pytestmark = pytest.mark.oracle

POSITIONS, WINDOW = 4096, 512


class Oracle:
    """transformers in float32."""

    def __init__(self, gguf: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self._torch = torch
        self._model: Any = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32
        ).eval()

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        with self._torch.no_grad():
            logits: np.ndarray = self._model(self._torch.tensor([list(tokens)])).logits[0].numpy()
        return logits


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle(smollm2_gguf())


@pytest.fixture(scope="module")
def text() -> list[int]:
    return text_tokens(Tokenizer.open(smollm2_dir()), cache_directory() / "texts", POSITIONS)


def test_numpy_f32_equals_transformers(oracle: Oracle, text: list[int]) -> None:
    model = Model.open(smollm2_dir("f32"))
    with Stage(model, 0, model.n_units, StageOptions(backend="numpy", max_wanted=64)) as stage:
        difference = np.abs(all_logits(stage, text[:64]) - oracle.logits(text[:64])).max()
    print(f"largest difference of a logit over 64 positions: {difference:.2e}")
    assert difference <= 1e-3


def test_native_int8_is_close_to_transformers(oracle: Oracle, text: list[int]) -> None:
    model, compared = Model.open(smollm2_dir("int8")), Comparison()
    with Stage(model, 0, model.n_units, StageOptions(backend="native", max_wanted=256)) as stage:
        for window in windows(text, POSITIONS, WINDOW):
            compared.add(window, oracle.logits(window), all_logits(stage, window))
    print(compared)
    assert len(compared.kl) >= 4096
    assert compared.mean_kl <= 0.005
    assert compared.top1 >= 0.95
    assert compared.perplexity_change <= 0.005
