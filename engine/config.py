"""`config.json` of a model: the values that the engine needs of every model, and checked access to the other
keys, which each family reads itself.

Source of the keys and defaults: the `*Config` classes of Hugging Face transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .errors import ModelFileError, UnsupportedModelError, Warn, ignore
from .files import parse_json

_MAX_NUMBER = 1e30
_MAX_COUNT = 1 << 24  # no real dimension or vocabulary is larger, and products of two fit in 64 bits
_MAX_LABELS = 4096
_CLASSIFIER = "ForSequenceClassification"  # suffix of transformers' classes with a classification head


@dataclass(frozen=True, slots=True)
class Config:
    """The configuration of a model. `vocab` and `context` are numbers of tokens."""

    family: str
    vocab: int
    context: int
    bos: int | None
    eos: tuple[int, ...]
    values: Mapping[str, Any] = field(repr=False)
    """All of config.json."""
    labels: tuple[str, ...] = ()
    """Names of the labels of a model with a classification head; empty: the model has an LM head."""
    pad: int | None = None
    """The token that a classification head passes over at the end of a text."""
    limit: str = field(default="", compare=False)
    """The reason, in parentheses, if `context` is less than in config.json; else empty."""
    where: str = field(default="config.json", compare=False)
    """The file's name in errors and warnings."""
    warn: Warn = field(default=ignore, compare=False, repr=False)
    """Called if two keys disagree."""

    def count(self, key: str, default: int | None = None) -> int:
        """The value of `key`, a positive integer. ModelFileError: it is not, or is missing without a
        default."""
        value = self.values.get(key)
        value = default if value is None else value
        if type(value) is not int or not 0 < value <= _MAX_COUNT:
            raise self.contradiction(f"{key} must be an integer from 1 to {_MAX_COUNT}, not {value!r}")
        return value

    def number(
        self, key: str, default: float | None = None, *, within: Mapping[str, Any] | None = None
    ) -> float:
        """The value of `key`, a positive number, in the configuration or in the dictionary `within`.
        ModelFileError: it is not a positive number."""
        value = (self.values if within is None else within).get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= _MAX_NUMBER:
            raise self.contradiction(f"{key} must be a positive number, not {value!r}")
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        """The value of `key`, true or false. ModelFileError: it is neither."""
        value = self.values.get(key)
        if value is not None and type(value) is not bool:
            raise self.contradiction(f"{key} must be true or false, not {value!r}")
        return default if value is None else value

    def within(self, window: int | None) -> Config:
        """This configuration with the context limited to the attention window (None: no window). A window
        changes nothing while the context fits in it; longer contexts are not supported."""
        if window is None or window >= self.context:
            return self
        limit = f" (its attention window is {window} tokens, and longer contexts are not supported yet)"
        return replace(self, context=window, limit=limit)

    def contradiction(self, message: str) -> ModelFileError:
        """The error for a configuration that cannot be right."""
        return ModelFileError(f"{self.where}: {message}")

    def unsupported(self, message: str) -> UnsupportedModelError:
        """The error for a configuration that needs an unsupported feature."""
        return UnsupportedModelError(f"{self.where}: {message}")


def read_config(path: Path) -> Config:
    """Reads `config.json`. ModelFileError: unreadable or inconsistent. UnsupportedModelError: an unsupported
    feature."""
    try:
        values = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelFileError(f"{path} is missing: pull or convert the model again") from None
    except (OSError, ValueError) as e:
        raise ModelFileError(f"{path} cannot be read as JSON: {e}") from e
    if not isinstance(values, dict):
        raise ModelFileError(f"{path} is not a JSON object")
    return parse_config(values, str(path))


def parse_config(values: Mapping[str, Any], where: str, warn: Warn = ignore) -> Config:
    """The Config of a Hugging Face configuration. `where` names it in errors and warnings; `warn` is called
    if two keys disagree. Errors: see `read_config`."""
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
        labels=_labels(values, where),
        pad=_token(values.get("pad_token_id"), "pad_token_id", where),
    )


def _labels(values: Mapping[str, Any], where: str) -> tuple[str, ...]:
    kinds = values.get("architectures")
    if not (isinstance(kinds, list) and kinds and str(kinds[0]).endswith(_CLASSIFIER)):
        return ()
    count, named = values.get("num_labels"), values.get("id2label")
    if named is None:  # transformers leaves out what is its default: two labels
        count = 2 if count is None else count
        named = {str(i): f"LABEL_{i}" for i in range(count)} if type(count) is int and count < 1e4 else None
    size = len(named) if isinstance(named, dict) else 0
    names = [named.get(str(i)) for i in range(size)] if isinstance(named, dict) else []
    labels = tuple(dict.fromkeys(name for name in names if isinstance(name, str) and name))
    if not 0 < size <= _MAX_LABELS or len(labels) < size:
        raise ModelFileError(
            f"{where}: id2label must name the labels 0, 1, 2 … differently, at most {_MAX_LABELS}: it is "
            f"{str(values.get('id2label'))[:200]}"
        )
    return labels


def _token(value: object, key: str, where: str) -> int | None:
    if value is None or (type(value) is int and 0 <= value < _MAX_COUNT):
        return value
    raise ModelFileError(f"{where}: {key} must be a token id, not {value!r}")


def _tokens(value: object, where: str) -> tuple[int, ...]:
    listed = value if isinstance(value, list) else [value]
    tokens = (_token(item, "eos_token_id", where) for item in listed)
    return tuple(token for token in tokens if token is not None)
