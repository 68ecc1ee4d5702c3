"""What transformers makes of a configuration or of tensors that say a thing twice."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench.quality import all_logits
from tests.weights.checkpoints import EMBEDDING, HEAD, change_config, rewrite, tensors
from tests.weights.conftest import TINY
from tests.weights.rope_cases import CASES

from shoal.engine.config import parse_config
from shoal.engine.convert import convert
from shoal.engine.decoder import Decoder
from shoal.engine.model_directory import Model
from shoal.engine.stage import Stage, StageOptions

pytestmark = pytest.mark.oracle

TOKENS = [5, 99, 200, 3, 42]


@pytest.mark.parametrize("case", CASES)
def test_rotary_positions(case: str) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    values: dict[str, Any] = json.loads((TINY / "config.json").read_text())
    del values["rope_parameters"]
    values |= CASES[case][0]
    theirs = LlamaRotaryEmbedding(LlamaConfig(**json.loads(json.dumps(values)))).inv_freq.numpy()
    np.testing.assert_allclose(Decoder.of(parse_config(values, "x")).frequencies, theirs, rtol=1e-5)


def test_defaults() -> None:
    from transformers import LlamaConfig

    needed = {"hidden_size": 128, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 4}
    theirs = LlamaConfig(**needed, vocab_size=99)
    config = parse_config({**needed, "vocab_size": 99, "model_type": "llama"}, "x")
    ours = Decoder.of(config)
    assert ours.head_dim == theirs.head_dim
    assert ours.kv_heads == theirs.num_key_value_heads
    assert config.context == theirs.max_position_embeddings
    assert ours.norm_epsilon == theirs.rms_norm_eps
    assert ours.rotation.theta == theirs.rope_parameters["rope_theta"]
    assert ours.tied == theirs.tie_word_embeddings


@pytest.mark.parametrize("stored", ["head of its own", "equal head", "head alone", "embedding alone"])
def test_a_tied_table(stored: str, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    directory = Path(shutil.copytree(TINY, tmp_path / "m"))
    values = tensors(TINY)
    if stored == "equal head":
        values[HEAD] = values[EMBEDDING].copy()
    elif stored == "head alone":
        values[HEAD] = values.pop(EMBEDDING)
    elif stored == "embedding alone":
        del values[HEAD]
    rewrite(directory, values)
    change_config(directory, tie_word_embeddings=True)
    theirs: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = theirs(torch.tensor([TOKENS])).logits[0].numpy()
    convert(directory, tmp_path / "out", dtype="f32")
    model = Model.open(tmp_path / "out")
    with Stage(model, 0, model.n_units, StageOptions(backend="numpy", max_wanted=len(TOKENS))) as stage:
        assert np.abs(all_logits(stage, TOKENS) - expected).max() <= 1e-4
