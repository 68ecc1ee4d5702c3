"""GGUF files for tests: whole ones by the gguf package's writer, and hostile ones byte by byte."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gguf
import numpy as np
from tests.weights.conftest import TINY

from shoal.engine.checkpoint import open_checkpoint

NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    """As convert_hf_to_gguf.py names it."""
    top = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    if not name.startswith("model.layers."):
        return top.get(name, "output.weight")
    _, _, layer, *rest, end = name.split(".")
    return f"blk.{layer}.{NAMES['.'.join(rest)]}.{end}"


def paired(w: np.ndarray, heads: int) -> np.ndarray:
    """`LlamaModel.permute` of convert_hf_to_gguf.py."""
    return w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def write_tiny(
    path: Path,
    *,
    tied: bool = False,
    drop: Sequence[str] = (),
    dtype: type[np.generic] = np.float32,
    rope_freqs: Sequence[float] = (),
    split: int = 0,
    small_first: bool = False,
    tokenizer: Mapping[str, Any] = MappingProxyType({}),
    templates: Mapping[str, str] = MappingProxyType({}),
    **metadata: Any,
) -> Path:
    """The tiny checkpoint as a GGUF in f32. `metadata` overrides keys (dots as __); None removes one.
    `tokenizer` has the keys under tokenizer.ggml, `templates` those under tokenizer.chat_template. `split`:
    into parts of that many tensors, named after `path`; `small_first`: the first of them with metadata only.
    Returns the (first) file."""
    config = json.loads((TINY / "config.json").read_text())
    values = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention__head_count": config["num_attention_heads"],
        "attention__head_count_kv": config["num_key_value_heads"],
        "attention__key_length": config["head_dim"],
        "rope__dimension_count": config["head_dim"],
        "rope__freq_base": 10000.0,
        "attention__layer_norm_rms_epsilon": config["rms_norm_eps"],
        **metadata,
    }
    arch = values.pop("architecture", "llama")
    writer = gguf.GGUFWriter(path, arch, split_max_tensors=split, small_first_shard=small_first)
    for key, value in values.items():
        full = f"{arch}.{key.replace('__', '.')}"
        if isinstance(value, str):
            writer.add_string(full, value)
        elif isinstance(value, float):
            writer.add_float32(full, value)
        elif isinstance(value, list):
            writer.add_array(full, value)
        elif value is not None:
            writer.add_uint32(full, value)
    writer.add_uint32("tokenizer.ggml.bos_token_id", 1)
    writer.add_uint32("tokenizer.ggml.eos_token_id", 2)
    writer.add_string("general.license", "mit")
    for key, value in tokenizer.items():
        writer.add_key_value(f"tokenizer.ggml.{key}", value, *_gguf_type(value))
    for name, template in templates.items():
        writer.add_string(f"tokenizer.chat_template{name}", template)
    source = open_checkpoint(TINY)
    if rope_freqs:
        writer.add_tensor("rope_freqs.weight", np.array(rope_freqs, np.float32))
    for name in sorted(source.names):
        if (tied and name == "lm_head.weight") or name in drop:
            continue
        w = source.tensor(name)
        if ".q_proj." in name or ".k_proj." in name:
            w = paired(w, config["num_attention_heads" if ".q_proj." in name else "num_key_value_heads"])
        writer.add_tensor(gguf_name(name), w.astype(dtype))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return next(iter(sorted(path.parent.glob(f"{path.stem}-00001-of-*.gguf")))) if split else path


def _gguf_type(value: object) -> tuple[gguf.GGUFValueType, ...]:
    first = value[0] if isinstance(value, list) else value
    kinds = {bool: "BOOL", int: "INT32", float: "FLOAT32", str: "STRING"}
    kind = gguf.GGUFValueType[kinds[type(first)]]
    return (gguf.GGUFValueType.ARRAY, kind) if isinstance(value, list) else (kind,)


def sentencepiece_vocabulary(*, merges: bool) -> dict[str, Any]:
    """A small BPE vocabulary over characters, with bytes as a last resort, as sentencepiece makes them."""
    prose = "the and ing ion er in on at en re th he an ent tion of to is it s t a e i o n r h l d"
    found = set("abcdefghijklmnopqrstuvwxyz\u2581.,é今日'")
    for word in ["", *prose.split()]:
        for spelled in (word, "\u2581" + word):
            found |= {spelled[:n] for n in range(1, len(spelled) + 1)} | {
                spelled[n:] for n in range(len(spelled))
            }
    pieces = sorted(found, key=lambda piece: (-len(piece), piece))
    tokens = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *pieces,
        "<|turn|>",
        "<tool>",
    ]
    scores = [0.0] * 259 + [-float(i) for i in range(len(pieces))] + [0.0, 0.0]
    types = [2, 3, 3] + [6] * 256 + [1] * len(pieces) + [3, 4]
    made = {
        "model": "llama",
        "tokens": tokens,
        "scores": scores,
        "token_type": types,
        "unknown_token_id": 0,
    }
    if merges:
        known = set(pieces)
        pairs = [
            (p[:n], p[n:]) for p in pieces for n in range(1, len(p)) if p[:n] in known and p[n:] in known
        ]
        made["merges"] = [" ".join(pair) for pair in pairs]
    return made


def text(value: str) -> bytes:
    """A GGUF string."""
    return struct.pack("<Q", len(value.encode())) + value.encode()


def pair(key: str, kind: int, value: bytes) -> bytes:
    """A key-value pair of type `kind`."""
    return text(key) + struct.pack("<I", kind) + value


def tensor(name: str, dims: Sequence[int], kind: int, offset: int) -> bytes:
    """A tensor description; dims innermost first."""
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def header(
    pairs: Sequence[bytes] = (),
    tensors: Sequence[bytes] = (),
    *,
    data: bytes = b"",
    magic: bytes = b"GGUF",
    version: int = 3,
    pair_count: int | None = None,
    tensor_count: int | None = None,
    alignment: int = 32,
) -> bytes:
    """A file with exactly these bytes in it."""
    counts = (
        len(tensors) if tensor_count is None else tensor_count,
        len(pairs) if pair_count is None else pair_count,
    )
    head = magic + struct.pack("<IQQ", version, *counts) + b"".join(pairs) + b"".join(tensors)
    return head + bytes(-len(head) % alignment) + data
