"""Llama: RMS norm, rotary positions, grouped-query attention, SwiGLU (Touvron et al., arXiv 2302.13971).

SmolLM2, TinyLlama and others have this `model_type` too.
"""

from __future__ import annotations

from ..builder import Builder
from ..checkpoint.gguf_names import GgufNames
from ..config import Config
from ..decoder import Decoder
from ..program import Program

GGUF = GgufNames(
    paired={"self_attn.q_proj": "num_attention_heads", "self_attn.k_proj": "num_key_value_heads"}
)


def program(config: Config) -> Program:
    """The program of a Llama model."""
    bias = config.flag("attention_bias")
    return Decoder.of(config).program(
        config.vocab,
        Builder(ignored=("*.rotary_emb.inv_freq",)),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=config.flag("mlp_bias"),
    )
