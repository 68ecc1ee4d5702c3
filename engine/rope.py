"""Inverse frequencies of rotary positions, computed once, when a model is converted, and stored as f64.

They are never recomputed on a device: `pow` of two libms may differ in the last bit, and answers must
not. Sources: Su et al., arXiv 2104.09864; the scaling rules of Hugging Face transformers
(`modeling_rope_utils.py`)."""

from __future__ import annotations

import math

from .config import Config
from .errors import UnsupportedModelError


def inverse_frequencies(config: Config) -> tuple[float, ...]:
    """head_dim / 2 angles per position, highest first. UnsupportedModelError: a scaling that we don't
    have."""
    plain = [config.rope_theta ** (-2 * j / config.head_dim) for j in range(config.head_dim // 2)]
    scaling = dict(config.rope_scaling)
    kind = scaling.get("rope_type", "default")
    if kind == "default":
        return tuple(plain)
    if kind == "linear":
        return tuple(f / _factor(scaling, "factor") for f in plain)
    if kind == "llama3":
        return tuple(_llama3(f, scaling) for f in plain)
    raise UnsupportedModelError(f"rope_scaling {kind!r} is not supported; default, linear and llama3 are")


def _llama3(frequency: float, scaling: dict[str, float | str]) -> float:
    """Long waves are stretched by `factor`, short ones kept, those between blended."""
    factor, low, high, context = (
        _factor(scaling, key)
        for key in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    )
    wavelength = 2 * math.pi / frequency
    if wavelength < context / high:
        return frequency
    if wavelength > context / low:
        return frequency / factor
    blend = (context / wavelength - low) / (high - low)
    return (1 - blend) * frequency / factor + blend * frequency


def _factor(scaling: dict[str, float | str], key: str) -> float:
    value = scaling.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise UnsupportedModelError(f"rope_scaling: {key} must be a positive number, not {value!r}")
    return float(value)
