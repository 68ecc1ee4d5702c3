"""Tokenizers made from GGUF metadata against those that transformers makes from the same file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tests.models import smollm2_dir, smollm2_gguf
from tests.weights.gguf_files import sentencepiece_vocabulary, write_tiny
from tests.weights.texts import texts

from shoal.engine.checkpoint import open_checkpoint
from shoal.engine.checkpoint.gguf_names import PRE_TOKENIZERS
from shoal.engine.tokenizer import Tokenizer

pytestmark = pytest.mark.oracle


def transformers_tokenizer(gguf: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)


def ours(gguf: Path) -> Tokenizer:
    data = open_checkpoint(gguf).tokenizer_json()
    assert data is not None
    return Tokenizer.parse(data, str(gguf))


def test_smollm2_on_a_thousand_texts() -> None:
    oracle, tokenizer = transformers_tokenizer(smollm2_gguf()), Tokenizer.open(smollm2_dir())
    for text in texts(1000):
        ids = oracle(text)["input_ids"]
        assert tokenizer.encode(text) == ids, repr(text)
        assert tokenizer.decode(ids) == oracle.decode(ids, skip_special_tokens=True), repr(text)
        assert tokenizer.decode(ids, skip_special=False) == oracle.decode(ids), repr(text)


@pytest.mark.parametrize("pre", sorted(PRE_TOKENIZERS))
def test_every_pre_tokenizer(pre: str, tmp_path: Path) -> None:
    """The words that a pattern cuts show in the ids, whichever vocabulary they are looked up in."""
    document = json.loads(open_checkpoint(smollm2_gguf()).tokenizer_json() or b"")
    vocabulary: Mapping[str, int] = document["model"]["vocab"]
    gguf = write_tiny(
        tmp_path / "x.gguf",
        tokenizer={
            "model": "gpt2",
            "pre": pre,
            "tokens": sorted(vocabulary, key=vocabulary.__getitem__),
            "token_type": [3] * 17 + [1] * (len(vocabulary) - 17),
            "merges": [" ".join(pair) for pair in document["model"]["merges"]],
        },
    )
    oracle, tokenizer = transformers_tokenizer(gguf), ours(gguf)
    for text in texts(300, seed=2):
        assert tokenizer.encode(text) == oracle(text)["input_ids"], repr(text)


@pytest.mark.parametrize("merges", [False, True])
def test_sentencepiece(tmp_path: Path, merges: bool) -> None:
    gguf = write_tiny(tmp_path / "x.gguf", tokenizer=sentencepiece_vocabulary(merges=merges))
    oracle, tokenizer = transformers_tokenizer(gguf), ours(gguf)
    for text in texts(300, seed=3):
        ids = oracle(text)["input_ids"]
        assert tokenizer.encode(text) == ids, repr(text)
        assert tokenizer.decode(ids) == oracle.decode(ids, skip_special_tokens=True), repr(text)
