"""`shoal profile`: measures how fast this device runs a model's own layers, with the kernels that will run
them."""

from __future__ import annotations

import argparse
import platform
from pathlib import Path
from typing import TYPE_CHECKING

from ..arguments import Commands, add_command, add_engine, add_json, add_model
from ..imports import quick_imports

if TYPE_CHECKING:
    from ..device_files import DeviceProfile
    from ..engine.host import Ram

_TELLING = 16_000_000
"""Bytes of weights. A smaller model fits in CPU caches, so its best number of threads says nothing about
others."""


def add_parser(commands: Commands) -> None:
    parser = add_command(
        commands,
        "profile",
        "measure how fast this device runs a model",
        "Without --threads it also finds the fastest number of threads, which `shoal run` and `shoal node` "
        "use from then on.",
    )
    add_model(parser)
    add_engine(parser)
    parser.add_argument(
        "--save", type=Path, metavar="FILE", help="write the profile as JSON, for `shoal plan --devices FILE`"
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Measures this device and prints its profile; --json and --save give what `shoal plan --devices`
    reads."""
    with quick_imports():
        from ..device_files import device_profile, dump_profile
        from ..engine.backends import choose
        from ..engine.costs import unit_cost
        from ..engine.host import most_threads, ram
        from ..engine.measure import best_threads, measure
        from ..engine.model_directory import Model
        from ..engine.stage import StageOptions
        from ..engine.threads import keep
        from ..store import resolve
        from ..streams import write_output

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
        write_output(args.save, text)
    print(text if args.json else _shown(row, tried, memory), end="")
    return 0


def _shown(row: DeviceProfile, tried: dict[int, float], memory: Ram) -> str:
    from ..planning import MB

    device = row.device
    attention = device.attend_macs_per_s, device.prefill_attend_macs_per_s
    by_rows = ", ".join(f"{rows}: {rate / 1e9:.1f}" for rows, rate in device.row_rates)
    compared = ", ".join(f"{count}: {rate / 1e9:.1f}" for count, rate in tried.items())
    lines = [
        f"{device.name}: {row.backend} ({row.isa}), {row.threads} thread{'s' if row.threads > 1 else ''}"
        + (f" (GB/s by threads: {compared})" if len(tried) > 1 else ""),
        f"one row:   {device.read_bytes_per_s / 1e9:.1f} GB/s of weights",
        f"many rows: {device.macs_per_s / 1e9:.1f} GMAC/s (by rows: {by_rows})",
        f"attention: {attention[0] / 1e9:.1f} GMAC/s for one row, {attention[1] / 1e9:.1f} for many",
        f"step:      {device.step_overhead_s * 1e6:.0f} us of overhead in every step",
        f"pause:     {device.idle_overhead_s * 1e6:.0f} us more in the first step after a pause",
        f"RAM:       {row.ram_free / MB:.0f} MB available of the {row.ram_total / MB:.0f} MB {memory.bound}"
        + (" (the system does not say; a third of the total is assumed)" if memory.available is None else ""),
    ]
    return "\n".join(lines) + "\n"
