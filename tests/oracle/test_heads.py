"""Rows of the final norm and logits of labels against transformers in float32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests import families
from tests.engine.test_heads import CLASSIFIERS, results, rows_of
from tests.families import LABELS, TOKENS
from tests.models import smollm2_dir, smollm2_gguf

from shoal.engine.batch import Want
from shoal.engine.convert import convert
from shoal.engine.model_directory import Model
from shoal.engine.stage import StageOptions
from shoal.engine.tokenizer import Tokenizer
from shoal.readings import class_by_head, text_to_classify

pytestmark = pytest.mark.oracle

OPTIONS = StageOptions(max_wanted=256)
TEXT = (
    "The ferry was late, so the passengers talked. An old engineer explained how the bridge had been built."
)


@pytest.mark.parametrize("name", families.CASES)
def test_last_hidden_states(name: str, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModel

    source = families.write_checkpoint(name, tmp_path / "source")
    convert(source, tmp_path / "model", dtype="f32")
    with torch.no_grad():
        base = AutoModel.from_pretrained(source, dtype=torch.float32).eval()
        theirs = base(torch.tensor([TOKENS])).last_hidden_state[0].numpy()
    ours = rows_of(Model.open(tmp_path / "model"), [2], TOKENS, [200, 7, 1], OPTIONS)
    assert np.abs(ours - theirs).max() <= 1e-4


@pytest.mark.parametrize("name", [*CLASSIFIERS, "mistral", "qwen2"])
def test_logits_of_labels(name: str, tmp_path: Path) -> None:
    """transformers loads what `shoal` reads, with all its tensors, and gives the logits of the last token."""
    import torch
    from transformers import AutoModelForSequenceClassification

    source = families.write_classifier(name, tmp_path / "source")
    convert(source, tmp_path / "model", dtype="f32")
    model = Model.open(tmp_path / "model")
    with torch.no_grad():
        loaded, told = AutoModelForSequenceClassification.from_pretrained(
            source, dtype=torch.float32, output_loading_info=True
        )
        assert not told["missing_keys"] and not told["unexpected_keys"]
        assert tuple(loaded.config.id2label[i] for i in range(len(LABELS))) == LABELS
        for length in (1, 40, 300):
            theirs = loaded.eval()(torch.tensor([TOKENS[:length]])).logits[0].numpy()
            *_, last = results(model, [], TOKENS[:length], [200, 7, 1], Want.LOGITS, OPTIONS)
            assert last.logits is not None
            assert np.abs(last.logits[-1] - theirs).max() <= 1e-4


def test_padding_at_the_end_is_passed_over(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification

    pad = 7
    source = families.write_classifier("qwen3", tmp_path / "source", pad_token_id=pad)
    convert(source, tmp_path / "model", dtype="f32")
    model = Model.open(tmp_path / "model")
    loaded = AutoModelForSequenceClassification.from_pretrained(source, dtype=torch.float32).eval()
    head = model.unit_weights(model.n_units - 1)["score.weight"].data
    for tokens in ([*TOKENS[:40], pad, pad], [pad, *TOKENS[:9], pad], [pad], TOKENS[:30]):
        with torch.no_grad():
            theirs = loaded(torch.tensor([tokens])).logits[0]
        read = text_to_classify(tokens, model.config.pad)
        found = class_by_head(results(model, [], read, [300], Want.ROWS, OPTIONS), model.config, head)
        for i, label in enumerate(LABELS):
            assert abs(found.scores[label] - float(theirs[i])) <= 1e-4
            assert abs(found.probabilities[label] - float(theirs.softmax(0)[i])) <= 1e-5


def test_hidden_states_of_the_real_model() -> None:
    import torch
    from transformers import AutoModel

    gguf = smollm2_gguf()
    model = Model.open(smollm2_dir("f32"))
    tokens = Tokenizer.open(model.path).encode(TEXT)
    with torch.no_grad():
        base = AutoModel.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32).eval()
        theirs = base(torch.tensor([tokens])).last_hidden_state[0].numpy()
    ours = rows_of(model, [], tokens, [len(tokens)], OPTIONS)
    print(f"largest difference: {np.abs(ours - theirs).max():.2e} of {np.abs(theirs).max():.1f}")
    assert np.abs(ours - theirs).max() <= 1e-3
