"""`shoal profile`: how fast this device runs a model's own layers, with the kernels that will run."""

from __future__ import annotations

import argparse
import platform

from .. import planner
from ..engine.measure import measure
from ..engine.shards import Model
from ..engine.stage import StageOptions
from ..planning import MB, device_profile
from ..store import resolve


def run(args: argparse.Namespace) -> int:
    """Measures and prints; `--json` prints what `shoal plan --devices FILE.json` reads."""
    model = Model.open(resolve(args.model))
    options = StageOptions(args.backend, args.isa, args.threads or 1, resident=args.resident)
    row = device_profile(platform.node() or "this device", measure(model, options))
    if args.json:
        print(planner.dump_profile(planner.Profile((row,))), end="")
        return 0
    print(f"{row.name}: {row.backend} ({row.isa}), {row.threads} thread{'s' if row.threads > 1 else ''}")
    print(f"one row:   {row.read_bytes_per_s / 1e9:.1f} GB/s of weights")
    print(f"many rows: {row.macs_per_s / 1e9:.1f} billion multiplications a second")
    print(f"a step:    {row.step_overhead_s * 1e6:.0f} us before any layer")
    print(f"RAM:       {row.ram_free / MB:.0f} MB free of {row.ram_total / MB:.0f} MB")
    return 0
