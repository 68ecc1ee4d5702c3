"""Changes inputs at random, for all targets or some: python -m tests.fuzz --count 10000000."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from .runs import explore, keep
from .target import shares
from .targets import targets


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="TARGET")
    parser.add_argument("--count", type=int, default=1_000_000, help="inputs in all (default: a million)")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="shoal-fuzz-") as place:
        found = {
            name: target for name, target in targets(Path(place)).items() if name in (options.names or [name])
        }
        failed = False
        for name, count in shares(found, options.count).items():
            began, bad = time.monotonic(), explore(name, found[name], count, options.seed)
            print(f"{name}: {count} inputs, {time.monotonic() - began:.0f} s", flush=True)
            if bad is not None:
                print(f"    {bad.how}\n    kept in {keep(name, bad)}", flush=True)
                failed = True
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
