"""`shoal profile`: how fast this device runs a model's own layers, with the kernels that will run."""

from __future__ import annotations

import argparse
import platform

from .. import planner
from ..engine.backends import choose
from ..engine.costs import unit_cost
from ..engine.errors import ShoalError
from ..engine.host import Ram, most_threads, ram
from ..engine.measure import best_threads, measure
from ..engine.shards import Model
from ..engine.stage import StageOptions
from ..engine.threads import keep
from ..planning import MB, device_profile
from ..store import resolve

_TELLING = 16_000_000
"""Bytes of weights: of a model with fewer, which caches hold, the best number of threads is its own."""


def run(args: argparse.Namespace) -> int:
    """Measures and prints, at the best thread count unless one is given (`run` and `node` take it from then
    on); `--json` prints and `--save` writes what `shoal plan --devices FILE.json` reads."""
    model = Model.open(resolve(args.model))
    options = StageOptions(args.backend, args.isa, args.threads, resident=args.resident)
    tried: dict[int, float] = {}
    threads = args.threads
    if threads is None:
        threads, tried = best_threads(model, options, most_threads())
        if sum(unit_cost(model, u).read_bytes for u in range(model.n_units)) >= _TELLING:
            keep(threads, choose(args.backend)[0], args.isa)
    options = StageOptions(args.backend, args.isa, threads, resident=args.resident)
    memory = ram()
    row = device_profile(platform.node() or "this device", measure(model, options), memory)
    text = planner.dump_profile(planner.Profile((row,)))
    if args.save is not None:
        try:
            args.save.write_text(text, encoding="utf-8")
        except OSError as error:
            raise ShoalError(f"{args.save} cannot be written: {error.strerror or error}") from error
    print(text if args.json else _shown(row, tried, memory), end="")
    return 0


def _shown(row: planner.DeviceProfile, tried: dict[int, float], memory: Ram) -> str:
    attention = row.attend_macs_per_s or 0.0, row.prefill_attend_macs_per_s or 0.0
    by_rows = ", ".join(f"{rows}: {rate / 1e9:.1f}" for rows, rate in row.row_rates)
    compared = ", ".join(f"{count}: {rate / 1e9:.1f}" for count, rate in tried.items())
    lines = [
        f"{row.name}: {row.backend} ({row.isa}), {row.threads} thread{'s' if row.threads > 1 else ''}"
        + (f" (GB/s by threads: {compared})" if len(tried) > 1 else ""),
        f"one row:   {row.read_bytes_per_s / 1e9:.1f} GB/s of weights",
        f"many rows: {row.macs_per_s / 1e9:.1f} billion multiplications a second (by rows: {by_rows})",
        f"attention: {attention[0] / 1e9:.1f} billion a second for one row, {attention[1] / 1e9:.1f} of many",
        f"a step:    {row.step_overhead_s * 1e6:.0f} us before any layer",
        f"a pause:   {row.idle_overhead_s * 1e6:.0f} us more for the step after it",
        f"RAM:       {row.ram_free / MB:.0f} MB available of the {row.ram_total / MB:.0f} MB {memory.bound}"
        + (" (a third of it, as the system does not say)" if memory.available is None else ""),
    ]
    return "\n".join(lines) + "\n"
