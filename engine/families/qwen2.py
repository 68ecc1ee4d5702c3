"""Qwen2 and Qwen2.5: Llama's layers with biases of queries, keys and values (arXiv 2407.10671)."""

from __future__ import annotations

from ..builder import Builder
from ..checkpoint.gguf_names import GgufNames
from ..config import Config
from ..decoder import Decoder
from ..program import Program

GGUF = GgufNames()


def window(config: Config, layers: int) -> int | None:
    """Positions that attention looks back in some layers; None: all positions in every layer."""
    kinds = config.values.get("layer_types")  # where it is missing, the first max_window_layers have none
    if isinstance(kinds, list):
        some = "sliding_attention" in kinds[:layers]
    else:
        some = config.count("max_window_layers", 28) < layers
    return config.count("sliding_window", 4096) if config.flag("use_sliding_window") and some else None


def program(config: Config) -> Program:
    """The program of a Qwen2 model."""
    c, b = Decoder.of(config), Builder()
    b.window(window(config, c.layers))
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
            bias="qkv",
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
