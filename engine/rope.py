"""Inverse frequencies of rotary positions, computed when a model is converted and stored as f64.

Devices do not recompute them, because the `pow` of two C libraries may differ in the last bit, and answers
must not differ. Sources: Su et al., arXiv 2104.09864; the scaling rules of Hugging Face transformers
(`modeling_rope_utils.py`)."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field
from typing import Any

from .config import Config
from .errors import UnsupportedModelError

_LARGEST = sys.float_info.max
_TRAINED = "original_max_position_embeddings"
Scaling = tuple[tuple[str, float | str], ...]


@dataclass(frozen=True, slots=True)
class Rotation:
    """The parameters of rotary position embedding."""

    theta: float
    """Base of the frequencies."""
    scaling: Scaling
    """Sorted items of the scaling dictionary; empty if frequencies are not scaled."""
    where: str = field(default="config.json", compare=False)
    """The configuration's name in errors."""

    @classmethod
    def of(cls, config: Config) -> Rotation:
        """The parameters in a configuration. Configurations spell base and scaling in several ways, and some
        contradict themselves. Precedence is as in transformers (`modeling_rope_utils.py`), with a warning for
        each contradiction. ModelFileError: a value of the wrong type. UnsupportedModelError: an unsupported
        kind of rotary positions."""
        where, values = config.where, config.values
        older, newer = _given(config, "rope_scaling"), _given(config, "rope_parameters")
        if older and newer and older != newer:
            config.warn(
                f"{where}: rope_scaling and rope_parameters differ; rope_scaling is used, as in transformers"
            )
        rope = older or newer or {"rope_theta": values.get("rope_theta", 10000.0), "rope_type": "default"}
        base, kind = config.number("rope_theta", within=rope), rope.pop("rope_type")
        rope.pop("rope_theta", None)
        theta = values.get("rope_theta")
        if theta not in (None, base):
            config.warn(
                f"{where}: rope_theta is {theta!r} by itself and {base:g} in the scaling; the latter is used"
            )
        share = rope.pop("partial_rotary_factor", values.get("partial_rotary_factor"))
        if share not in (None, 1):
            raise config.unsupported(
                f"partial_rotary_factor is {share!r}; all columns of a head must be rotated"
            )
        if kind == "default":
            if rope:
                config.warn(
                    f"{where}: the scaling of rotary positions ({rope}) names no rope_type and is ignored, "
                    "as in transformers; to scale positions, add a rope_type (linear, llama3)"
                )
            rope = {}
        else:
            rope["rope_type"] = kind
        if kind == "llama3":
            rope[_TRAINED] = _trained_context(config, rope)
        factor = rope.get("factor")
        if base < 1 or (isinstance(factor, int | float) and factor < 1):
            raise config.unsupported(
                f"rope_theta {base:g} and rope_scaling {rope} give angles above 1 per position, which cannot "
                "be computed exactly"
            )
        return cls(base, tuple(sorted(rope.items())), where)

    def frequencies(self, head_dim: int) -> tuple[float, ...]:
        """The head_dim / 2 inverse frequencies, in radians per position, highest first.
        UnsupportedModelError: the kind of scaling is not supported."""
        plain = [self.theta ** (-2 * j / head_dim) for j in range(head_dim // 2)]
        kind = dict(self.scaling).get("rope_type", "default")
        if kind == "default":
            return tuple(plain)
        if kind == "linear":
            return tuple(f / self._factor("factor") for f in plain)
        if kind == "llama3":
            return tuple(self._llama3(f) for f in plain)
        raise UnsupportedModelError(
            f"{self.where}: rope_scaling {kind!r} is not supported; default, linear and llama3 are"
        )

    def _llama3(self, frequency: float) -> float:
        """The frequency scaled by the rule "llama3": long wavelengths are stretched by `factor`, short ones
        kept, and those between are blended."""
        factor, low, high, context = map(
            self._factor, ("factor", "low_freq_factor", "high_freq_factor", _TRAINED)
        )
        wavelength = 2 * math.pi / frequency
        if wavelength < context / high:
            return frequency
        if wavelength > context / low:
            return frequency / factor
        blend = (context / wavelength - low) / (high - low)
        return (1 - blend) * frequency / factor + blend * frequency

    def _factor(self, key: str) -> float:
        value = dict(self.scaling).get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= _LARGEST:
            raise UnsupportedModelError(
                f"{self.where}: rope_scaling: {key} must be a positive number, not {value!r}"
            )
        return float(value)


def _given(config: Config, key: str) -> dict[str, Any]:
    """The scaling under a key of the configuration, with its type and base filled in; empty: none."""
    given = config.values.get(key) or {}
    if not isinstance(given, dict):
        raise config.contradiction(f"{key} must be an object, not {given!r}")
    if any(isinstance(value, dict) for value in given.values()):
        raise config.unsupported(f"{key} differs among layers, which is not supported")
    kind = given.get("rope_type", given.get("type", "default"))
    if isinstance(kind, float):  # NaN differs from itself
        raise config.unsupported(f"{key}: the rope_type {kind!r} is not supported")
    if given.get("type", kind) != kind:
        config.warn(
            f"{config.where}: {key} has the rope_type {kind!r} and the type {given['type']!r}; rope_type is "
            "used"
        )
    theta = config.values.get("rope_theta", 10000.0)
    rope = {"rope_theta": theta, **given, "rope_type": kind} if given else {}
    rope.pop("type", None)
    return rope


def _trained_context(config: Config, rope: dict[str, Any]) -> object:
    """The context before it was stretched. Its key is used first outside the scaling, then inside, as in
    transformers."""
    outer, inner = config.values.get(_TRAINED), rope.get(_TRAINED)
    if outer is not None and inner not in (None, outer):
        config.warn(
            f"{config.where}: {_TRAINED} is {outer!r} by itself, which is used, and {inner!r} in the scaling"
        )
    return next((found for found in (outer, inner) if found is not None), config.context)
