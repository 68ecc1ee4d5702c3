"""A GGUF file as a checkpoint, with its metadata as config.json and its tensors under Hugging Face's
names."""

from __future__ import annotations

import math
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from .. import families
from ..arrays import F32
from ..errors import ModelFileError, UnsupportedModelError, Warn, ignore
from ..packing import Quantised
from .gguf_blocks import SCALES, quantised
from .gguf_file import GgufTensor, import_gguf
from .gguf_names import END_OF_TURN
from .gguf_parts import GgufParts
from .gguf_tokenizer import CONTROL, tokenizer_json
from .hugging_face_chat import default_template

_FREQUENCY_FACTORS = "rope_freqs.weight"
_T = TypeVar("_T", bound=np.generic)


class GgufCheckpoint:
    """A checkpoint in one or several GGUF files; see `Checkpoint`."""

    def __init__(self, path: Path, warn: Warn = ignore) -> None:
        self.path, self._warn = path, warn
        self._file = GgufParts(path)
        arch = self._file.values.get("general.architecture")
        if not isinstance(arch, str):
            raise ModelFileError(f"{path} is not a model: its metadata lack general.architecture")
        self._arch, self._spelling = arch, families.gguf_names(arch, str(path))
        self._gguf_names = {self._spelling.hugging_face_name(name): name for name in self._file.tensors}
        self._factors = self._gguf_names.pop(_FREQUENCY_FACTORS, None)

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._gguf_names)

    @property
    def license(self) -> str | None:
        value = self._file.values.get("general.license")
        return value if isinstance(value, str) else None

    @property
    def chat_template(self) -> str | None:
        prefix = "tokenizer.chat_template"
        value = self._file.values.get(prefix)
        if isinstance(value, str):
            return value
        keys = [key for key in self._file.values if key.startswith(f"{prefix}.")]
        named = {key.removeprefix(f"{prefix}."): self._file.values[key] for key in keys}
        return default_template(named, str(self.path), self._warn)

    @property
    def special_tokens(self) -> dict[str, str | None]:
        return {}

    def tokenizer_json(self) -> bytes | None:
        return tokenizer_json(self._file.values, str(self.path), self._warn)

    @cached_property
    def config(self) -> dict[str, Any]:
        hidden, heads = self._number("embedding_length"), self._number("attention.head_count")
        head_dim = self._value("attention.key_length") or hidden // max(1, heads)
        rotated = self._value("rope.dimension_count") or head_dim
        if rotated != head_dim:
            raise UnsupportedModelError(
                f"{self.path} rotates {rotated} of {head_dim} columns of a head; only all is supported"
            )
        return {
            "model_type": self._arch,
            "hidden_size": hidden,
            "intermediate_size": self._number("feed_forward_length"),
            "num_hidden_layers": self._number("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._number("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "vocab_size": self._vocab(),
            "max_position_embeddings": self._number("context_length"),
            "rms_norm_eps": self._value("attention.layer_norm_rms_epsilon"),
            "rope_theta": self._value("rope.freq_base") or 10000.0,
            "rope_scaling": self._scaling(head_dim),
            "tie_word_embeddings": "lm_head.weight" not in self.names,
            "hidden_act": "silu",
            "bos_token_id": self._file.values.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self._end_tokens(),
        }

    def tensor(self, name: str) -> F32:
        if name not in self._gguf_names:
            raise ModelFileError(f"{self.path}: the tensor {name!r} is missing: fetch the file again")
        return self._in_order(name, self._file.tensor(self._gguf_names[name]))

    def type_of(self, name: str) -> str:
        return str(import_gguf().GGMLQuantizationType(self._info(name).type).name)

    def quantised(self, name: str) -> Quantised | None:
        kind, shape = self.type_of(name), self._info(name).shape
        if kind not in SCALES or len(shape) != 2:
            return None
        held = quantised(kind, self._file.bytes_of(self._gguf_names[name]), shape[0])
        minimum = None if held.minimum is None else self._in_order(name, held.minimum)
        return Quantised(self._in_order(name, held.values), self._in_order(name, held.scale), minimum)

    def _info(self, name: str) -> GgufTensor:
        return self._file.tensors[self._gguf_names[name]]

    def _in_order(self, name: str, w: NDArray[_T]) -> NDArray[_T]:
        """A tensor, or its scales, with rows in Hugging Face's order; see `GgufNames.paired`."""
        key = self._spelling.heads_key(name)
        if key is None:
            return w
        heads = self.config[key]
        if w.shape[0] % (2 * heads):
            raise ModelFileError(
                f"{self.path}: {name!r} has the shape {w.shape}, which does not fit its {heads} heads"
            )
        return w.reshape(heads, -1, 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)

    def _value(self, key: str) -> Any:
        return self._file.values.get(f"{self._arch}.{key}")

    def _number(self, key: str, default: int | None = None) -> int:
        value = self._value(key)
        value = default if value is None else value
        if isinstance(value, list):  # one for each layer
            if len(set(value)) != 1:
                raise UnsupportedModelError(
                    f"{self.path}: {self._arch}.{key} differs among layers, which is not supported"
                )
            value = value[0]
        if type(value) is not int or not 0 < value < 1 << 32:
            raise ModelFileError(f"{self.path}: {self._arch}.{key} must be a positive integer, not {value!r}")
        return value

    def _vocab(self) -> int:
        """Number of rows of the embedding: the vocabulary size of the program, which metadata may omit."""
        table = self._file.tensors.get(self._gguf_names.get("model.embed_tokens.weight", ""))
        if table is None:
            raise ModelFileError(
                f"{self.path}: the token embedding (token_embd.weight) is missing, as in a file of "
                "a vocabulary, an adapter or an image encoder alone"
            )
        return table.shape[0]

    def _end_tokens(self) -> list[int]:
        values = self._file.values
        ids = [values.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
        tokens, types = values.get("tokenizer.ggml.tokens"), values.get("tokenizer.ggml.token_type")
        if isinstance(tokens, list) and isinstance(types, list):
            pairs = enumerate(zip(tokens, types, strict=False))
            ids += [i for i, (text, kind) in pairs if kind == CONTROL and text in END_OF_TURN]
        listed = list(dict.fromkeys(i for i in ids if type(i) is int))
        # The order is part of the model hash, and matters to templates that use the first as eos_token.
        return listed if "eos_token" in (self.chat_template or "") else sorted(listed)

    def _scaling(self, head_dim: int) -> dict[str, Any] | None:
        """rope_scaling as in config.json; None: no scaling. UnsupportedModelError: its kind is not
        supported."""
        kind = self._value("rope.scaling.type") or "linear"  # the default; the only kind in old files
        factor = self._value("rope.scaling.factor") or self._value("rope.scale_linear")
        if self._factors is not None:
            if kind != "none" and factor not in (None, 0.0, 1.0):
                raise UnsupportedModelError(
                    f"{self.path} scales rotary positions twice, by rope_freqs and by rope.scaling.factor "
                    f"{factor!r}, which is not supported"
                )
            return self._stretched(self._file.tensor(self._factors), head_dim)
        if kind == "none" or (kind == "linear" and factor in (None, 0.0, 1.0)):
            return None
        if kind == "linear":
            return {"rope_type": "linear", "factor": factor}
        raise UnsupportedModelError(f"{self.path}: rope scaling {kind!r} is not supported; linear is")

    def _stretched(self, factors: F32, head_dim: int) -> dict[str, Any]:
        """The parameters of the scaling rule "llama3", recovered from the factors in a GGUF, which lacks the
        rule itself. Only the usual constants are tried."""
        low, high, context = 1.0, 4.0, 8192
        if type(head_dim) is not int or factors.shape != (head_dim // 2,) or not np.all(factors > 0):
            raise ModelFileError(
                f"{self.path}: its rope_freqs are not {head_dim!r} / 2 positive numbers; fetch the file again"
            )
        factor = float(factors.max())
        theta = self._value("rope.freq_base") or 10000.0
        if type(theta) not in (int, float) or not 0 < theta < math.inf or not math.isfinite(factor):
            raise ModelFileError(
                f"{self.path}: rope.freq_base {theta!r} or rope_freqs is not a positive finite number"
            )
        expected = np.empty(head_dim // 2)
        for j in range(head_dim // 2):
            wavelength = 2 * math.pi * theta ** (2 * j / head_dim)
            blend = min(1.0, max(0.0, (context / wavelength - low) / (high - low)))
            expected[j] = 1 / ((1 - blend) / factor + blend)
        if not np.allclose(factors, expected, rtol=1e-4):
            raise UnsupportedModelError(
                f"{self.path}: its rope_freqs do not follow a supported rule (llama3)"
            )
        return {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": context,
        }
