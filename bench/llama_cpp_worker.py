"""The peer's side of bench/peers.py: runs in the peer's own environment, where llama_cpp is and shoal is not.

    python llama_cpp_worker.py quantise SOURCE.gguf TARGET.gguf Q8_0
    python llama_cpp_worker.py measure MODEL.gguf THREADS PROMPT GENERATED

The second prints rows with the field names of llama-bench, as `shoal bench -o json` does. Only the low-level
bindings are used: one llama_decode a step, no sampling, so that Python costs the peer next to nothing."""

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
    if lib.llama_model_quantize(source.encode(), target.encode(), params):
        raise RuntimeError(f"llama.cpp cannot write {source} as {kind}")


def measure(path: str, threads: int, prompt: int, generated: int) -> list[dict[str, Any]]:
    """One warm run of each test: tokens/s of a prompt in one go, and of tokens one by one, from an empty
    context."""
    lib = importlib.import_module("llama_cpp")
    lib.llama_backend_init()
    model_params = lib.llama_model_default_params()
    model_params.n_gpu_layers = 0
    model = lib.llama_model_load_from_file(path.encode(), model_params)
    params = lib.llama_context_default_params()
    params.n_ctx = max(prompt, generated)
    params.n_batch = max(prompt, BATCH)
    params.n_ubatch = BATCH
    params.n_threads = params.n_threads_batch = threads
    context = lib.llama_init_from_model(model, params) if model else None
    if not context:
        raise RuntimeError(f"llama.cpp cannot load {path}")
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


def main(arguments: Sequence[str]) -> int:
    match arguments:
        case ["quantise", source, target, kind]:
            quantise(source, target, kind)
        case ["measure", path, threads, prompt, generated]:
            print(json.dumps(measure(path, int(threads), int(prompt), int(generated))))
        case _:
            print(__doc__, file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
