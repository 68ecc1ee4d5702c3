"""Measures this device with the real kernels on the model's own layers: what the planner is told is what
runs.

A one-row batch gives bytes/s (decode reads every weight once), a batch of many rows gives MAC/s (prefill),
and a stage that only looks up an embedding gives what a step costs before any layer."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, replace

import numpy as np

from .batch import Run, Sampling, Want
from .costs import unit_cost
from .memory import ram
from .shards import Model
from .stage import Stage, StageOptions

_BYTES = 64_000_000  # of layers, so that weights do not stay in a cache between steps
_PREFILL_ROWS = 64


@dataclass(frozen=True, slots=True)
class Measured:
    """A device as measured: bytes/s of weights at one row, MAC/s at many, seconds per step outside the
    layers."""

    backend: str
    exact: bool
    threads: int
    read_bytes_per_s: float
    macs_per_s: float
    step_overhead_s: float
    ram_total: int
    ram_free: int


def measure(
    model: Model, options: StageOptions = StageOptions(), *, seconds: float = 0.5, room: int = _BYTES
) -> Measured:
    """Measures with the layers that are on this device; takes about `seconds` after loading them. Their
    weights take at most `room` bytes, as far as one layer does.

    ValueError: the model has no layers.
    """
    layers = [u for u in range(len(model.program.units)) if model.program.units[u].states]
    if not layers:
        raise ValueError("the model has no layers to measure with")
    first = layers[0]
    count = max(1, min(len(layers), min(room, _BYTES) // unit_cost(model, first).bytes))
    rows = min(_PREFILL_ROWS, options.max_rows)
    with Stage(model, 0, 1, replace(options, resident=False)) as none:  # one row of a table: never all of it
        overhead = _step_seconds(none, 1, seconds / 4)
    with Stage(model, first, first + count, options) as many:
        many_s = _step_seconds(many, 1, seconds / 2)
        prefill_s = _step_seconds(many, rows, seconds / 4)
        backend, exact = many.backend, many.exact
    costs = [unit_cost(model, u) for u in range(first, first + count)]
    read, macs = sum(c.read_bytes for c in costs), sum(c.macs for c in costs)
    overhead = min(overhead, many_s / 2)  # of a model so small that the layers cost nothing beside it
    total, free = ram()
    return Measured(
        backend=backend,
        exact=exact,
        threads=options.threads,
        read_bytes_per_s=read / (many_s - overhead),
        macs_per_s=macs * rows / max(prefill_s - overhead, prefill_s / 2),
        step_overhead_s=overhead,
        ram_total=total,
        ram_free=free,
    )


def _step_seconds(stage: Stage, rows: int, seconds: float) -> float:
    """Median time of a step of `rows` rows, over about `seconds` and at least 5 steps, after one to warm
    up."""
    width = stage.model.program.buffer(stage.model.program.cut[0]).cols
    hidden = np.random.default_rng(0).standard_normal((rows, width)).astype(np.float32)
    run = Run(0, 0, [0] * rows, Want.NOTHING, None if stage.first == 0 else hidden)
    stage.open(0, Sampling(), max(rows, 1))
    times: list[float] = []
    stage.run([run])
    until = time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < until:
        start = time.perf_counter()
        stage.run([run])
        times.append(time.perf_counter() - start)
    stage.close_sequence(0)
    return statistics.median(times)
