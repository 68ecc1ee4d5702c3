"""Changes inputs at random, for all targets or some: python -m tests.fuzz --count 10000000."""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
import warnings
from pathlib import Path

from .runs import Explorer, keep, keep_reached
from .target import shares
from .targets import targets

_MORE_BYTES = 1 << 30
"""What all inputs together may map beyond what is mapped at the beginning."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="TARGET")
    parser.add_argument("--count", type=int, default=1_000_000, help="inputs in all (default: a million)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", action="store_true", help="keep inputs that reach a line first")
    parser.add_argument("--left", action="store_true", help="print the lines that no input has reached")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="shoal-fuzz-") as place:
        found = {
            name: target for name, target in targets(Path(place)).items() if name in (options.names or [name])
        }
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        most = pages * resource.getpagesize() + _MORE_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        warnings.simplefilter("error")  # what a stranger sends writes nothing to the terminal
        failed = False
        for name, count in shares(found, options.count).items():
            explorer, began = Explorer(name, found[name], options.seed), time.process_time()
            bad = explorer.run(count)
            took = max(time.process_time() - began, 1e-3)
            run, lines = explorer.lines.share()
            print(
                f"{name}: {count} inputs, {took:.0f} s, {count / took:.0f}/s, {run} of {lines} lines, "
                f"{len(explorer.reached)} new ones",
                flush=True,
            )
            if options.keep:
                keep_reached(name, explorer.reached)
            if options.left:
                print("\n".join(f"    {file}: {lines}" for file, lines in explorer.lines.left().items()))
            if bad is not None:
                print(f"    {bad.how}\n    kept in {keep(name, bad)}", flush=True)
                failed = True
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
