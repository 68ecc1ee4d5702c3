"""The peer's side of bench/peers.py: runs in the peer's own environment, where llama_cpp is and shoal is not.

    python llama_cpp_worker.py quantise SOURCE.gguf TARGET.gguf Q8_0
    python llama_cpp_worker.py measure MODEL.gguf THREADS PROMPT GENERATED
    python llama_cpp_worker.py start MODEL.gguf TEXT THREADS CONTEXT

The second prints rows with the field names of llama-bench, as `shoal bench -o json` does; the third the
seconds that importing the bindings took, and the token that follows TEXT, or token ids if TEXT is empty.
Only the low-level bindings are used: one llama_decode a step, no sampling while speed is measured, so that
Python costs the peer next to nothing."""

from __future__ import annotations

import importlib
import json
import random
import sys
import time
from collections.abc import Sequence
from typing import Any

BATCH = 512
_WARM_TOKENS = 4


def quantise(source: str, target: str, kind: str) -> None:
    """Writes every matrix of a GGUF file as `kind`, head and embedding included."""
    lib = importlib.import_module("llama_cpp")
    params = lib.llama_model_quantize_default_params()
    params.ftype = getattr(lib, f"LLAMA_FTYPE_MOSTLY_{kind}")
    params.allow_requantize = params.pure = True
    params.output_tensor_type = params.token_embedding_type = getattr(lib, f"GGML_TYPE_{kind}")
    if lib.llama_model_quantize(source.encode(), target.encode(), params):
        raise RuntimeError(f"llama.cpp cannot write {source} as {kind}")


def measure(path: str, threads: int, prompt: int, generated: int) -> list[dict[str, Any]]:
    """One warm run of each test: tokens/s of a prompt in one go, and of tokens one by one, from an empty
    context."""
    lib = importlib.import_module("llama_cpp")
    model, context = _open(lib, path, threads, max(prompt, generated), max(prompt, BATCH))
    vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    draw = random.Random(0)

    def run(steps: int, rows: int) -> float:
        """Tokens/s of `steps` batches of `rows` tokens each, from an empty context."""
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        batches = [
            (lib.llama_token * rows)(*(draw.randrange(vocab) for _ in range(rows))) for _ in range(steps)
        ]
        start = time.perf_counter()
        for tokens in batches:
            if lib.llama_decode(context, lib.llama_batch_get_one(tokens, rows)):
                raise RuntimeError("llama.cpp cannot decode")
        lib.llama_synchronize(context)
        return steps * rows / (time.perf_counter() - start)

    rows = []
    for test, steps, size in ((f"pp{prompt}", 1, prompt), (f"tg{generated}", generated, 1)):
        if steps * size:
            run(min(steps, _WARM_TOKENS), size)
            rows.append({"test": test, "n_threads": threads, "avg_ts": run(steps, size)})
    return rows


def start(path: str, text: str, threads: int, size: int) -> dict[str, float]:
    """From nothing to the likeliest token after a text."""
    begin = time.perf_counter()
    lib = importlib.import_module("llama_cpp")
    imported = time.perf_counter() - begin
    model, context = _open(lib, path, threads, size, BATCH)
    tokens, count = (lib.llama_token * size)(1, 2, 3, 4), 4
    if text:
        raw = text.encode()
        vocab = lib.llama_model_get_vocab(model)
        count = lib.llama_tokenize(vocab, raw, len(raw), tokens, size, True, False)
    if count < 1 or lib.llama_decode(context, lib.llama_batch_get_one(tokens, count)):
        raise RuntimeError("llama.cpp cannot decode")
    sampler = lib.llama_sampler_init_greedy()
    return {"import_s": imported, "token": lib.llama_sampler_sample(sampler, context, -1)}


def _open(lib: Any, path: str, threads: int, size: int, batch: int) -> tuple[Any, Any]:
    """A model on the CPU, and a context of `size` tokens."""
    lib.llama_backend_init()
    model_params = lib.llama_model_default_params()
    model_params.n_gpu_layers = 0
    model = lib.llama_model_load_from_file(path.encode(), model_params)
    params = lib.llama_context_default_params()
    params.n_ctx = size
    params.n_batch = batch
    params.n_ubatch = BATCH
    params.n_threads = params.n_threads_batch = threads
    context = lib.llama_init_from_model(model, params) if model else None
    if not context:
        raise RuntimeError(f"llama.cpp cannot load {path}")
    return model, context


def main(arguments: Sequence[str]) -> int:
    match arguments:
        case ["quantise", source, target, kind]:
            quantise(source, target, kind)
        case ["measure", path, threads, prompt, generated]:
            print(json.dumps(measure(path, int(threads), int(prompt), int(generated))))
        case ["start", path, text, threads, size]:
            print(json.dumps(start(path, text, int(threads), int(size))))
        case _:
            print(__doc__, file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
