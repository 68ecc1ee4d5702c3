"""A GGUF file's model computed by hand: the gguf package reads and dequantises, NumPy multiplies in float64.

Nothing of it is the engine's: not the reader, not the order of rotated columns (GGUF has pairs side by side),
not the attention."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np

Array = np.ndarray


class Reference:
    """A Llama in one GGUF file, or in the parts of one."""

    def __init__(self, paths: Sequence[Path]) -> None:
        readers = [gguf.GGUFReader(path) for path in paths]
        self._fields = readers[0].fields
        self._tensors = {tensor.name: tensor for reader in readers for tensor in reader.tensors}

    def logits(self, tokens: Sequence[int]) -> Array:
        """One row for each position."""
        heads, kv_heads = self._value("attention.head_count"), self._value("attention.head_count_kv")
        epsilon, base = self._value("attention.layer_norm_rms_epsilon"), self._value("rope.freq_base")
        table = self._tensor("token_embd")
        x = table[list(tokens)]
        visible = np.tril(np.ones((len(tokens), len(tokens)), bool))
        for i in range(self._value("block_count")):

            def weight(name: str, layer: int = i) -> Array:
                return self._tensor(f"blk.{layer}.{name}")

            n = _norm(x, weight("attn_norm"), epsilon)
            q = _rotated(_by_head(n @ weight("attn_q").T, heads), base)
            k = _rotated(_by_head(n @ weight("attn_k").T, kv_heads), base).repeat(heads // kv_heads, 0)
            v = _by_head(n @ weight("attn_v").T, kv_heads).repeat(heads // kv_heads, 0)
            scores = np.where(visible, q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1]), -np.inf)
            shares = np.exp(scores - scores.max(-1, keepdims=True))
            attended = (shares / shares.sum(-1, keepdims=True)) @ v
            x = x + attended.swapaxes(0, 1).reshape(len(tokens), -1) @ weight("attn_output").T
            n = _norm(x, weight("ffn_norm"), epsilon)
            gate = n @ weight("ffn_gate").T
            x = x + (gate / (1 + np.exp(-gate)) * (n @ weight("ffn_up").T)) @ weight("ffn_down").T
        head = self._tensor("output") if "output.weight" in self._tensors else table
        return _norm(x, self._tensor("output_norm"), epsilon) @ head.T

    def _value(self, key: str) -> Any:
        return self._fields[f"llama.{key}"].contents()

    def _tensor(self, name: str) -> Array:
        tensor = self._tensors[f"{name}.weight"]
        values: Array = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        return values.reshape(tensor.shape[::-1]).astype(np.float64)


def _norm(x: Array, weight: Array, epsilon: float) -> Array:
    normed: Array = x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon) * weight
    return normed


def _by_head(x: Array, heads: int) -> Array:
    return x.reshape(len(x), heads, -1).swapaxes(0, 1)


def _rotated(x: Array, base: float) -> Array:
    """Heads x positions x columns; columns 2j and 2j + 1 rotate together."""
    _, positions, dim = x.shape
    turns = np.exp(1j * np.outer(np.arange(positions), base ** (-np.arange(0, dim, 2) / dim)))
    pairs = (x[..., ::2] + 1j * x[..., 1::2]) * turns
    return np.stack([pairs.real, pairs.imag], -1).reshape(x.shape)
