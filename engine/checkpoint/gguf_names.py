"""GGUF's names of tensors, pre-tokenizers and parts of a checkpoint. Families override them in their modules.

Source: ggml-org/llama.cpp, gguf-py/gguf/constants.py and src/llama-vocab.cpp; the regular expressions are
those of Hugging Face transformers, integrations/gguf/gguf_tokenizer_mapping.py."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
_BESIDE = re.compile(r"(^|[/._-])(mmproj|imatrix)([._-]|$)", re.IGNORECASE)
"""Matches files that accompany a model: an image encoder, or importances for quantisation."""


def part_names(name: str) -> list[str]:
    """Names of all parts of the checkpoint that a file belongs to, in order. A file whose name is not that of
    a part is a checkpoint by itself."""
    match = _PART.fullmatch(name)
    if match is None or not 1 <= int(match[2]) <= int(match[3]):
        return [name]
    return [f"{match[1]}-{number:05d}-of-{match[3]}.gguf" for number in range(1, int(match[3]) + 1)]


def models_of(names: Iterable[str]) -> dict[str, list[str]]:
    """The models among file names, sorted: by the name of the first part, the names of all parts, including
    missing ones."""
    parts = (part_names(name) for name in names if name.endswith(".gguf") and not _BESIDE.search(name))
    return dict(sorted({listed[0]: listed for listed in parts}.items()))


_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@dataclass(frozen=True, slots=True)
class GgufNames:
    """GGUF's names of a family's tensors."""

    tensors: Mapping[str, str] = field(default_factory=lambda: _TENSORS)
    """Hugging Face names by GGUF name, of tensors outside layers."""
    layer_tensors: Mapping[str, str] = field(default_factory=lambda: _LAYER_TENSORS)
    """Hugging Face names by GGUF name, of tensors in layers, without the layer's prefix and `.weight`."""
    paired: Mapping[str, str] = field(default_factory=dict)
    """Layer tensors whose rows GGUF reorders, so that the two columns of a head that rotate together are
    adjacent: by Hugging Face name, the key of config.json with their number of heads."""

    def hugging_face_name(self, name: str) -> str:
        """The Hugging Face name of a GGUF tensor. An unknown name is returned unchanged, so that errors show
        it."""
        match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
        if match and match[2] in self.layer_tensors:
            return f"model.layers.{match[1]}.{self.layer_tensors[match[2]]}.{match[3]}"
        return self.tensors.get(name, name)

    def heads_key(self, name: str) -> str | None:
        """The key of config.json with the number of heads of a reordered tensor; None: not reordered."""
        match = re.fullmatch(r"model\.layers\.\d+\.(.+)\.(?:weight|bias)", name)
        return self.paired.get(match[1]) if match else None


BYTE_LEVEL = "gpt2"
SENTENCEPIECE = "llama"
"""Values of tokenizer.ggml.model: byte-level BPE, and BPE over characters with a fallback to bytes."""

_GPT2 = None  # the pattern that is built into ByteLevel
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

PRE_TOKENIZERS: dict[str, str | None] = {
    "default": _GPT2,
    "gpt-2": _GPT2,
    "gpt2": _GPT2,
    "smollm": _GPT2,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama-bpe": _LLAMA3,
    "falcon3": _LLAMA3,
    "lfm2": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "megrez": _QWEN2,
    "tekken": _TEKKEN,
}
"""Patterns that split text into words, by tokenizer.ggml.pre. As in transformers, `smollm` has GPT-2's
pattern: it was trained with single digits, so no merge has digits."""

END_OF_TURN = frozenset(
    {"<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "<|end|>", "<end_of_turn>"}
)
"""Control tokens that end an answer, even if the metadata name only one of them."""
