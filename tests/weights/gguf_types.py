"""GGUF files in every type: by the gguf package's quantisers, or random blocks of types it only reads."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import gguf
import numpy as np

WRITTEN = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "TQ1_0", "TQ2_0", "MXFP4")
"""Types that the package quantises to."""

SCALES = {
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    **dict.fromkeys(("IQ1_S", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS"), (0,)),
}
"""Types that the package only reads, with the places of their f16 scales in a block (ggml-common.h)."""


def random_blocks(kind: str, shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """A matrix of random quantised values and like scales, whose numbers are about 0.05 large."""
    type_ = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[type_]
    rows, cols = shape
    data = rng.integers(0, 256, (rows * cols // block, size), np.uint8)

    def scaled(scale: float) -> np.ndarray:
        for at in SCALES[kind]:
            data[:, at : at + 2] = np.array([scale], "<f2").view(np.uint8)
        return data.reshape(rows, -1)

    large = gguf.quants.dequantize(scaled(1.0), type_).std()
    return scaled(0.05 / large)


def write_random(
    path: Path,
    kind: str,
    *,
    seed: int = 0,
    others: Mapping[str, str] = MappingProxyType({}),
    tied: bool = False,
    blocks: Mapping[str, np.ndarray] = MappingProxyType({}),
) -> Path:
    """A random Llama of one layer whose matrices are of one type; `others` are the types of some matrices,
    `blocks` their bytes. `tied`: it has no LM head of its own."""
    rng = np.random.default_rng(seed)
    hidden, inner, vocab, keys = 256, 512, 64, 128
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    matrices = {
        "token_embd": (vocab, hidden),
        "blk.0.attn_q": (hidden, hidden),
        "blk.0.attn_k": (keys, hidden),
        "blk.0.attn_v": (keys, hidden),
        "blk.0.attn_output": (hidden, hidden),
        "blk.0.ffn_gate": (inner, hidden),
        "blk.0.ffn_up": (inner, hidden),
        "blk.0.ffn_down": (hidden, inner),
        "output": (vocab, hidden),
    }
    if tied:
        del matrices["output"]
    for name, shape in matrices.items():
        type_ = gguf.GGMLQuantizationType[others.get(name, kind)]
        if name in blocks:
            data = blocks[name]
        elif type_.name in SCALES:
            data = random_blocks(type_.name, shape, rng)
        else:
            data = gguf.quants.quantize(rng.normal(0, 0.05, shape).astype(np.float32), type_)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=type_)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", rng.normal(1, 0.1, hidden).astype(np.float32))
    return finished(writer, path)


def rewritten(source: Path, target: Path, *, kind: str | None = None, parts: int = 1) -> list[Path]:
    """The same model in another file, its matrices as `kind` (default: as they are), or in several parts."""
    reader = gguf.GGUFReader(source)
    split = math.ceil(len(reader.tensors) / parts) if parts > 1 else 0
    arch = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(target, arch, split_max_tensors=split)
    for key, field in reader.fields.items():
        if not key.startswith(("GGUF.", "general.architecture")):
            writer.add_key_value(key, field.contents(), *field.types[:2])
    for tensor in reader.tensors:
        data, type_ = tensor.data, tensor.tensor_type
        if kind is not None and len(tensor.shape) > 1:
            values = gguf.quants.dequantize(data, type_).reshape(tensor.shape[::-1])
            type_ = gguf.GGMLQuantizationType[kind]
            data = gguf.quants.quantize(values, type_)
        writer.add_tensor(tensor.name, data, raw_dtype=type_)
    finished(writer, target)
    return sorted(target.parent.glob(f"{target.stem}-0*.gguf")) if split else [target]


def finished(writer: gguf.GGUFWriter, path: Path) -> Path:
    """Writes what was added."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
