"""Llama: RMS norm, rotary positions, grouped-query attention, SwiGLU (Touvron et al., arXiv 2302.13971).

Also SmolLM2, TinyLlama and whatever else says `"model_type": "llama"`.
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
    c, b = Decoder.of(config), Builder(ignored=("*.rotary_emb.inv_freq",))
    attention_bias, mlp_bias = config.flag("attention_bias"), config.flag("mlp_bias")
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
        b.rope(qkv, angles, c.heads + c.kv_heads, c.head_dim)
        attended = b.attend("attended", qkv, c.heads, c.kv_heads, c.head_dim)
        b.add(x, attended, ("o", "self_attn.o_proj"), bias=attention_bias)
        h = b.norm("normed", x, ("mlp_norm", "post_attention_layernorm"), c.norm_epsilon)
        wide = {"gate": ("mlp.gate_proj", c.intermediate), "up": ("mlp.up_proj", c.intermediate)}
        gate_up = b.linear("gate_up", h, wide, bias=tuple(wide) if mlp_bias else ())
        b.add(x, b.gate("gated", gate_up, "silu"), ("down", "mlp.down_proj"), bias=mlp_bias)
    b.unit("head")
    h = b.norm("final", x, ("norm", "model.norm"), c.norm_epsilon, "wanted")
    b.lm_head(h, ("head", "lm_head"), config.vocab, tied="embed" if c.tied else None)
    return b.program(cut=x)
