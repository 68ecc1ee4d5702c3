"""Every family against transformers in float32: the checkpoints of tests/families.py, from safetensors and
from GGUF, in a batch and token by token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests import families
from tests.families import CASES, IN_GGUF, TOKENS

from shoal.engine.batch import Run, Sampling, Want
from shoal.engine.convert import convert
from shoal.engine.generate import generate
from shoal.engine.model_directory import Model
from shoal.engine.stage import Stage, StageOptions

pytestmark = pytest.mark.oracle


def theirs(source: Path, **names: Any) -> tuple[np.ndarray, list[int]]:
    """Logits of the text, and what greedily follows its first 40 tokens."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **names).eval()
    text = torch.tensor([TOKENS[:40]])
    with torch.no_grad():
        logits: np.ndarray = model(torch.tensor([TOKENS])).logits[0].numpy()
        made = model.generate(
            text, attention_mask=torch.ones_like(text), max_new_tokens=64, do_sample=False, eos_token_id=None
        )
    return logits, made[0, 40:].tolist()


def ours(model: Model, backend: str) -> tuple[np.ndarray, list[int]]:
    with Stage(model, 0, model.n_units, StageOptions(backend=backend, max_wanted=256)) as stage:
        stage.open_sequence(0, Sampling(), len(TOKENS))
        parts = []
        for first, last in ((0, 200), (200, 299), (299, 300)):
            (result,) = stage.run([Run(0, first, TOKENS[first:last], Want.LOGITS)])
            parts.append(result.logits)
        stage.close_sequence(0)
        return np.concatenate(parts), list(generate(stage, TOKENS[:40], max_tokens=64, end=()))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", ["native", "numpy"])
def test_safetensors(name: str, backend: str, tmp_path: Path) -> None:
    source = families.write_checkpoint(name, tmp_path / "source")
    convert(source, tmp_path / "model", dtype="f32")
    (logits, tokens), (expected, continued) = ours(Model.open(tmp_path / "model"), backend), theirs(source)
    assert np.abs(logits - expected).max() <= 1e-4
    assert tokens == continued


@pytest.mark.parametrize("name", IN_GGUF)
def test_gguf(name: str, tmp_path: Path) -> None:
    """transformers reads the same file, with a reader of its own."""
    source = families.write_gguf(name, tmp_path / f"{name}.gguf")
    convert(source, tmp_path / "model", dtype="f32")
    names: dict[str, Any] = {"gguf_file": source.name}
    if name == "qwen3":  # of which transformers does not read attention.key_length
        from transformers import AutoConfig

        names["config"] = AutoConfig.for_model(**families.config(name))
    expected, continued = theirs(tmp_path, **names)
    logits, tokens = ours(Model.open(tmp_path / "model"), "native")
    assert np.abs(logits - expected).max() <= 1e-4
    assert tokens == continued
