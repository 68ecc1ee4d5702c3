"""Llama: RMS norm, rotary positions, grouped-query attention, SwiGLU (Touvron et al., arXiv 2302.13971).

Also SmolLM2, TinyLlama and whatever else says `"model_type": "llama"`.
"""

from __future__ import annotations

from ..config import Config
from ..program import (
    Angles,
    Attend,
    Buffer,
    BufferType,
    Embed,
    Gate,
    KvState,
    Matmul,
    Norm,
    Program,
    Quantise,
    Rope,
    Sample,
    Store,
    Unit,
    Weight,
)
from ..rope import inverse_frequencies


def program(config: Config, *, quantised: bool) -> Program:
    """The program of a Llama model."""
    c = config
    queries, keys = c.heads * c.head_dim, c.kv_heads * c.head_dim
    act: BufferType = "q8" if quantised else "f32"
    epsilon = c.norm_epsilon

    embed = Weight("embed.weight", c.vocab, c.hidden, "model.embed_tokens.weight")
    head = embed if c.tied else Weight("head.weight", c.vocab, c.hidden, "lm_head.weight")

    def layer(i: int) -> Unit:
        source = f"model.layers.{i}."
        attended = "attended_q8" if quantised else "attended"
        quantise = (Quantise("attended_q8", "attended"),) if quantised else ()
        return Unit(
            name=f"layer {i}",
            ops=(
                Norm("normed", "x", "attn_norm.weight", epsilon),
                Matmul("qkv", "normed", ("q.weight", "k.weight", "v.weight")),
                Rope("qkv", "angles", c.heads + c.kv_heads, c.head_dim),
                Store("qkv", "kv", key=queries, value=queries + keys),
                Attend("attended", "qkv", "kv", c.heads, c.head_dim**-0.5),
                *quantise,
                Matmul("x", attended, ("o.weight",), accumulate=True),
                Norm("normed", "x", "mlp_norm.weight", epsilon),
                Matmul("gate_up", "normed", ("gate.weight", "up.weight")),
                Gate("gated", "gate_up", "silu"),
                Matmul("x", "gated", ("down.weight",), accumulate=True),
            ),
            weights=(
                Weight("attn_norm.weight", 1, c.hidden, source + "input_layernorm.weight", vector=True),
                Weight("q.weight", queries, c.hidden, source + "self_attn.q_proj.weight"),
                Weight("k.weight", keys, c.hidden, source + "self_attn.k_proj.weight"),
                Weight("v.weight", keys, c.hidden, source + "self_attn.v_proj.weight"),
                Weight("o.weight", c.hidden, queries, source + "self_attn.o_proj.weight"),
                Weight(
                    "mlp_norm.weight", 1, c.hidden, source + "post_attention_layernorm.weight", vector=True
                ),
                Weight("gate.weight", c.intermediate, c.hidden, source + "mlp.gate_proj.weight"),
                Weight("up.weight", c.intermediate, c.hidden, source + "mlp.up_proj.weight"),
                Weight("down.weight", c.hidden, c.intermediate, source + "mlp.down_proj.weight"),
            ),
            states=(KvState("kv", c.kv_heads, c.head_dim),),
        )

    last = Unit(
        name="head",
        ops=(
            Norm("final", "x", "norm.weight", epsilon),
            Matmul("logits", "final", (head.name,)),
            Sample("logits"),
        ),
        weights=(Weight("norm.weight", 1, c.hidden, "model.norm.weight", vector=True), head),
        tied=(head.name,) if c.tied else (),
    )
    return Program(
        units=(Unit("embed", (Embed("x", embed.name),), (embed,)), *map(layer, range(c.layers)), last),
        prologue=(Angles("angles", "rope.inv_freq"),),
        buffers=(
            Buffer("x", c.hidden),
            Buffer("angles", c.head_dim),
            Buffer("normed", c.hidden, act),
            Buffer("qkv", queries + 2 * keys),
            Buffer("attended", queries),
            *((Buffer("attended_q8", queries, "q8"),) if quantised else ()),
            Buffer("gate_up", 2 * c.intermediate),
            Buffer("gated", c.intermediate, act),
            Buffer("final", c.hidden, act, "wanted"),
            Buffer("logits", c.vocab, "f32", "wanted"),
        ),
        cut=("x",),
        constants=(("rope.inv_freq", inverse_frequencies(c)),),
        logits="logits",
        vocab=c.vocab,
    )
