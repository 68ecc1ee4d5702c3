"""A million texts with Ray Data: a `shoal.LLM` in each worker process, on one machine or on a Ray cluster.

    pip install "ray[data]"
    python examples/ray_data.py smollm2-135m reviews.txt scores --workers 4 --threads 2

Scores each line of a file, or of all files of a directory, and writes Parquet files with the text, its tokens
and its log-probability. A text that does not fit the context has null in their place. Ray reads, divides,
retries and writes; all that is here of shoal is the class."""

from __future__ import annotations

import argparse
from typing import Any

import ray
import ray.data

import shoal


class Scorer:
    """One model in one worker. Ray makes it once and calls it with batches."""

    def __init__(self, model: str, threads: int) -> None:
        self.llm = shoal.LLM(model, threads=threads)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        texts = [str(text) for text in batch["text"]]
        fits = [2 <= self.llm.count(text) <= self.llm.context for text in texts]
        scores = iter(self.llm.score([text for text, good in zip(texts, fits, strict=True) if good]))
        each = [next(scores) if good else None for good in fits]
        return {
            "text": texts,
            "tokens": [score and len(score.tokens) for score in each],
            "logprob": [score and score.logprob for score in each],
        }


def main() -> None:
    parser = argparse.ArgumentParser(description="Score lines with Ray Data, a shoal.LLM per worker.")
    parser.add_argument("model", help="a name of `shoal ls`, or a path: the same on every machine")
    parser.add_argument("lines", help="a text file, or a directory of them")
    parser.add_argument("output", help="a directory for Parquet files")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of each worker")
    args = parser.parse_args()
    # The workers may take every CPU. Ray would wait for ever for one more, if it needed that to read lines.
    free = {"num_cpus": 0}
    blocks = 4 * args.workers  # so that every worker has some
    texts = ray.data.read_text(args.lines, override_num_blocks=blocks, ray_remote_args=free)
    scored = texts.map_batches(
        Scorer,
        fn_constructor_args=(args.model, args.threads),
        batch_size=32,
        concurrency=args.workers,
        num_cpus=args.threads,
    )
    scored.write_parquet(args.output, ray_remote_args=free)


if __name__ == "__main__":
    main()
