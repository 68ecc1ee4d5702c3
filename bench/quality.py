"""How far quantised weights are from f32, token by token: KL divergence, top-1 agreement, perplexity.

    python -m bench.quality [ROW ...] [--model smollm2-135m] [--positions 4096] [--window 512] [--threads 1]

A row is one of int8, int4, int4-head-int8, int4-min, int4-min-head-int8 (`shoal pull --dtype`, with
--head-dtype and --min), a type of llama.cpp (Q8_0, Q4_0), or a model directory; without rows all named ones
are run. The reference is the f32 model, by the `numpy` backend: the definition in floats. llama.cpp
requantises the same GGUF file (bench/engines.py); what its weights stand for is run by `numpy` in floats, so
that those rows show what its weights alone cost. Windows of the text are independent sequences, as is usual
for perplexity."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from bench.engines import LLAMA_CPP, environment, gguf, requantised
from bench.texts import enwiki
from numpy.typing import NDArray

from shoal.commands.pull import pull
from shoal.engine.arrays import F32
from shoal.engine.batch import Run, Sampling, Want
from shoal.engine.convert import convert
from shoal.engine.costs import tied_bytes, unit_cost
from shoal.engine.model_directory import Model
from shoal.engine.stage import Stage, StageOptions
from shoal.engine.tokenizer import Tokenizer
from shoal.store import cache_directory
from shoal.text_table import table

OURS: dict[str, tuple[str, str | None, bool]] = {
    "int8": ("int8", None, False),
    "int4": ("int4", None, False),
    "int4-head-int8": ("int4", "int8", False),
    "int4-min": ("int4", None, True),
    "int4-min-head-int8": ("int4", "int8", True),
}
"""Rows that shoal converts: type, type of the head, whether groups have minima."""
PEERS = ("Q8_0", "Q4_0")
PAIRS = (("int8", "Q8_0"), ("int4", "Q4_0"))
"""Rows of the same size, held against each other at the end."""

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

    @property
    def error(self) -> float:
        """Standard error of `perplexity_change`, from pairs of the same tokens."""
        return relative(self.nll, self.reference_nll)[1]

    def __str__(self) -> str:
        return (
            f"{len(self.kl)} positions: mean KL {self.mean_kl:.5f}, top-1 agreement {self.top1:.2%}, "
            f"perplexity {self.perplexity:.3f} against {self.reference_perplexity:.3f} "
            f"({self.perplexity_change:+.2%} +- {self.error:.2%}), "
            f"largest difference of a logit {self.max_difference:.3g}"
        )


def relative(nll: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """By how much the perplexity is above that of the other, and the standard error of that."""
    difference = np.array(nll) - np.array(other)
    return float(np.expm1(difference.mean())), float(difference.std(ddof=1) / np.sqrt(len(difference)))


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
    stage.open_sequence(0, Sampling(), len(tokens))
    chunk = min(stage.options.max_rows, stage.options.max_wanted)
    runs = [Run(0, at, tokens[at : at + chunk], Want.LOGITS) for at in range(0, len(tokens), chunk)]
    parts = [stage.run([run])[0].logits for run in runs]
    stage.close_sequence(0)
    return np.concatenate([part for part in parts if part is not None])


def text_tokens(tokenizer: Tokenizer, cache: Path, count: int) -> list[int]:
    """At least `count` tokens of the excerpt."""
    return tokenizer.encode(enwiki(cache, 8 * count))


def open_row(row: str, source: str, threads: int, directory: Path) -> Stage:
    """The model of a row, ready to run; `directory` is for files that only this run needs."""
    backend = "auto"
    if row in OURS:
        dtype, head_dtype, has_min = OURS[row]
        path = pull(source, dtype, head_dtype=head_dtype, has_min=has_min)
    elif row in PEERS:
        python = environment(cache_directory() / "peers" / LLAMA_CPP.replace("==", "-"), build=True)
        path, backend = directory / row, "numpy"
        convert(requantised(python, gguf(source), row), path, dtype="f32")
    else:
        path = Path(row)
    model = Model.open(path)
    options = StageOptions(backend=backend, threads=threads, max_wanted=256)
    return Stage(model, 0, model.n_units, options)


def report(rows: dict[str, Comparison], stages: dict[str, Stage]) -> str:
    """The table, and the pairs below it."""
    lines = []
    for row, compared in rows.items():
        model = stages[row].model
        size = sum(unit_cost(model, u).bytes for u in range(model.n_units)) - tied_bytes(model)
        lines.append(
            (
                row,
                "" if row in PEERS else f"{size / 1e6:.1f}",
                f"{compared.mean_kl:.4f}",
                f"{compared.top1:.2%}",
                f"{compared.perplexity:.3f}",
                f"{compared.perplexity_change:+.2%} ± {compared.error:.2%}",
                stages[row].backend,
                "" if row in PEERS else model.hash[:12],
            )
        )
    text = table(("weights", "MB", "mean KL", "top-1", "perplexity", "against f32", "backend", "hash"), lines)
    for ours, peer in PAIRS:
        if ours in rows and peer in rows:
            change, error = relative(rows[ours].nll, rows[peer].nll)
            text += f"\n{ours} against {peer}: perplexity {change:+.2%} ± {error:.2%}"
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("rows", nargs="*", metavar="ROW", default=[*OURS, *PEERS])
    parser.add_argument("--model", default="smollm2-135m", help="a name that can be pulled, or a .gguf file")
    parser.add_argument("--positions", type=int, default=4096)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(arguments)
    reference = Model.open(pull(args.model, "f32"))
    tokens = text_tokens(Tokenizer.open(reference.path), cache_directory() / "texts", args.positions)
    rows = {row: Comparison() for row in args.rows}
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        options = StageOptions(backend="numpy", max_wanted=256)
        exact = stack.enter_context(Stage(reference, 0, reference.n_units, options))
        stages = {
            row: stack.enter_context(open_row(row, args.model, args.threads, directory)) for row in rows
        }
        for window in windows(tokens, args.positions, args.window):
            logits = all_logits(exact, window)
            for row, compared in rows.items():
                compared.add(window, logits, all_logits(stages[row], window))
                print(f"{row}, {compared}", file=sys.stderr)
        one = next(iter(rows.values()))
        print(
            f"{len(one.kl)} positions; f32: perplexity {one.reference_perplexity:.3f}, {reference.hash[:12]}"
        )
        print(report(rows, stages))
    return 0


if __name__ == "__main__":
    sys.exit(main())
