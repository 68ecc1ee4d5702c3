"""The peer's side of bench/peers.py: runs in the peer's own environment, where llama_cpp is and shoal is not.

    python llama_cpp_worker.py quantise SOURCE.gguf TARGET.gguf Q8_0
    python llama_cpp_worker.py measure MODEL.gguf THREADS PROMPT GENERATED
    python llama_cpp_worker.py start MODEL.gguf TEXT THREADS CONTEXT
    python llama_cpp_worker.py serve HOST:PORT THREADS
    python llama_cpp_worker.py rpc MODEL.gguf HOST:PORT,HOST:PORT UBATCH PROMPT GENERATED

The second prints rows with the field names of llama-bench, as `shoal bench -o json` does; the third the
seconds that importing the bindings took, and the token that follows TEXT, or token ids if TEXT is empty. The
fourth is an RPC server that computes on this CPU, and the last measures as the second does, with the layers
on such servers, in parts as even as llama.cpp makes them, and prompts in parts of UBATCH rows.
Only the low-level bindings are used: one llama_decode a step, no sampling while speed is measured, so that
Python costs the peer next to nothing."""

from __future__ import annotations

import ctypes
import importlib
import json
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

BATCH = 512
_WARM_TOKENS = 4
_ALL_LAYERS = 999
_CPU = 0  # GGML_BACKEND_DEVICE_TYPE_CPU


def quantise(source: str, target: str, kind: str) -> None:
    """Writes every matrix of a GGUF file as `kind`, head and embedding included."""
    lib = importlib.import_module("llama_cpp")
    params = lib.llama_model_quantize_default_params()
    params.ftype = getattr(lib, f"LLAMA_FTYPE_MOSTLY_{kind}")
    params.allow_requantize = params.pure = True
    params.output_tensor_type = params.token_embedding_type = getattr(lib, f"GGML_TYPE_{kind}")
    if lib.llama_model_quantize(source.encode(), target.encode(), params):
        raise RuntimeError(f"llama.cpp cannot write {source} as {kind}")


def measure(
    path: str, threads: int, prompt: int, generated: int, servers: Sequence[str] = (), ubatch: int = BATCH
) -> list[dict[str, Any]]:
    """One warm run of each test: tokens/s of a prompt in one go, and of tokens one by one, from an empty
    context."""
    lib = importlib.import_module("llama_cpp")
    if servers:
        _add_servers(lib, servers)
    size = max(prompt, generated)
    model, context = _open(lib, path, threads, size, max(prompt, BATCH), ubatch, remote=bool(servers))
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
            if servers:  # a token is needed before the next step, so steps must not overlap
                lib.llama_synchronize(context)
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


def serve(endpoint: str, threads: int) -> None:
    """An RPC server on this CPU, until the process is ended."""
    lib = importlib.import_module("llama_cpp")
    lib.llama_backend_init()
    ggml, rpc = _ggml(lib)
    ggml.ggml_backend_dev_by_type.restype = ctypes.c_void_p
    devices = (ctypes.c_void_p * 1)(ggml.ggml_backend_dev_by_type(_CPU))
    start = rpc.ggml_backend_rpc_start_server
    start.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_void_p]
    start(endpoint.encode(), None, threads, 1, devices)
    raise RuntimeError(f"llama.cpp cannot serve at {endpoint}")


def _add_servers(lib: Any, servers: Sequence[str]) -> None:
    """Makes the servers devices of this process."""
    ggml, rpc = _ggml(lib)
    rpc.ggml_backend_rpc_add_server.restype = ctypes.c_void_p
    ggml.ggml_backend_register.argtypes = [ctypes.c_void_p]
    for server in servers:
        registered = rpc.ggml_backend_rpc_add_server(server.encode())
        if not registered:
            raise RuntimeError(f"llama.cpp finds no device at {server}")
        ggml.ggml_backend_register(registered)


def _ggml(lib: Any) -> tuple[ctypes.CDLL, ctypes.CDLL]:
    """ggml and its part for RPC, which the bindings do not wrap. They are opened by the names under which
    they are loaded already, since the package has copies of its libraries under other names, and another copy
    would have another registry of devices. FileNotFoundError: it was built without RPC."""
    directory, found = Path(lib.__file__).parent / "lib", []
    for name in ("ggml", "ggml-rpc"):
        (soname, *_) = [*directory.glob(f"lib{name}.so.[0-9]"), None]
        if soname is None:
            raise FileNotFoundError(f"{directory} has no lib{name}: llama.cpp was built without RPC")
        found.append(ctypes.CDLL(soname.name))
    return found[0], found[1]


def _open(
    lib: Any, path: str, threads: int, size: int, batch: int, ubatch: int = BATCH, *, remote: bool = False
) -> tuple[Any, Any]:
    """A model on the CPU, or with all layers on the servers that were added, and a context of `size`
    tokens."""
    lib.llama_backend_init()
    model_params = lib.llama_model_default_params()
    model_params.n_gpu_layers = _ALL_LAYERS if remote else 0
    model = lib.llama_model_load_from_file(path.encode(), model_params)
    params = lib.llama_context_default_params()
    params.n_ctx = size
    params.n_batch = batch
    params.n_ubatch = ubatch
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
        case ["serve", endpoint, threads]:
            serve(endpoint, int(threads))
        case ["rpc", path, servers, ubatch, prompt, generated]:
            numbers = (int(prompt), int(generated), servers.split(","), int(ubatch))
            print(json.dumps(measure(path, 1, *numbers)))
        case _:
            print(__doc__, file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
