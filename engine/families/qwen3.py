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
    c, b = Decoder.of(config, head_dim=128), Builder()
    b.window(window(config, c.layers))
    attention_bias = config.flag("attention_bias")
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
            bias="qkv" if attention_bias else "",
        )
        b.head_norm(qkv, ("q_norm", "self_attn.q_norm"), c.norm_epsilon, c.heads, c.head_dim)
        b.head_norm(qkv, ("k_norm", "self_attn.k_norm"), c.norm_epsilon, c.kv_heads, c.head_dim, c.queries)
        b.rope(qkv, angles, c.heads + c.kv_heads, c.head_dim)
        attended = b.attend("attended", qkv, c.heads, c.kv_heads, c.head_dim)
        b.add(x, attended, ("o", "self_attn.o_proj"), bias=attention_bias)
        h = b.norm("normed", x, ("mlp_norm", "post_attention_layernorm"), c.norm_epsilon)
        wide = {"gate": ("mlp.gate_proj", c.intermediate), "up": ("mlp.up_proj", c.intermediate)}
        b.add(x, b.gate("gated", b.linear("gate_up", h, wide), "silu"), ("down", "mlp.down_proj"))
    b.unit("head")
    h = b.norm("final", x, ("norm", "model.norm"), c.norm_epsilon, "wanted")
    b.lm_head(h, ("head", "lm_head"), config.vocab, tied="embed" if c.tied else None)
    return b.program(cut=x)
