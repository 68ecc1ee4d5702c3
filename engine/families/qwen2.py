"""Qwen2 and Qwen2.5: Llama's layers with biases of queries, keys and values (arXiv 2407.10671)."""

from __future__ import annotations

from ..builder import Builder
from ..checkpoint.gguf_names import GgufNames
from ..config import Config
from ..decoder import Decoder
from ..program import Program

GGUF = GgufNames()


def window(config: Config, layers: int) -> int | None:
    """The attention window in positions, if some layer has one; None: no layer has."""
    kinds = config.values.get("layer_types")  # if missing, the first max_window_layers have no window
    if isinstance(kinds, list):
        some = "sliding_attention" in kinds[:layers]
    else:
        some = config.count("max_window_layers", 28) < layers
    return config.count("sliding_window", 4096) if config.flag("use_sliding_window") and some else None


def program(config: Config) -> Program:
    """The program of a Qwen2 model."""
    decoder, builder = Decoder.of(config), Builder()
    builder.window(window(config, decoder.layers))
    return decoder.program(config.vocab, builder, qkv_bias=True)
