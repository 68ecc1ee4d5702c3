"""The architecture that most decoders share: grouped-query attention with rotary positions, RMS norms and a
gated MLP. `Decoder.of` reads its shape from config.json and `Decoder.program` writes its program; a family
adds its own keys and its differences.

Source of the keys and defaults: the `*Config` classes of Hugging Face transformers."""

from __future__ import annotations

from dataclasses import dataclass

from .builder import Builder
from .config import Config
from .layout import MAX_HEAD_DIM
from .program import Program
from .rope import Rotation

_MAX_LAYERS = 1024  # csrc/check.c allows some more; millions would fill the memory with ops


@dataclass(frozen=True, slots=True)
class Decoder:
    """The dimensions of a decoder, in elements or heads."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_epsilon: float
    rotation: Rotation
    tied: bool
    """Whether the LM head's matrix is the embedding's table."""
    labels: int = 0
    """Labels of a classification head, which the model then has instead of an LM head."""

    @property
    def queries(self) -> int:
        """Columns of all query heads."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """Columns of all key heads, and of all value heads."""
        return self.kv_heads * self.head_dim

    @property
    def frequencies(self) -> tuple[float, ...]:
        """Inverse frequencies of rotary positions. Errors: see `Rotation.frequencies`."""
        return self.rotation.frequencies(self.head_dim)

    @classmethod
    def of(cls, config: Config, *, head_dim: int | None = None) -> Decoder:
        """The dimensions in a configuration. `head_dim`: the family's default, if it is not hidden / heads.
        ModelFileError: the configuration is inconsistent. UnsupportedModelError: an unsupported feature."""
        heads, hidden = config.count("num_attention_heads"), config.count("hidden_size")
        kv_heads = config.count("num_key_value_heads", heads)
        dim = config.count("head_dim", head_dim or hidden // heads or 1)
        if heads % kv_heads:
            raise config.contradiction(
                f"{heads} attention heads cannot share {kv_heads} key-value heads evenly"
            )
        if dim % 16 or dim > MAX_HEAD_DIM:
            raise config.unsupported(
                f"head_dim is {dim}; the attention kernels need a multiple of 16 up to {MAX_HEAD_DIM}"
            )
        layers = config.count("num_hidden_layers")
        if layers > _MAX_LAYERS:
            raise config.unsupported(f"num_hidden_layers is {layers}; up to {_MAX_LAYERS} can be run")
        activation = config.values.get("hidden_act", "silu")
        if activation != "silu":
            raise config.unsupported(f"hidden_act {activation!r} is not supported; silu is")
        return cls(
            layers=layers,
            hidden=hidden,
            intermediate=config.count("intermediate_size"),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=dim,
            norm_epsilon=config.number("rms_norm_eps", 1e-6),
            rotation=Rotation.of(config),
            tied=config.flag("tie_word_embeddings"),
            labels=len(config.labels),
        )

    def program(
        self,
        vocab: int,
        b: Builder,
        *,
        qkv_bias: bool = False,
        o_bias: bool = False,
        mlp_bias: bool = False,
        head_norm: bool = False,
    ) -> Program:
        """The program of all units. The options add biases, and an RMS norm of each head of queries and keys
        before rotation."""
        epsilon, angles = self.norm_epsilon, b.angles(self.frequencies)
        b.unit("embed")
        x = b.embed("x", ("embed", "model.embed_tokens"), vocab, self.hidden)
        qkv_parts = {
            "q": ("self_attn.q_proj", self.queries),
            "k": ("self_attn.k_proj", self.keys),
            "v": ("self_attn.v_proj", self.keys),
        }
        mlp_parts = {"gate": ("mlp.gate_proj", self.intermediate), "up": ("mlp.up_proj", self.intermediate)}
        for i in range(self.layers):
            b.unit(f"layer {i}", f"model.layers.{i}.")
            h = b.norm("normed", x, ("attn_norm", "input_layernorm"), epsilon)
            qkv = b.linear("qkv", h, qkv_parts, bias=tuple(qkv_parts) if qkv_bias else ())
            if head_norm:
                for names, heads, at in (
                    (("q_norm", "self_attn.q_norm"), self.heads, 0),
                    (("k_norm", "self_attn.k_norm"), self.kv_heads, self.queries),
                ):
                    b.head_norm(qkv, names, epsilon, heads, self.head_dim, at)
            b.rope(qkv, angles, self.heads + self.kv_heads, self.head_dim)
            attended = b.attend("attended", qkv, self.heads, self.kv_heads, self.head_dim)
            b.add(x, attended, ("o", "self_attn.o_proj"), bias=o_bias)
            h = b.norm("normed", x, ("mlp_norm", "post_attention_layernorm"), epsilon)
            gate_up = b.linear("gate_up", h, mlp_parts, bias=tuple(mlp_parts) if mlp_bias else ())
            b.add(x, b.gate("gated", gate_up, "silu"), ("down", "mlp.down_proj"), bias=mlp_bias)
        b.unit("head")
        h = b.final_norm("final", x, ("norm", "model.norm"), epsilon)
        if self.labels:
            b.label_head(h, ("score", "score"), self.labels)
        else:
            b.lm_head(h, ("head", "lm_head"), vocab, tied="embed" if self.tied else None)
        return b.program(cut=x)
