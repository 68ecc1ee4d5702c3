"""`shoal profile`: how fast this device runs a model's own layers, with the kernels that will run."""

from __future__ import annotations

import argparse
import platform

from ..device_files import DeviceProfile, device_profile, dump_profile
from ..engine.backends import choose
from ..engine.costs import unit_cost
from ..engine.errors import ShoalError
from ..engine.host import Ram, most_threads, ram
from ..engine.measure import best_threads, measure
from ..engine.model_directory import Model
from ..engine.stage import StageOptions
from ..engine.threads import keep
from ..planning import MB
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
    text = dump_profile((row,))
    if args.save is not None:
        try:
            args.save.write_text(text, encoding="utf-8")
        except OSError as error:
            raise ShoalError(f"{args.save} cannot be written: {error.strerror or error}") from error
    print(text if args.json else _shown(row, tried, memory), end="")
    return 0


def _shown(row: DeviceProfile, tried: dict[int, float], memory: Ram) -> str:
    device = row.device
    attention = device.attend_macs_per_s, device.prefill_attend_macs_per_s
    by_rows = ", ".join(f"{rows}: {rate / 1e9:.1f}" for rows, rate in device.row_rates)
    compared = ", ".join(f"{count}: {rate / 1e9:.1f}" for count, rate in tried.items())
    lines = [
        f"{device.name}: {row.backend} ({row.isa}), {row.threads} thread{'s' if row.threads > 1 else ''}"
        + (f" (GB/s by threads: {compared})" if len(tried) > 1 else ""),
        f"one row:   {device.read_bytes_per_s / 1e9:.1f} GB/s of weights",
        f"many rows: {device.macs_per_s / 1e9:.1f} billion multiplications a second (by rows: {by_rows})",
        f"attention: {attention[0] / 1e9:.1f} billion a second for one row, {attention[1] / 1e9:.1f} of many",
        f"a step:    {device.step_overhead_s * 1e6:.0f} us before any layer",
        f"a pause:   {device.idle_overhead_s * 1e6:.0f} us more for the step after it",
        f"RAM:       {row.ram_free / MB:.0f} MB available of the {row.ram_total / MB:.0f} MB {memory.bound}"
        + (" (a third of it, as the system does not say)" if memory.available is None else ""),
    ]
    return "\n".join(lines) + "\n"
