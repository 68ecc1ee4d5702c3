"""Models of random numbers in the shape of real ones: for speed, where what the numbers are does not matter.

    python -m bench.models [llama-1.1b-random] [--dtype int8 int4] [--gguf]

Made once, under `bench-models/` of the cache directory: a checkpoint as Hugging Face lays it out, the model
directories that shoal runs, and a GGUF file of the same weights for other engines. The seed is fixed, so that
every machine makes the same weights. One matrix is in memory at a time."""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import string
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shoal.engine.checkpoint import Checkpoint, open_checkpoint
from shoal.engine.checkpoint.gguf_tokenizer import tokenizer_json
from shoal.engine.config import parse_config
from shoal.engine.convert import convert
from shoal.engine.decoder import Decoder
from shoal.engine.index import INDEX
from shoal.engine.safetensors_file import TensorInfo, write
from shoal.progress import Progress
from shoal.store import cache_directory, locked, resolve

SEED = 20260
_DEVIATION = 0.02  # of the weights, as models are initialised
_BYTES = 256
_CONTROL = ("<unk>", "<s>", "</s>")
UNKNOWN, BOS, EOS = range(3)


@dataclass(frozen=True, slots=True)
class Shape:
    """Counts that make a Llama; the table at the head and that at the foot are two."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    context: int = 4096

    @property
    def config(self) -> dict[str, Any]:
        """config.json."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "torch_dtype": "float16",
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocab,
            "max_position_embeddings": self.context,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
            "bos_token_id": BOS,
            "eos_token_id": EOS,
        }


SHAPES = {"llama-1.1b-random": Shape(2048, 5632, 22, 32, 4, 32000)}
"""Models that can be made, by name."""


def checkpoint(name: str) -> Path:
    """The Hugging Face directory of a model: f16, a file a layer. KeyError: no such name."""
    shape = SHAPES[name]
    return _once(_directory(name) / "checkpoint", lambda part: write_checkpoint(shape, part, name))


def gguf(name: str) -> Path:
    """The same weights as one GGUF file, matrices in F16."""
    source = checkpoint(name)
    return _once(_directory(name) / f"{name}.F16.gguf", lambda part: write_gguf(source, part))


def model(name: str, dtype: str = "int8") -> Path:
    """The same weights as a model directory of shoal."""
    source, target = checkpoint(name), _directory(name) / dtype
    with locked(f"{name}-{dtype}"):
        if not (target / INDEX).is_file():
            with Progress(f"converting {name} to {dtype}", unit="units") as bar:
                convert(source, target, dtype=dtype, origin=f"bench:{name}", progress=bar.update)
    return target


def model_path(name: str) -> Path:
    """A model directory by its name, or by SHAPE/TYPE one of these shapes, which is made if need be."""
    shape, _, dtype = name.partition("/")
    return model(shape, dtype) if shape in SHAPES else resolve(name)


def _directory(name: str) -> Path:
    return cache_directory() / "bench-models" / name


def _once(target: Path, make: Callable[[Path], None]) -> Path:
    """The target, made beside itself and renamed when it is whole."""
    with locked(f"bench-{target.parent.name}-{target.name}"):
        if target.exists():
            return target
        print(f"making {target}", file=sys.stderr, flush=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        directory = Path(tempfile.mkdtemp(suffix=".part", dir=target.parent))
        try:
            make(directory / target.name)
            (directory / target.name).rename(target)
        finally:
            shutil.rmtree(directory)
    return target


def write_checkpoint(shape: Shape, target: Path, name: str) -> None:
    """Writes the directory `target`."""
    target.mkdir()
    (target / "config.json").write_text(json.dumps(shape.config, indent=1) + "\n", encoding="utf-8")
    tokenizer = tokenizer_json({f"tokenizer.ggml.{k}": v for k, v in _vocabulary(shape.vocab).items()}, name)
    assert tokenizer is not None
    (target / "tokenizer.json").write_bytes(tokenizer)
    files = _files(Decoder.of(parse_config(shape.config, name)), shape.vocab)
    weight_map = {}
    seeds = itertools.count(SEED)
    for i, tensors in enumerate(files):
        file = f"model-{i + 1:05}-of-{len(files):05}.safetensors"
        weight_map.update(dict.fromkeys(tensors, file))
        infos = [TensorInfo(tensor, "F16", dims) for tensor, dims in tensors.items()]
        write(target / file, infos, (_random(info, shape.layers, next(seeds)) for info in infos))
    index = {"metadata": {}, "weight_map": weight_map}
    (target / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")


def _files(c: Decoder, vocab: int) -> list[dict[str, tuple[int, ...]]]:
    """Shapes of the tensors by name, file by file: the tables, then each layer."""
    queries, keys = c.heads * c.head_dim, c.kv_heads * c.head_dim
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm": (c.hidden,),
        "self_attn.q_proj": (queries, c.hidden),
        "self_attn.k_proj": (keys, c.hidden),
        "self_attn.v_proj": (keys, c.hidden),
        "self_attn.o_proj": (c.hidden, queries),
        "post_attention_layernorm": (c.hidden,),
        "mlp.gate_proj": (c.intermediate, c.hidden),
        "mlp.up_proj": (c.intermediate, c.hidden),
        "mlp.down_proj": (c.hidden, c.intermediate),
    }
    tables: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, c.hidden),
        "model.norm.weight": (c.hidden,),
        "lm_head.weight": (vocab, c.hidden),
    }
    layers = (
        {f"model.layers.{i}.{tensor}.weight": dims for tensor, dims in layer.items()} for i in range(c.layers)
    )
    return [tables, *layers]


def _random(info: TensorInfo, layers: int, seed: int) -> NDArray[np.float16]:
    """Norms near 1; matrices as before training: those that add to the residual stream are smaller."""
    values = np.random.default_rng(seed).standard_normal(info.shape, np.float32)
    if len(info.shape) == 1:
        return (1 + 0.1 * values).astype(np.float16)
    adds = info.name.endswith((".o_proj.weight", ".down_proj.weight"))
    values *= _DEVIATION / (2 * layers) ** 0.5 if adds else _DEVIATION
    return values.astype(np.float16)


def write_gguf(source: Path, target: Path) -> None:
    """Writes the checkpoint at `source` as a GGUF file of the architecture `llama`."""
    from gguf import MODEL_ARCH, GGUFWriter, get_tensor_name_map

    read = open_checkpoint(source)
    config = parse_config(read.config, str(source))
    c = Decoder.of(config)
    writer = GGUFWriter(target, "llama")
    writer.add_context_length(config.context)
    writer.add_embedding_length(c.hidden)
    writer.add_block_count(c.layers)
    writer.add_feed_forward_length(c.intermediate)
    writer.add_head_count(c.heads)
    writer.add_head_count_kv(c.kv_heads)
    writer.add_layer_norm_rms_eps(c.norm_epsilon)
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_rope_freq_base(c.rotation.theta)
    writer.add_vocab_size(config.vocab)
    vocabulary = _vocabulary(config.vocab)
    writer.add_tokenizer_model(vocabulary["model"])
    writer.add_token_list(vocabulary["tokens"])
    writer.add_token_scores(vocabulary["scores"])
    writer.add_token_types(vocabulary["token_type"])
    writer.add_unk_token_id(UNKNOWN)
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    tensors = [(tensor, dims) for file in _files(c, config.vocab) for tensor, dims in file.items()]
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, c.layers)
    for tensor, dims in tensors:
        kind = np.dtype(np.float32 if len(dims) == 1 else np.float16)
        size = int(np.prod(dims)) * kind.itemsize
        writer.add_tensor_info(names.get_name(tensor, (".weight",)), dims, kind, size)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for values in _gguf_tensors(read, c, [tensor for tensor, _ in tensors]):
        writer.write_tensor_data(values)
    writer.close()


def _gguf_tensors(source: Checkpoint, c: Decoder, names: Sequence[str]) -> Iterator[NDArray[Any]]:
    """In GGUF's order of rows: the two columns of a head that rotate together are neighbours."""
    for name in names:
        values: NDArray[Any] = source.tensor(name)
        if values.ndim > 1:
            values = values.astype(np.float16)
        if name.endswith((".q_proj.weight", ".k_proj.weight")):
            heads = c.heads if ".q_proj." in name else c.kv_heads
            values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        yield np.ascontiguousarray(values)


def _vocabulary(count: int) -> dict[str, Any]:
    """A SentencePiece vocabulary as GGUF spells it, of control tokens, bytes, and every short word, with and
    without a space before it: the fewer letters, the better its score. ValueError: `count` is too small or
    too large for it."""
    letters = ["", *string.ascii_lowercase]
    words = ["\u2581", *string.ascii_lowercase]
    for length in (1, 2, 3):
        spelled = ["".join(word) for word in itertools.product(letters[1:], repeat=length)]
        words += spelled if length > 1 else []
        words += ["\u2581" + word for word in spelled]
    first = len(_CONTROL) + _BYTES
    if not first + len(letters) <= count <= first + len(words):
        raise ValueError(
            f"a vocabulary has {first + len(letters)} to {first + len(words)} pieces, not {count}"
        )
    words = words[: count - first]
    return {
        "model": "llama",
        "tokens": [*_CONTROL, *(f"<0x{byte:02X}>" for byte in range(_BYTES)), *words],
        "scores": [*[0.0] * first, *(-float(rank) for rank in range(len(words)))],
        # 2: unknown, 3: control, 6: a byte, 1: a piece of text
        "token_type": [2, 3, 3, *[6] * _BYTES, *[1] * len(words)],
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "unknown_token_id": UNKNOWN,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Models made of random numbers in the shape of real ones.")
    parser.add_argument("name", nargs="?", choices=sorted(SHAPES), default="llama-1.1b-random")
    parser.add_argument("--dtype", nargs="*", default=["int8"], choices=("f32", "int8", "int4"))
    parser.add_argument("--gguf", action="store_true", help="a GGUF file too")
    args = parser.parse_args(arguments)
    for dtype in args.dtype:
        print(model(args.name, dtype))
    if args.gguf:
        print(gguf(args.name))
    return 0


if __name__ == "__main__":
    sys.exit(main())
