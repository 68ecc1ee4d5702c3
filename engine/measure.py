"""Measures this device's rates for the planner, with the real kernels on the model's own layers.

Steps of one row give bytes/s, since decoding reads every weight once; steps of several rows give MAC/s;
steps at a long context give the cost of attention; and steps of the embedding alone give the overhead per
step. Steps after a pause give the extra cost of an idle device, whose clocks fall and threads sleep.

The embedding-only step is timed right after a step that reads many weights, so that the caches are cold, as
in a real chain. Timed back to back it is four times faster, and short stages would be predicted too
fast."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from .batch import Run, Sampling, Want
from .costs import unit_cost
from .dummy_weights import DummyModel, complete
from .model_directory import Model
from .stage import Stage, StageOptions

METHOD = 2  # another number when devices are measured in another way
_BYTES = 128_000_000  # bytes of layers to run: too many to stay in a cache between steps
_FEW = 4  # layers to run where computing dominates, not reading
READING_ROWS = (1, 2, 4, 8, 16)
COMPUTING_ROWS = (64, 256)
DEPTH = 512  # positions of context at which attention is measured
NAP_SECONDS = 0.004  # as long as a hop over Wi-Fi; pauses from 1 ms to 16 ms cost about the same
SAME = 1.03  # more threads must be at least this much faster


@dataclass(frozen=True, slots=True)
class DeviceMeasurements:
    """DeviceMeasurements rates of a device. Rates are in bytes/s and MAC/s, times in seconds."""

    backend: str
    exact: bool
    threads: int
    read_bytes_per_s: float
    """Weight bytes read per second in a step of one row."""
    macs_per_s: float
    """MAC/s of matmuls in a step of many rows."""
    row_rates: tuple[tuple[int, float], ...]
    """(rows of a call, MAC/s of its matmuls), ascending in rows."""
    attend_macs_per_s: float
    """MAC/s of attention in a step of one row."""
    prefill_attend_macs_per_s: float
    """MAC/s of attention in a step of many rows."""
    step_overhead_s: float
    """Time of a step outside its layers."""
    idle_overhead_s: float
    """Extra time of a step after a pause of NAP_SECONDS."""


Watch = Callable[[Callable[[], object]], float]
"""A function that runs a call and returns the seconds it took."""


def stopwatch(call: Callable[[], object]) -> float:
    """Runs a call; the wall-clock seconds it took."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(
    model: Model,
    options: StageOptions = StageOptions(),
    *,
    seconds: float = 0.5,
    room: int = _BYTES,
    watch: Watch = stopwatch,
) -> DeviceMeasurements:
    """Measures with layers of the model, with dummy weights where files are missing. Takes about
    `seconds` after loading them, or longer if a few steps take longer. Loads at most `room` bytes of layers,
    but at least one layer. `watch` times the steps; a device that imitates a slower one has its own.

    ValueError: the model has no layers."""
    first, count = layers_for(model, room)
    few = min(_FEW, count)
    if not complete(model, 0, 1) or not complete(model, first, first + count):
        model = DummyModel.open(model.path)
    share = seconds / (len(READING_ROWS) + len(COMPUTING_ROWS) + 8)
    with (
        Stage(
            model, 0, 1, replace(options, resident=False)
        ) as none,  # reads one row: the table is only mapped
        Stage(model, first, first + count, options) as many,
    ):
        reading, overhead, idle = _reading(many, none, (len(READING_ROWS) + 6) * share, watch)
        backend, exact, threads = many.backend, many.exact, many.threads
    with Stage(model, first, first + few, options) as small:
        computing = _by_rows(small, COMPUTING_ROWS, len(COMPUTING_ROWS) * share, watch)
        decode, prefill = _attend_rates(small, 2 * share, watch)
    overhead = min(overhead, reading[1] / 2)  # in a tiny model the layers may take less than the overhead
    rates = []
    for times, layers in ((reading, count), (computing, few)):
        macs = sum(unit_cost(model, u).macs for u in range(first, first + layers))
        rates += [(rows, macs * rows / max(t - overhead, t / 2)) for rows, t in times.items()]
    return DeviceMeasurements(
        backend=backend,
        exact=exact,
        threads=threads,
        read_bytes_per_s=_read_bytes(model, first, count) / (reading[1] - overhead),
        macs_per_s=rates[-1][1],
        row_rates=tuple(rates),
        attend_macs_per_s=decode or rates[-1][1],
        prefill_attend_macs_per_s=prefill or rates[-1][1],
        step_overhead_s=overhead,
        idle_overhead_s=idle,
    )


def best_threads(
    model: Model, options: StageOptions, most: int, *, seconds: float = 0.2
) -> tuple[int, dict[int, float]]:
    """The number of threads that decodes fastest among 1, 2, 4 … and `most`, and the bytes/s of each number
    tried. Of numbers within 3 %, the smallest. Using all cores is often slower than the big ones alone.

    ValueError: the model has no layers.
    """
    first, count = layers_for(model)
    found: dict[int, float] = {}
    best, threads = 1, 1
    while threads <= most:
        with Stage(model, first, first + count, replace(options, threads=threads)) as stage:
            (step,), _ = _rounds([(stage, 1, 0)], seconds, stopwatch)
            found[threads] = _read_bytes(model, first, count) / step
        if found[threads] > found[best] * SAME:
            best = threads
        threads = most if threads < most < 2 * threads else 2 * threads
    return best, found


def layers_for(model: Model, room: int = _BYTES) -> tuple[int, int]:
    """Unit of the first layer, and the number of layers from there on to measure with."""
    layers = [u for u in range(len(model.program.units)) if model.program.units[u].states]
    if not layers:
        raise ValueError("the model has no layers to measure with")
    return layers[0], max(1, min(len(layers), min(room, _BYTES) // unit_cost(model, layers[0]).bytes))


def _read_bytes(model: Model, first: int, count: int) -> int:
    return sum(unit_cost(model, u).read_bytes for u in range(first, first + count))


def _allowed(stage: Stage, rows: int) -> bool:
    return rows <= min(stage.options.max_rows, stage.model.config.context)


def median(values: Sequence[float]) -> float:
    """The median. `statistics` and `np.median` are not used, because they import `decimal` and `numpy.ma`,
    which cost a small device memory."""
    ascending = sorted(values)
    return (ascending[(len(ascending) - 1) // 2] + ascending[len(ascending) // 2]) / 2


def _values(count: int) -> NDArray[np.float32]:
    """Values with the spread of hidden rows. numpy.random is not used: importing it takes 3 MB of memory."""
    values: NDArray[np.float32] = np.sin(np.arange(count, dtype=np.float32) * np.float32(12.9898))
    return values * np.float32(2)


class _Steps:
    """A repeatable step of `rows` rows, on its own sequence with `depth` earlier positions. As a context
    manager it gives a function that runs the step and returns its seconds."""

    def __init__(self, stage: Stage, rows: int, watch: Watch, depth: int = 0, sequence: int = 0) -> None:
        width = stage.model.program.cut_cols
        values = _values(stage.options.max_rows * width).reshape(-1, width)
        self._stage, self._watch, self._sequence = stage, watch, sequence
        stage.open_sequence(sequence, Sampling(), depth + rows)
        at = 0
        while at <= depth:  # the last of these runs is the step itself, as a warm-up
            count = rows if at == depth else min(depth - at, stage.options.max_rows)
            hidden = None if stage.first == 0 else values[:count]
            run = Run(sequence, at, [0] * count, Want.NOTHING, hidden)
            stage.run([run])
            at += count
        self._run = run

    def __enter__(self) -> Callable[[], float]:
        return self._seconds

    def __exit__(self, *_: object) -> None:
        self._stage.close_sequence(self._sequence)

    def _seconds(self) -> float:
        return self._watch(lambda: self._stage.run([self._run]))


def _rounds(
    cases: Sequence[tuple[Stage, int, int]], seconds: float, watch: Watch, nap: float | None = None
) -> tuple[list[float], float]:
    """Median seconds of a step for each case (stage, rows, depth), and the median extra seconds of the first
    case after a pause of `nap` seconds (0 without `nap`). Cases are timed in turn, for about `seconds` and at
    least 5 times, so that heat and other programs affect all of them alike."""
    with ExitStack() as stack:
        steps = [
            stack.enter_context(_Steps(stage, rows, watch, depth, sequence))
            for sequence, (stage, rows, depth) in enumerate(cases)
        ]
        times: list[list[float]] = []
        more: list[float] = []
        until = time.perf_counter() + seconds
        while len(times) < 5 or time.perf_counter() < until:
            times.append([step() for step in steps])
            if nap is not None:
                time.sleep(nap)
                more.append(steps[0]() - steps[0]())
    return [median(each) for each in zip(*times, strict=True)], median(more or [0.0])


def _by_rows(stage: Stage, counts: Sequence[int], seconds: float, watch: Watch) -> dict[int, float]:
    """Median seconds of a step by number of rows, for the row counts that the stage allows."""
    allowed = [rows for rows in counts if _allowed(stage, rows)]
    times, _ = _rounds([(stage, rows, 0) for rows in allowed], seconds, watch) if allowed else ([], 0.0)
    return dict(zip(allowed, times, strict=True))


def _reading(
    stage: Stage, none: Stage, seconds: float, watch: Watch
) -> tuple[dict[int, float], float, float]:
    """Median seconds of a step by number of rows for READING_ROWS, of a step of `none` right after those,
    and the extra seconds of one row after a pause."""
    allowed = [rows for rows in READING_ROWS if _allowed(stage, rows)]
    cases = [*((stage, rows, 0) for rows in allowed), (none, 1, 0)]
    (*times, overhead), more = _rounds(cases, seconds, watch, NAP_SECONDS)
    return dict(zip(allowed, times, strict=True)), overhead, max(0.0, more)


def _attend_rates(stage: Stage, seconds: float, watch: Watch) -> tuple[float, float]:
    """MAC/s of attention in steps of one row and of many rows, from the extra time of a step at DEPTH
    positions (or as many as the context allows) compared with position 0. 0 where noise exceeds it."""
    rows = min(COMPUTING_ROWS[0], stage.options.max_rows, stage.model.config.context // 2)
    depth = min(DEPTH, stage.model.config.context - rows)
    macs = sum(unit_cost(stage.model, u).attend_macs for u in range(stage.first, stage.last))
    found = []
    for count in (1, rows):
        (full, empty), _ = _rounds([(stage, count, depth), (stage, count, 0)], 2 * seconds, watch)
        more = full - empty
        found.append(macs * count * depth / more if more > 0 else 0.0)
    return found[0], found[1]
