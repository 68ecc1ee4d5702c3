"""Explores all bounds, or those that are named, and looks for the seeded bugs.

python -m tests.explorer [NAME ...] [--list]
"""

from __future__ import annotations

import argparse
import sys
import time

import trio

from .bounds import LONG, WHOLE
from .mutations import MUTATIONS
from .search import explore
from .world import Distributed


async def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.explorer", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="bounds to explore, and no seeded bugs")
    parser.add_argument("--list", action="store_true", help="list the bounds")
    options = parser.parse_args()
    bounds = {**WHOLE, **LONG}
    if options.list:
        print("\n".join(bounds))
        return 0
    began, states, edges = time.monotonic(), 0, 0
    for name in options.names or WHOLE:
        report = explore(Distributed(bounds[name]))
        states, edges = states + report.states, edges + report.edges
        print(
            f"{name}: {report.states} states, {report.edges} steps, at most {report.depth} in a row, "
            f"{report.seconds:.1f} s",
            flush=True,
        )
        if report.found is not None:
            print(report.found)
            return 1
    print(f"{states} states, {edges} steps, {time.monotonic() - began:.0f} s: no violation", flush=True)
    missed = (
        [] if options.names else [mutation.change.__name__ for mutation in MUTATIONS if not mutation.found()]
    )
    if missed:
        print(f"seeded bugs that were not found: {', '.join(missed)}")
    elif not options.names:
        print(f"{len(MUTATIONS)} seeded bugs were found, {time.monotonic() - began:.0f} s in all")
    return bool(missed)


if __name__ == "__main__":
    sys.exit(trio.run(main))
