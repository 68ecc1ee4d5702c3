"""A prompt by transformers in bf16: runs where torch, transformers and gguf are, and shoal need not be.

    python torch_worker.py SOURCE THREADS PROMPT

SOURCE is a checkpoint directory, or a GGUF file. Prints a row with the field names of llama-bench."""

from __future__ import annotations

import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any


def measure(source: Path, threads: int, prompt: int) -> list[dict[str, Any]]:
    """Tokens/s of a prompt in one go, warm: the logits of the last token only, as for an answer."""
    torch = importlib.import_module("torch")
    transformers = importlib.import_module("transformers")
    torch.set_num_threads(threads)
    where: dict[str, Any] = {"pretrained_model_name_or_path": str(source)}
    if source.is_file():
        where = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    model = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.bfloat16).eval()
    torch.manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, (1, prompt))
    with torch.inference_mode():
        for _ in range(2):  # the first warms up
            start = time.perf_counter()
            model(tokens, logits_to_keep=1)
            seconds = time.perf_counter() - start
    return [{"test": f"pp{prompt}", "n_threads": threads, "avg_ts": prompt / seconds}]


if __name__ == "__main__":
    print(json.dumps(measure(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
