"""Reads the chat template, special tokens and tokenizer of a Hugging Face directory.

The files, and their precedence if two disagree, are those of Hugging Face transformers
(`tokenization_utils_base.py`, `from_pretrained`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..errors import ModelFileError, UnsupportedModelError, Warn
from ..files import read_bytes, read_text

Json = Callable[[Path], dict[str, Any]]
"""A function that reads a JSON object from a file. ModelFileError: it contains something else."""

_TEMPLATE = "chat_template.jinja"
_MORE_TEMPLATES = "additional_chat_templates"
_PROCESSOR_TEMPLATE = "chat_template.json"
_SETTINGS = "tokenizer_config.json"
_MAP = "special_tokens_map.json"
_TOKENIZER = "tokenizer.json"
_OTHER_TOKENIZERS = ("*.model", "vocab.json", "vocab.txt", "tekken.json", "*.tiktoken")


def tokenizer_json(path: Path, warn: Warn) -> bytes | None:
    """The bytes of tokenizer.json; None, with a warning, if there is no tokenizer. UnsupportedModelError: the
    tokenizer is only in other files."""
    if (path / _TOKENIZER).exists():
        return read_bytes(path / _TOKENIZER)
    others = sorted(file.name for pattern in _OTHER_TOKENIZERS for file in path.glob(pattern))
    if others:
        raise UnsupportedModelError(
            f"{path} has its tokenizer in {' and '.join(others)} but not in {_TOKENIZER}, which is needed: "
            f'`python -c "from transformers import AutoTokenizer as T; T.from_pretrained({str(path)!r})'
            f'.save_pretrained({str(path)!r})"` writes it'
        )
    warn(f"{path} has no {_TOKENIZER}, so the model will accept token ids only, not text")
    return None


def chat_template(path: Path, read: Json, warn: Warn) -> str | None:
    """The template for a chat without tools: from its own file, else from the tokenizer's settings. Of
    several named templates it is the "default" one."""
    settings = read(path / _SETTINGS).get("chat_template") if (path / _SETTINGS).exists() else None
    named = {file.stem: read_text(file) for file in sorted((path / _MORE_TEMPLATES).glob("*.jinja"))}
    if (path / _TEMPLATE).exists():
        return read_text(path / _TEMPLATE)
    if not named and settings is None and (path / _PROCESSOR_TEMPLATE).exists():
        settings = read(path / _PROCESSOR_TEMPLATE).get("chat_template")
    if not named and isinstance(settings, str):
        return settings
    if not named and isinstance(settings, list):
        settings = {
            str(item.get("name")): item.get("template") for item in settings if isinstance(item, dict)
        }
    several = named or (settings if isinstance(settings, dict) else {})
    return default_template(several, str(path), warn)


def default_template(named: Mapping[str, object], where: str, warn: Warn) -> str | None:
    """The template named "default" among several; None, with a warning, if none is."""
    template = named.get("default")
    if isinstance(template, str):
        return template
    if named:
        warn(
            f"{where}: its chat templates are called {', '.join(sorted(named))} and none is the default, so "
            f"chats will be plain text; save the one to use as {_TEMPLATE} in the model's directory"
        )
    return None


def special_tokens(path: Path, read: Json) -> dict[str, str | None]:
    """Spellings of the special tokens that templates use by name, such as bos_token; None: the model has no
    such token."""
    values = read(path / _SETTINGS) if (path / _SETTINGS).exists() else {}
    if "added_tokens_decoder" not in values and (path / _MAP).exists():
        values = values | read(path / _MAP)
    tokens = {}
    for key, value in values.items():
        spelling = value.get("content") if isinstance(value, dict) else value
        if not key.endswith("_token") or isinstance(spelling, bool):  # add_bos_token is a boolean setting
            continue
        if not isinstance(spelling, str | None):
            raise ModelFileError(f"{path}: {key} is {value!r}, which is not the spelling of a token")
        tokens[key] = spelling
    return tokens
