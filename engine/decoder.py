"""The shape that most decoders share, read from config.json: grouped-query attention with rotary positions,
RMS norms, a gated MLP. A family reads with it what it has in common with others, and its own keys by itself.

Source of the keys and defaults: the `*Config` classes of Hugging Face transformers."""

from __future__ import annotations

from dataclasses import dataclass

from .config import Config
from .layout import MAX_HEAD_DIM
from .rope import Rotation

_MAX_LAYERS = 1024  # csrc/check.c has room for some more; a program of millions would fill the memory


@dataclass(frozen=True, slots=True)
class Decoder:
    """Counts are of elements."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_epsilon: float
    rotation: Rotation
    tied: bool
    """The LM head's matrix is the embedding's table."""

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
        """Of the rotary positions."""
        return self.rotation.frequencies(self.head_dim)

    @classmethod
    def of(cls, config: Config, *, head_dim: int | None = None) -> Decoder:
        """`head_dim`: the family's own default, where it is not hidden / heads."""
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
        )
