"""How far a model directory is from a reference, token by token: KL divergence, top-1 agreement, perplexity.

    python -m bench.quality REFERENCE MODEL [--positions 4096] [--window 512] [--backend auto]

REFERENCE is usually the f32 directory of the same checkpoint (run by the `numpy` backend, the definition in
floats), MODEL the int8 one. Windows of the text are independent sequences, as is usual for perplexity."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from bench.texts import enwiki
from numpy.typing import NDArray

from shoal.engine.batch import F32, Run, Sampling, Want
from shoal.engine.shards import Model
from shoal.engine.stage import Stage, StageOptions
from shoal.engine.tokenizer import Tokenizer
from shoal.store import cache_directory

Logits = NDArray[np.float32]


@dataclass
class Comparison:
    """Figures gathered window by window; rows of logits predict the token after them."""

    kl: list[float] = field(default_factory=list)
    agree: list[bool] = field(default_factory=list)
    nll: list[float] = field(default_factory=list)
    reference_nll: list[float] = field(default_factory=list)
    max_difference: float = 0.0

    def add(self, tokens: Sequence[int], reference: Logits, logits: Logits) -> None:
        """One window: its tokens `[n]` and both models' logits `[n, vocab]`."""
        p, q = _log_softmax(reference), _log_softmax(logits)
        self.kl += (np.exp(p) * (p - q)).sum(axis=1).tolist()
        self.agree += (reference.argmax(axis=1) == logits.argmax(axis=1)).tolist()
        following = np.asarray(tokens[1:])
        at = np.arange(len(following))
        self.nll += (-q[at, following]).tolist()
        self.reference_nll += (-p[at, following]).tolist()
        self.max_difference = max(self.max_difference, float(np.abs(reference - logits).max()))

    @property
    def mean_kl(self) -> float:
        return float(np.mean(self.kl))

    @property
    def top1(self) -> float:
        return float(np.mean(self.agree))

    @property
    def perplexity(self) -> float:
        return float(np.exp(np.mean(self.nll)))

    @property
    def reference_perplexity(self) -> float:
        return float(np.exp(np.mean(self.reference_nll)))

    @property
    def perplexity_change(self) -> float:
        """Relative: 0.005 is half a per cent worse than the reference."""
        return self.perplexity / self.reference_perplexity - 1

    def __str__(self) -> str:
        difference = np.array(self.nll) - np.array(self.reference_nll)
        error = float(difference.std() / np.sqrt(len(difference)))
        return (
            f"{len(self.kl)} positions: mean KL {self.mean_kl:.5f}, top-1 agreement {self.top1:.2%}, "
            f"perplexity {self.perplexity:.3f} against {self.reference_perplexity:.3f} "
            f"({self.perplexity_change:+.2%} +- {error:.2%}), "
            f"largest difference of a logit {self.max_difference:.3g}"
        )


def _log_softmax(logits: Logits) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    normal: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return normal


def windows(tokens: Sequence[int], positions: int, window: int) -> Iterator[Sequence[int]]:
    """Whole windows that cover at least `positions`. ValueError: the text is too short."""
    count = -(-positions // window)
    if len(tokens) < count * window:
        raise ValueError(f"the text has {len(tokens)} tokens, {count * window} are needed")
    return (tokens[i * window : (i + 1) * window] for i in range(count))


def all_logits(stage: Stage, tokens: Sequence[int]) -> F32:
    """Logits of every position of one window."""
    stage.open(0, Sampling(), len(tokens))
    chunk = min(stage.options.max_rows, stage.options.max_wanted)
    runs = [Run(0, at, tokens[at : at + chunk], Want.LOGITS) for at in range(0, len(tokens), chunk)]
    parts = [stage.run([run])[0].logits for run in runs]
    stage.close_sequence(0)
    return np.concatenate([part for part in parts if part is not None])


def text_tokens(tokenizer: Tokenizer, cache: Path, count: int) -> list[int]:
    """At least `count` tokens of the excerpt."""
    return tokenizer.encode(enwiki(cache, 8 * count))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("reference", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("--positions", type=int, default=4096)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(arguments)
    reference, model = Model.open(args.reference), Model.open(args.model)
    tokens = text_tokens(Tokenizer.open(args.model), cache_directory() / "texts", args.positions)
    compared = Comparison()
    first = StageOptions(backend="numpy", max_wanted=256)
    second = StageOptions(backend=args.backend, threads=args.threads, max_wanted=256)
    n = len(model.program.units)
    with Stage(reference, 0, n, first) as a, Stage(model, 0, n, second) as b:
        for window in windows(tokens, args.positions, args.window):
            compared.add(window, all_logits(a, window), all_logits(b, window))
            print(compared, file=sys.stderr)
        print(f"{model.dtype} on {b.backend}, model {model.hash[:12]}: {compared}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
