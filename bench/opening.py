"""The time to open a chain: from the first dial until it serves, with links measured, planned and loaded.

    python -m bench.opening [MODEL] [--nodes 3,10] [--against DIRECTORY]

The layers of each node are given, as even as possible; the planner runs as for `shoal run --nodes`. "first
token" is the time of a prompt of 8 tokens right after."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from bench.chain import Chain, chains, in_turns, opened, over, parser
from bench.rounds import Samples


def main(arguments: Sequence[str] | None = None) -> int:
    made = parser("opening", __doc__ or "")
    made.add_argument("--nodes", default="3,10", metavar="N,...", help="(default 3,10)")
    args = made.parse_args(arguments)
    counts = [int(n) for n in args.nodes.split(",")]
    model, checkouts = opened(args)
    samples = Samples()

    def measure(chain: Chain, number: int) -> None:
        for n in counts:
            found = chain.head(n, "open", context=64)
            samples.add(f"{over(n)}: opens, s", chain.checkout.name, number, found["open_s"])
            samples.add(f"{over(n)}: first token, ms", chain.checkout.name, number, found["first_s"] * 1e3)

    with chains(checkouts, model, max(counts)) as running:
        in_turns(args.rounds, [lambda number, chain=chain: measure(chain, number) for chain in running])
    print(f"\n{samples.report('this')}")
    samples.save(args.output, {"command": "bench.opening", "model_hash": model.hash})
    return 0


if __name__ == "__main__":
    sys.exit(main())
