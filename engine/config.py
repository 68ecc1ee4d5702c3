"""`config.json` of a model, as one frozen dataclass: the only place that knows Hugging Face's spellings.

Source of the keys and defaults: the `*Config` classes of Hugging Face transformers.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import ModelFileError, UnsupportedModelError, Warn, ignore
from .layout import MAX_HEAD_DIM

_TRAINED = "original_max_position_embeddings"
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


def parse_config(values: dict[str, Any], where: str, warn: Warn = ignore) -> Config:
    """The Config of a Hugging Face configuration; `where` names it in errors and in warnings, which
    `warn` is called with where two keys disagree."""

    def count(key: str, default: int | None = None) -> int:
        value = values.get(key)
        value = default if value is None else value
        if type(value) is not int or not 0 < value <= _MAX_COUNT:
            raise ModelFileError(f"{where}: {key} must be a count between 1 and {_MAX_COUNT}, not {value!r}")
        return value

    def flag(key: str) -> bool:
        value = values.get(key)
        if value is not None and type(value) is not bool:
            raise ModelFileError(f"{where}: {key} must be true or false, not {value!r}")
        return bool(value)

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
        if flag(key):
            raise UnsupportedModelError(f"{where}: {key} is set; biases are not supported yet")
    if values.get("hidden_act", "silu") != "silu":
        raise UnsupportedModelError(f"{where}: hidden_act {values['hidden_act']!r} is not supported; silu is")
    context = count("max_position_embeddings", 2048)
    theta, scaling = _rope(values, context, where, warn)
    return Config(
        family=family,
        layers=layers,
        hidden=hidden,
        intermediate=count("intermediate_size"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=count("vocab_size"),
        context=context,
        norm_epsilon=_number(values.get("rms_norm_eps", 1e-6), "rms_norm_eps", where),
        rope_theta=theta,
        rope_scaling=scaling,
        tied=flag("tie_word_embeddings"),
        bos=_token(values.get("bos_token_id"), "bos_token_id", where),
        eos=_tokens(values.get("eos_token_id"), where),
    )


def _rope(
    values: dict[str, Any], context: int, where: str, warn: Warn
) -> tuple[float, tuple[tuple[str, float | str], ...]]:
    """The base of the rotary angles, and the items of their scaling (none: they are not scaled).

    Configurations have spelled both in several ways, and some contradict themselves. What counts is what
    counts in transformers (`modeling_rope_utils.py`); a contradiction is a warning."""

    def read(key: str) -> dict[str, Any]:
        """The scaling under a key, with its type and its base."""
        given = values.get(key) or {}
        if not isinstance(given, dict):
            raise ModelFileError(f"{where}: {key} must be an object, not {given!r}")
        if any(isinstance(value, dict) for value in given.values()):
            raise UnsupportedModelError(f"{where}: {key} differs among layers, which is not supported")
        kind = given.get("rope_type", given.get("type", "default"))
        if given.get("type", kind) != kind:
            warn(
                f"{where}: {key} has the rope_type {kind!r} and the type {given['type']!r}; rope_type counts"
            )
        rope = {"rope_theta": values.get("rope_theta", 10000.0), **given, "rope_type": kind} if given else {}
        rope.pop("type", None)
        return rope

    older, newer = read("rope_scaling"), read("rope_parameters")
    if older and newer and older != newer:
        warn(f"{where}: rope_scaling and rope_parameters differ; rope_scaling counts, as in transformers")
    rope = older or newer or {"rope_theta": values.get("rope_theta", 10000.0), "rope_type": "default"}
    base, kind = _number(rope.pop("rope_theta"), "rope_theta", where), rope.pop("rope_type")
    theta = values.get("rope_theta")
    if theta not in (None, base):
        warn(f"{where}: rope_theta is {theta!r} by itself and {base:g} in the scaling, where it counts")
    share = rope.pop("partial_rotary_factor", values.get("partial_rotary_factor"))
    if share not in (None, 1):
        raise UnsupportedModelError(
            f"{where}: partial_rotary_factor is {share!r}; all columns of a head must be rotated"
        )
    if kind == "default":
        if rope:
            warn(
                f"{where}: the scaling of rotary positions ({rope}) names no rope_type and is ignored, as in "
                "transformers; if positions are to be scaled, its rope_type must say how (linear, llama3)"
            )
        rope = {}
    else:
        rope["rope_type"] = kind
    if kind == "llama3":
        rope[_TRAINED] = _trained_context(values, rope, context, where, warn)
    factor = rope.get("factor")
    if base < 1 or (isinstance(factor, int | float) and factor < 1):
        raise UnsupportedModelError(
            f"{where}: rope_theta {base:g} and rope_scaling {rope} give angles above 1 a position, "
            "beyond what is computed exactly"
        )
    return base, tuple(sorted(rope.items()))


def _trained_context(
    values: dict[str, Any], rope: dict[str, Any], context: int, where: str, warn: Warn
) -> object:
    """The context before it was stretched; transformers looks beside the scaling first, then in it."""
    outer, inner = values.get(_TRAINED), rope.get(_TRAINED)
    if outer is not None and inner not in (None, outer):
        warn(f"{where}: {_TRAINED} is {outer!r} by itself, which counts, and {inner!r} in the scaling")
    return next((found for found in (outer, inner) if found is not None), context)


def _number(value: object, key: str, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= _MAX_NUMBER:
        raise ModelFileError(f"{where}: {key} must be a positive number, not {value!r}")
    return float(value)


def _token(value: object, key: str, where: str) -> int | None:
    if value is None or (type(value) is int and 0 <= value < _MAX_COUNT):
        return value
    raise ModelFileError(f"{where}: {key} must be a token id, not {value!r}")


def _tokens(value: object, where: str) -> tuple[int, ...]:
    listed = value if isinstance(value, list) else [value]
    tokens = (_token(item, "eos_token_id", where) for item in listed)
    return tuple(token for token in tokens if token is not None)
