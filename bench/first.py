"""The speed of a prompt until its first token, over chains of nodes and in one process on one core:

    python -m bench.first [MODEL] [--nodes 1,2,3] [--lengths 512,1500] [--against DIRECTORY]

Each prompt runs twice on an idle chain, in sessions of their own, and the second time counts."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from bench.chain import Answer, Chain, alone, chains, in_turns, opened, over, parser, same
from bench.rounds import Samples


def main(arguments: Sequence[str] | None = None) -> int:
    made = parser("first", __doc__ or "")
    made.add_argument("--nodes", default="1,2,3", metavar="N,...", help="(default 1,2,3)")
    made.add_argument("--lengths", default="512,1500", metavar="N,...", help="tokens (default 512,1500)")
    args = made.parse_args(arguments)
    counts, lengths = ([int(n) for n in text.split(",")] for text in (args.nodes, args.lengths))
    model, checkouts = opened(args)
    samples = Samples()
    expected = alone(checkouts[0], model, "first", lengths=lengths)["tokens"]

    def add(name: str, number: int, n: int, found: Answer) -> None:
        same(expected, found["tokens"])
        for length, seconds in zip(lengths, found["seconds"], strict=True):
            samples.add(f"{over(n)}: a prompt of {length}, tokens/s", name, number, length / seconds)

    def one_process(number: int) -> None:
        found = alone(checkouts[0], model, "first", lengths=lengths)
        for n in counts:
            add("one process", number, n, found)

    def measure(chain: Chain, number: int) -> None:
        for n in counts:
            found = chain.head(n, "first", lengths=lengths, context=max(lengths) + 1)
            add(chain.checkout.name, number, n, found)
            for length, rows in zip(lengths, found["rows"], strict=True):
                figure = f"{over(n)}: a prompt of {length}, rows a call"
                samples.add(figure, chain.checkout.name, number, rows)

    with chains(checkouts, model, max(counts)) as running:
        turns = [lambda number, chain=chain: measure(chain, number) for chain in running]
        in_turns(args.rounds, [one_process, *turns])
    print(f"\n{samples.report('this')}")
    samples.save(args.output, {"command": "bench.first", "model_hash": model.hash})
    return 0


if __name__ == "__main__":
    sys.exit(main())
