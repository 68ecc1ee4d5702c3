"""`config.json` of a model: what the engine needs to know of every model, and checked access to the rest,
which each family reads for itself.

Source of the keys and defaults: the `*Config` classes of Hugging Face transformers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .errors import ModelFileError, UnsupportedModelError, Warn, ignore

_MAX_NUMBER = 1e30
_MAX_COUNT = 1 << 24  # no honest dimension or vocabulary is larger; products of two fit in 64 bits


@dataclass(frozen=True, slots=True)
class Config:
    """A configuration. `vocab` and `context` are in tokens."""

    family: str
    vocab: int
    context: int
    bos: int | None
    eos: tuple[int, ...]
    values: Mapping[str, Any] = field(repr=False)
    """All of config.json."""
    limit: str = field(default="", compare=False)
    """Why `context` is less than config.json says, in brackets; empty where it is not."""
    where: str = field(default="config.json", compare=False)
    """What errors and warnings call the file."""
    warn: Warn = field(default=ignore, compare=False, repr=False)
    """Called where two keys disagree."""

    def count(self, key: str, default: int | None = None) -> int:
        """A positive whole number. ModelFileError: the key is missing and has no default, or is none."""
        value = self.values.get(key)
        value = default if value is None else value
        if type(value) is not int or not 0 < value <= _MAX_COUNT:
            raise self.contradiction(f"{key} must be a count between 1 and {_MAX_COUNT}, not {value!r}")
        return value

    def number(
        self, key: str, default: float | None = None, *, within: Mapping[str, Any] | None = None
    ) -> float:
        """A positive number, of the configuration or of a dictionary in it. ModelFileError: it is none."""
        value = (self.values if within is None else within).get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= _MAX_NUMBER:
            raise self.contradiction(f"{key} must be a positive number, not {value!r}")
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        """True or false. ModelFileError: it is neither."""
        value = self.values.get(key)
        if value is not None and type(value) is not bool:
            raise self.contradiction(f"{key} must be true or false, not {value!r}")
        return default if value is None else value

    def within(self, window: int | None) -> Config:
        """This configuration where attention looks back `window` positions (None: all): as long as a context
        fits the window it changes nothing, and longer ones are not supported."""
        if window is None or window >= self.context:
            return self
        limit = f" (its attention window is {window} tokens, and longer contexts are not supported yet)"
        return replace(self, context=window, limit=limit)

    def contradiction(self, message: str) -> ModelFileError:
        """The error of a configuration that cannot be right."""
        return ModelFileError(f"{self.where}: {message}")

    def unsupported(self, message: str) -> UnsupportedModelError:
        """The error of a configuration that asks for what is not here."""
        return UnsupportedModelError(f"{self.where}: {message}")


def read_config(path: Path) -> Config:
    """Reads `config.json`. ModelFileError: unreadable or lying; UnsupportedModelError: a feature we don't
    have."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelFileError(f"{path} is missing: a model directory has a config.json") from None
    except (OSError, ValueError, RecursionError) as e:
        raise ModelFileError(f"{path} cannot be read as JSON: {e}") from e
    if not isinstance(values, dict):
        raise ModelFileError(f"{path} must hold a JSON object")
    return parse_config(values, str(path))


def parse_config(values: Mapping[str, Any], where: str, warn: Warn = ignore) -> Config:
    """The Config of a Hugging Face configuration; `where` names it in errors and in warnings, which `warn` is
    called with where two keys disagree."""
    family = values.get("model_type")
    if not isinstance(family, str):
        raise ModelFileError(f"{where}: model_type must name the family, not {family!r}")
    config = Config(family, 1, 1, None, (), values, where=where, warn=warn)
    return replace(
        config,
        vocab=config.count("vocab_size"),
        context=config.count("max_position_embeddings", 2048),
        bos=_token(values.get("bos_token_id"), "bos_token_id", where),
        eos=_tokens(values.get("eos_token_id"), where),
    )


def _token(value: object, key: str, where: str) -> int | None:
    if value is None or (type(value) is int and 0 <= value < _MAX_COUNT):
        return value
    raise ModelFileError(f"{where}: {key} must be a token id, not {value!r}")


def _tokens(value: object, where: str) -> tuple[int, ...]:
    listed = value if isinstance(value, list) else [value]
    tokens = (_token(item, "eos_token_id", where) for item in listed)
    return tuple(token for token in tokens if token is not None)
