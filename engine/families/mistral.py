"""Mistral: Llama's layers, some versions with attention that looks back a window only (Jiang et al., arXiv
2310.06825). GGUF files of it call it by Llama's name."""

from __future__ import annotations

from ..builder import Builder
from ..config import Config
from ..decoder import Decoder
from ..program import Program
from .llama import GGUF as GGUF


def program(config: Config) -> Program:
    """The program of a Mistral model."""
    c, b = Decoder.of(config), Builder()
    if config.values.get("sliding_window", 4096) is not None:
        b.window(config.count("sliding_window", 4096))
    angles = b.angles(c.frequencies)
    b.unit("embed")
    x = b.embed("x", ("embed", "model.embed_tokens"), config.vocab, c.hidden)
    for i in range(c.layers):
        b.unit(f"layer {i}", f"model.layers.{i}.")
        h = b.norm("normed", x, ("attn_norm", "input_layernorm"), c.norm_epsilon)
        qkv = b.linear(
            "qkv",
            h,
            {
                "q": ("self_attn.q_proj", c.queries),
                "k": ("self_attn.k_proj", c.keys),
                "v": ("self_attn.v_proj", c.keys),
            },
        )
        b.rope(qkv, angles, c.heads + c.kv_heads, c.head_dim)
        attended = b.attend("attended", qkv, c.heads, c.kv_heads, c.head_dim)
        b.add(x, attended, ("o", "self_attn.o_proj"))
        h = b.norm("normed", x, ("mlp_norm", "post_attention_layernorm"), c.norm_epsilon)
        wide = {"gate": ("mlp.gate_proj", c.intermediate), "up": ("mlp.up_proj", c.intermediate)}
        b.add(x, b.gate("gated", b.linear("gate_up", h, wide), "silu"), ("down", "mlp.down_proj"))
    b.unit("head")
    h = b.norm("final", x, ("norm", "model.norm"), c.norm_epsilon, "wanted")
    b.lm_head(h, ("head", "lm_head"), config.vocab, tied="embed" if c.tied else None)
    return b.program(cut=x)
