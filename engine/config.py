"""`config.json` of a model, as one frozen dataclass: the only place that knows Hugging Face's spellings.

Source of the keys and defaults: the `*Config` classes of Hugging Face transformers.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import ModelFileError, UnsupportedModelError
from .layout import MAX_HEAD_DIM

_MAX_LAYERS = 1024  # csrc/check.c has room for some more; a program of millions would fill the memory
_MAX_NUMBER = 1e30
_MAX_COUNT = 1 << 24  # no honest dimension or vocabulary is larger; products of two fit in 64 bits


@dataclass(frozen=True, slots=True)
class Config:
    """Shape of a decoder. Counts are of elements; `context` is in tokens."""

    family: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int
    norm_epsilon: float
    rope_theta: float
    rope_scaling: tuple[tuple[str, float | str], ...]
    """Sorted items of the scaling dictionary; empty when angles are not scaled."""
    tied: bool
    bos: int | None
    eos: tuple[int, ...]


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


def parse_config(values: dict[str, Any], where: str) -> Config:
    """The Config of a Hugging Face configuration; `where` names it in errors."""

    def count(key: str, default: int | None = None) -> int:
        value = values.get(key)
        value = default if value is None else value
        if type(value) is not int or not 0 < value <= _MAX_COUNT:
            raise ModelFileError(f"{where}: {key} must be a count between 1 and {_MAX_COUNT}, not {value!r}")
        return value

    def number(key: str, default: float, within: dict[str, Any] = values) -> float:
        value = within.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= _MAX_NUMBER:
            raise ModelFileError(f"{where}: {key} must be a positive number, not {value!r}")
        return float(value)

    family = values.get("model_type")
    if not isinstance(family, str):
        raise ModelFileError(f"{where}: model_type must name the family, not {family!r}")
    heads, hidden = count("num_attention_heads"), count("hidden_size")
    kv_heads = count("num_key_value_heads", heads)
    head_dim = count("head_dim", hidden // heads or 1)
    if heads % kv_heads:
        raise ModelFileError(
            f"{where}: {heads} attention heads cannot share {kv_heads} key-value heads evenly"
        )
    if head_dim % 16 or head_dim > MAX_HEAD_DIM:
        raise UnsupportedModelError(
            f"{where}: head_dim is {head_dim}; the attention kernels need a multiple of 16 "
            f"up to {MAX_HEAD_DIM}"
        )
    layers = count("num_hidden_layers")
    if layers > _MAX_LAYERS:
        raise UnsupportedModelError(f"{where}: num_hidden_layers is {layers}; up to {_MAX_LAYERS} can be run")
    for key in ("attention_bias", "mlp_bias"):
        if values.get(key):
            raise UnsupportedModelError(f"{where}: {key} is set; biases are not supported yet")
    if values.get("hidden_act", "silu") != "silu":
        raise UnsupportedModelError(f"{where}: hidden_act {values['hidden_act']!r} is not supported; silu is")
    rope = values.get("rope_parameters")  # transformers >= 5 keeps theta and the scaling in one dictionary
    rope = dict(rope) if isinstance(rope, dict) else {}
    theta = number("rope_theta", 10000.0, rope if "rope_theta" in rope else values)
    rope.pop("rope_theta", None)
    scaling = rope or values.get("rope_scaling") or {}
    if not isinstance(scaling, dict):
        raise ModelFileError(f"{where}: rope_scaling must be an object, not {scaling!r}")
    factor = scaling.get("factor")
    if theta < 1 or (isinstance(factor, int | float) and factor < 1):
        raise UnsupportedModelError(
            f"{where}: rope_theta {theta:g} and rope_scaling {scaling} give angles above 1 a position, "
            "beyond what is computed exactly"
        )
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    return Config(
        family=family,
        layers=layers,
        hidden=hidden,
        intermediate=count("intermediate_size"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=count("vocab_size"),
        context=count("max_position_embeddings", 2048),
        norm_epsilon=number("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=() if kind == "default" else tuple(sorted({**scaling, "rope_type": kind}.items())),
        tied=bool(values.get("tie_word_embeddings", False)),
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
