"""A byte-level vocabulary that fits the tiny checkpoint, with tokens for turns and a template of them."""

from __future__ import annotations

from typing import Any

from shoal.engine.checkpoint.gguf_tokenizer import tokenizer_json

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
TURNS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def metadata(**values: Any) -> dict[str, Any]:
    """GGUF keys, under tokenizer.ggml, of a vocabulary: the special tokens (0 to 3) and the 256 bytes."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [*map(chr, kept), *(chr(256 + i) for i in range(256 - len(kept)))]
    tokens = [*SPECIAL, *letters]
    known = {"model": "gpt2", "pre": "smollm", "tokens": tokens, "token_type": [3] * 4 + [1] * 256}
    made = {**known, "merges": ["h e"], **values}
    made["tokens"] = [*made["tokens"], "he"]
    made["token_type"] = [*made["token_type"], 1]
    return {key: value for key, value in made.items() if value is not None}


def tokenizer_file() -> bytes:
    data = tokenizer_json({f"tokenizer.ggml.{key}": value for key, value in metadata().items()}, "x")
    assert data is not None
    return data
