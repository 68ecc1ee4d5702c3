"""Tiny checkpoints of every family, made from a seed: awkward shapes, in safetensors and in GGUF.

What a checkpoint of a family holds is spelled here from transformers' and llama.cpp's sources and not read
off the engine. The logits that transformers computes are in fixtures/families.npz (make_fixtures.py)."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import safetensors.numpy

F32 = np.ndarray[Any, np.dtype[np.float32]]
_COMMON = {
    "hidden_size": 72,
    "intermediate_size": 104,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 267,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# By name, what config.json says besides; head_dim None: hidden_size / heads.
CASES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama-biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "mistral": {"model_type": "mistral", "sliding_window": None, "num_key_value_heads": 3},
    "mistral-window": {"model_type": "mistral", "sliding_window": 512, "tie_word_embeddings": True},
    "qwen2": {"model_type": "qwen2", "hidden_size": 96, "head_dim": None, "rope_theta": 1e6},
    "qwen2-tied": {"model_type": "qwen2", "hidden_size": 96, "head_dim": None, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 32, "rms_norm_eps": 1e-6},
    "qwen3-biases": {
        "model_type": "qwen3",
        "num_key_value_heads": 1,
        "attention_bias": True,
        "tie_word_embeddings": True,
    },
}
IN_GGUF = [name for name in CASES if "biases" not in name]
"""llama.cpp's converters write no biases for the others."""
TOKENS: list[int] = np.random.default_rng(3).integers(0, 267, 300).tolist()
POSITIONS = [*range(8), 63, 64, *range(250, 260), *range(296, 300)]
"""Of which the fixture has logits."""


def config(name: str) -> dict[str, Any]:
    """config.json of a case."""
    values = {**_COMMON, **CASES[name]}
    if values["head_dim"] is None:
        del values["head_dim"]
    return values


def shapes(c: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Tensors of a checkpoint, as transformers' modules declare them."""
    hidden, inner, vocab = c["hidden_size"], c["intermediate_size"], c["vocab_size"]
    dim = c.get("head_dim") or hidden // c["num_attention_heads"]
    queries, keys = c["num_attention_heads"] * dim, c["num_key_value_heads"] * dim
    projections = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    layer: dict[str, tuple[int, ...]] = {f"{name}.weight": shape for name, shape in projections.items()}
    layer |= {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}
    biased = {"q", "k", "v"} if c["model_type"] == "qwen2" else set()
    biased |= {"q", "k", "v", "o"} if c.get("attention_bias") else set()
    biased |= {"gate", "up", "down"} if c.get("mlp_bias") else set()
    for name, (rows, _) in projections.items():
        if name.split(".")[1].removesuffix("_proj") in biased:
            layer[f"{name}.bias"] = (rows,)
    if c["model_type"] == "qwen3":
        layer |= {"self_attn.q_norm.weight": (dim,), "self_attn.k_norm.weight": (dim,)}
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, hidden),
        "model.norm.weight": (hidden,),
    }
    if not c["tie_word_embeddings"]:
        found["lm_head.weight"] = (vocab, hidden)
    for i in range(c["num_hidden_layers"]):
        found |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    return found


def tensors(name: str) -> dict[str, F32]:
    """Weights of a case: matrices that keep the size of what passes, norms near 1, biases that matter."""
    rng, found = np.random.default_rng(11), {}
    for tensor, shape in sorted(shapes(config(name)).items()):
        values = rng.standard_normal(shape, np.float32)
        if len(shape) == 2:
            values *= 1 / np.sqrt(shape[1]) if "embed" not in tensor else 1
        elif tensor.endswith("bias"):
            values *= 0.3
        elif tensor != "model.norm.weight":  # of which half are negative: a tied head repeats the token else
            values = 1 + 0.2 * values
        found[tensor] = values.astype(np.float32)
    return found


def write_checkpoint(name: str, target: Path) -> Path:
    """A case as a Hugging Face directory, float32."""
    target.mkdir(parents=True)
    (target / "config.json").write_text(json.dumps(config(name), indent=1), encoding="utf-8")
    safetensors.numpy.save_file(tensors(name), target / "model.safetensors")
    return target


LABELS = ("calm", "glad", "torn between the two")


def write_classifier(name: str, target: Path, **values: Any) -> Path:
    """A case with a head of LABELS instead of an LM head, as transformers' ForSequenceClassification saves
    it, float32. `values` are further keys of config.json."""
    write_checkpoint(name, target)
    found = {tensor: array for tensor, array in tensors(name).items() if tensor != "lm_head.weight"}
    kind = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
    said = {**config(name), "id2label": {str(i): label for i, label in enumerate(LABELS)}}
    said["architectures"] = [f"{kind[said['model_type']]}ForSequenceClassification"]
    said |= {"label2id": {label: i for i, label in enumerate(LABELS)}, **values}
    (target / "config.json").write_text(json.dumps(said, indent=1), encoding="utf-8")
    labels = len(said["id2label"] or (0, 1))
    scores = np.random.default_rng(5).standard_normal((labels, said["hidden_size"]), np.float32)
    found["score.weight"] = scores / np.sqrt(np.float32(said["hidden_size"]))
    safetensors.numpy.save_file(found, target / "model.safetensors")
    return target


_GGUF = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}


def write_gguf(name: str, path: Path) -> Path:
    """A case as convert_hf_to_gguf.py writes it: Mistral under Llama's name, both with the rows of queries
    and keys reordered; the others with rows as they are."""
    c = config(name)
    arch = {"mistral": "llama"}.get(c["model_type"], c["model_type"])
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(c["num_hidden_layers"])
    writer.add_context_length(c["max_position_embeddings"])
    writer.add_embedding_length(c["hidden_size"])
    writer.add_feed_forward_length(c["intermediate_size"])
    writer.add_head_count(c["num_attention_heads"])
    writer.add_head_count_kv(c["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(c["rms_norm_eps"])
    writer.add_rope_freq_base(c["rope_theta"])
    writer.add_vocab_size(c["vocab_size"])
    dim = c.get("head_dim")
    if dim is not None:
        writer.add_key_length(dim)
        writer.add_value_length(dim)
        if arch == "llama":
            writer.add_rope_dimension_count(dim)
    writer.add_bos_token_id(c["bos_token_id"])
    writer.add_eos_token_id(c["eos_token_id"])
    for tensor, values in tensors(name).items():
        layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)", tensor)
        if layer is None:
            module, kind = tensor.rsplit(".", 1)
            writer.add_tensor(f"{_GGUF[module]}.{kind}", values)
            continue
        number, module, kind = layer.groups()
        if arch == "llama" and module in ("self_attn.q_proj", "self_attn.k_proj"):
            heads = c["num_attention_heads" if "q_proj" in module else "num_key_value_heads"]
            halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
            values = np.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))
        writer.add_tensor(f"blk.{number}.{_GGUF[module]}.{kind}", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
