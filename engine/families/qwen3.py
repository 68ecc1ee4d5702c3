"""Qwen3: Llama's layers with an RMS norm of each head of queries and keys before they are rotated (Yang et
al., arXiv 2505.09388)."""

from __future__ import annotations

from ..builder import Builder
from ..checkpoint.gguf_names import GgufNames
from ..config import Config
from ..decoder import Decoder
from ..program import Program
from .qwen2 import window

GGUF = GgufNames()


def program(config: Config) -> Program:
    """The program of a Qwen3 model."""
    decoder, builder = Decoder.of(config, head_dim=128), Builder()
    builder.window(window(config, decoder.layers))
    bias = config.flag("attention_bias")
    return decoder.program(config.vocab, builder, qkv_bias=bias, o_bias=bias, head_norm=True)
