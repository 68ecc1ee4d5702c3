"""GGUF's own spellings: tensors, pre-tokenizers, parts of a file. What differs among families is in theirs.

Source: ggml-org/llama.cpp, gguf-py/gguf/constants.py and src/llama-vocab.cpp; the regular expressions are
those of Hugging Face transformers, integrations/gguf/gguf_tokenizer_mapping.py."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
_BESIDE = re.compile(r"(^|[/._-])(mmproj|imatrix)([._-]|$)", re.IGNORECASE)
"""Files that accompany a model: the image encoder, and what was measured for its quantisation."""


def part_names(name: str) -> list[str]:
    """Names of all parts of the checkpoint that a file belongs to, in order. A file not named as a part is
    the only one."""
    match = _PART.fullmatch(name)
    if match is None or not 1 <= int(match[2]) <= int(match[3]):
        return [name]
    return [f"{match[1]}-{number:05d}-of-{match[3]}.gguf" for number in range(1, int(match[3]) + 1)]


def models_of(names: Iterable[str]) -> dict[str, list[str]]:
    """The models among files, sorted: all parts of each, by the name of its first part, whichever of them are
    there."""
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
    """How GGUF spells a family."""

    tensors: Mapping[str, str] = field(default_factory=lambda: _TENSORS)
    """Tensors of the model: their names in a Hugging Face checkpoint."""
    layer_tensors: Mapping[str, str] = field(default_factory=lambda: _LAYER_TENSORS)
    """Tensors of a layer, without the layer's prefix and `.weight`."""
    paired: Mapping[str, str] = field(default_factory=dict)
    """Tensors of a layer (in Hugging Face's spelling) whose rows GGUF reorders, so that the two columns of a
    head that rotate together are neighbours; with the key of config.json that counts their heads."""

    def hugging_face_name(self, name: str) -> str:
        """The name of a tensor in a Hugging Face checkpoint; unchanged when there is none, so that it is
        refused by its own name."""
        match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
        if match and match[2] in self.layer_tensors:
            return f"model.layers.{match[1]}.{self.layer_tensors[match[2]]}.{match[3]}"
        return self.tensors.get(name, name)

    def heads_key(self, name: str) -> str | None:
        """The key of config.json that counts the heads of a reordered tensor; None: its rows are in order."""
        match = re.fullmatch(r"model\.layers\.\d+\.(.+)\.(?:weight|bias)", name)
        return self.paired.get(match[1]) if match else None


BYTE_LEVEL = "gpt2"
SENTENCEPIECE = "llama"
"""Values of tokenizer.ggml.model: byte-level BPE, and BPE over characters with bytes as a last resort."""

_GPT2 = None  # the pattern that ByteLevel brings
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
"""Pattern that cuts text into words, by tokenizer.ggml.pre. (Like transformers, `smollm` gets GPT-2's: the
digits it was trained to see alone are not in its merges.)"""

END_OF_TURN = frozenset(
    {"<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "<|end|>", "<end_of_turn>"}
)
"""Control tokens that end an answer even where the metadata name only one of them."""
