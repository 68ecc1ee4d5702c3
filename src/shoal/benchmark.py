"""Measures tokens/s of a whole model on this device, for `shoal bench`: cases, times, bytes read and MACs.

What each figure means: docs/performance.md.
"""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from .engine.batch import Run, Sampling, Want
from .engine.costs import constant_bytes, tied_bytes, unit_cost
from .engine.errors import ContextError, ShoalError
from .engine.generate import prompt_runs
from .engine.model_directory import Model
from .engine.stage import Stage, StageOptions
from .peaks import peaks_of

_SECOND = 1_000_000_000  # nanoseconds: times are counted in them, as llama-bench does
_WARM_TOKENS = 4


class Ceilings(Protocol):
    """The peak speeds that a measurement is compared with, such as peaks.Peaks."""

    def bytes_per_s(self) -> float | None: ...
    def macs_per_s(self) -> float | None: ...


@dataclass(frozen=True, slots=True)
class Case:
    """One test: a prompt of `prompt` tokens, or `generated` tokens of each of `sequences` concurrent
    sequences."""

    threads: int
    depth: int
    prompt: int
    generated: int
    sequences: int

    @property
    def name(self) -> str:
        test = f"pp{self.prompt}" if self.prompt else f"tg{self.generated}"
        return f"{test} @ d{self.depth}" if self.depth else test

    @property
    def tokens(self) -> int:
        """Tokens of one repetition, of all sequences together."""
        return self.prompt or self.generated * self.sequences

    @property
    def context(self) -> int:
        """Positions that a sequence has at the end."""
        return self.depth + (self.prompt or self.generated)


@dataclass(frozen=True, slots=True)
class Row:
    """The measurement of a case: first llama-bench's fields under its names, then ours."""

    model_filename: str
    model_type: str
    model_size: int
    model_n_params: int
    backends: str
    n_ubatch: int
    n_threads: int
    n_prompt: int
    n_gen: int
    n_depth: int
    test_time: str
    avg_ns: int
    stddev_ns: int
    avg_ts: float
    stddev_ts: float
    samples_ns: tuple[int, ...]
    samples_ts: tuple[float, ...]
    test: str
    isa: str
    n_sequences: int
    read_bytes_per_s: float | None
    """Weights, keys and values that decoding reads. None for a prompt, which is limited by computing."""
    loop_bytes_per_s: float | None
    """Peak speed of reading the same memory: the median of one measurement before each repetition. None for a
    prompt, and without the C library."""
    macs_per_s: float
    """Multiply-accumulates of the matmuls; attention is not counted."""
    peak_macs_per_s: float | None
    """Peak of the instruction set's dot products in registers: the median of one measurement before each
    repetition. None for decoding, and if the instruction set has no such loop."""
    load_ns: int
    """Time from the path to the first token of the stage that ran the case."""
    peak_rss: int
    """Highest RAM of the process until the end of the case, in bytes."""
    model_hash: str


def all_cases(
    threads: Sequence[int],
    depths: Sequence[int],
    prompts: Sequence[int],
    generated: Sequence[int],
    sequences: Sequence[int],
) -> list[Case]:
    """All combinations, by threads, then by depth, prompts first. ShoalError: there is none."""
    cases = []
    for t in threads:
        for d in depths:
            cases += [Case(t, d, p, 0, 1) for p in prompts if p]
            cases += [Case(t, d, 0, n, s) for n in generated if n for s in sequences]
    if not cases:
        raise ShoalError("nothing to measure: give -p or -n a number above 0")
    return cases


def check(cases: Sequence[Case], model: Model) -> None:
    """Checks the cases before the long work. ContextError: a case exceeds the model's context."""
    for case in cases:
        if case.context > model.config.context:
            raise ContextError(
                f"{case.name} needs a context of {case.context} tokens and the model's is "
                f"{model.config.context}{model.config.limit}: lower -p, -n or -d"
            )


def measure(
    path: Path, cases: Sequence[Case], repetitions: int, backend: str, isa: str, resident: bool | None = None
) -> Iterator[Row]:
    """Measures the cases in order, on a newly opened stage for each number of threads."""
    most = max(case.sequences for case in cases)
    for threads in dict.fromkeys(case.threads for case in cases):
        options = StageOptions(
            backend,
            isa,
            threads,
            max_rows=max(StageOptions().max_rows, most),
            max_wanted=max(StageOptions().max_wanted, most),
            resident=resident,
        )
        yield from _on_one_stage(path, [c for c in cases if c.threads == threads], repetitions, options)


def _on_one_stage(
    path: Path, cases: Sequence[Case], repetitions: int, options: StageOptions
) -> Iterator[Row]:
    """A separate function, so that the weights are freed before the next stage is opened."""
    start = time.perf_counter_ns()
    model = Model.open(path)
    with Stage(model, 0, model.n_units, options) as stage:
        stage.open_sequence(0, Sampling(), 1)
        stage.run([Run(0, 0, [0], Want.TOKEN)])
        load = time.perf_counter_ns() - start
        stage.close_sequence(0)
        with peaks_of(stage) as peaks:
            for case in cases:
                yield _row(stage, case, repetitions, peaks, load)


def _row(stage: Stage, case: Case, repetitions: int, ceilings: Ceilings, load: int) -> Row:
    model = stage.model
    samples, peaks = time_case(stage, case, repetitions, ceilings)
    peak = statistics.median(peaks) if peaks else None
    seconds = statistics.fmean(samples) / _SECOND
    macs, read = work(model, case)
    backend, _, isa = stage.backend.partition(" ")
    return Row(
        **figures(model, case, samples),
        backends=backend,
        n_ubatch=stage.options.max_rows,
        n_threads=case.threads,
        isa=isa.strip("()") or backend,
        read_bytes_per_s=read / seconds if case.generated else None,
        loop_bytes_per_s=peak if case.generated else None,
        macs_per_s=macs / seconds,
        peak_macs_per_s=peak if case.prompt else None,
        load_ns=load,
        peak_rss=peak_rss(),
    )


def figures(model: Model, case: Case, samples: Sequence[int]) -> dict[str, Any]:
    """The fields of a row that follow from the model, the case and the repetitions' nanoseconds, whoever ran
    them."""
    speeds = [case.tokens * _SECOND / sample for sample in samples]
    return {
        "model_filename": str(model.path),
        "model_type": f"{model.path.resolve().name} {model.dtype}",
        "model_size": sum(unit_cost(model, u).bytes for u in range(model.n_units))
        - tied_bytes(model)
        + constant_bytes(model.program),
        "model_n_params": parameters(model),
        "n_prompt": case.prompt,
        "n_gen": case.generated,
        "n_depth": case.depth,
        "test_time": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "avg_ns": round(statistics.fmean(samples)),
        "stddev_ns": round(_deviation(samples)),
        "avg_ts": statistics.fmean(speeds),
        "stddev_ts": _deviation(speeds),
        "samples_ns": tuple(samples),
        "samples_ts": tuple(speeds),
        "test": case.name,
        "n_sequences": case.sequences,
        "model_hash": model.hash,
    }


def time_case(
    stage: Stage, case: Case, repetitions: int, ceilings: Ceilings
) -> tuple[list[int], list[float]]:
    """Nanoseconds of each repetition, and the peak speed measured just before it: bytes/s of reading if the
    case decodes, MACs/s for a prompt. There are no peaks if the ceilings have no figure.

    The context is filled to its depth once, untimed, and the case is warmed up; each repetition starts from
    that depth."""
    random = np.random.default_rng(0)
    samples: list[int] = []
    peaks: list[float] = []
    step = _prompt if case.prompt else _generate
    for sequence in range(case.sequences):
        stage.open_sequence(sequence, Sampling(), case.context)
    try:
        for sequence in range(case.sequences):
            _fill(stage, sequence, 0, random_tokens(stage.model, case.depth, random))
        step(stage, warm_up(case), random)
        for _ in range(repetitions):
            peak = ceilings.bytes_per_s() if case.generated else ceilings.macs_per_s()
            if peak is not None:
                peaks.append(peak)
            start = time.perf_counter_ns()
            step(stage, case, random)
            samples.append(time.perf_counter_ns() - start)
    finally:
        for sequence in range(case.sequences):
            stage.close_sequence(sequence)
    return samples, peaks


def warm_up(case: Case) -> Case:
    """The case that is run once, untimed: the whole prompt, or a few tokens."""
    return replace(case, generated=min(_WARM_TOKENS, case.generated))


def _prompt(stage: Stage, case: Case, random: np.random.Generator) -> None:
    _fill(stage, 0, case.depth, random_tokens(stage.model, case.prompt, random))


def _fill(stage: Stage, sequence: int, first: int, tokens: list[int]) -> None:
    for run in prompt_runs(sequence, first, tokens, stage.options.max_rows):
        stage.run([run])


def _generate(stage: Stage, case: Case, random: np.random.Generator) -> None:
    """Generates tokens one by one, greedily. Every sequence starts with a random token."""
    tokens = random_tokens(stage.model, case.sequences, random)
    for position in range(case.depth, case.depth + case.generated):
        results = stage.run([Run(s, position, [token], Want.TOKEN) for s, token in enumerate(tokens)])
        tokens = [result.token for result in results if result.token is not None]


def random_tokens(model: Model, count: int, random: np.random.Generator) -> list[int]:
    """Token ids of the model's vocabulary."""
    return [int(token) for token in random.integers(0, model.program.vocab, count)]


def work(model: Model, case: Case) -> tuple[int, int]:
    """(multiply-accumulates of the matmuls, bytes of weights, keys and values read) of one repetition.

    The LM head is computed for rows that draw a token: the last row of a prompt, and every generated one.
    Decoding reads every weight once a step for all sequences; the bytes of a prompt are given as 0."""
    *body, last = [unit_cost(model, u) for u in range(model.n_units)]
    drawn = case.generated * case.sequences or 1
    macs = case.tokens * sum(cost.macs for cost in body) + drawn * last.macs
    if case.prompt:
        return macs, 0
    weights = case.generated * sum(cost.read_bytes for cost in (*body, last))
    positions = sum(range(case.depth + 1, case.context + 1))
    state = positions * sum(cost.kv_bytes_per_token for cost in body)
    return macs, weights + case.sequences * state


def parameters(model: Model) -> int:
    """Number of weights of the model. Those that units share are counted once."""
    return sum(
        weight.rows * weight.cols
        for unit in model.program.units
        for weight in unit.weights
        if weight.name not in unit.tied
    )


def peak_rss() -> int:
    """The most RAM that this process has used, in bytes, with pages of mapped files."""
    try:
        with open("/proc/self/status", encoding="ascii") as lines:
            for line in lines:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except FileNotFoundError:  # not Linux
        pass
    # On Linux a process inherits this figure from its parent, so /proc is preferred.
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def _deviation(values: Sequence[float]) -> float:
    """Standard deviation of a sample, and 0 for a single value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0
