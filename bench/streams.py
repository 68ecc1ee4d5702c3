"""Tokens/s of several streams over a chain of nodes, beside the best that one process' batches allow:

    python -m bench.streams [MODEL] [--nodes 1,2,3] [--streams 1,2,4,8,16] [--against DIRECTORY]

t(r) is the seconds of a step of r sequences, measured in one process on one core, as `shoal bench --batch r`
does. k streams can run as g = 1 to k groups of r1, r2, ... rg streams, as even as possible. On c cores a lap
of a group lasts t(r) or longer, and a lap of all groups needs the sum of t(r) of core time. With stages of
equal length and messages that cost nothing, the best grouping reaches

    max over g of  k / max(t(r1), (t(r1) + ... + t(rg)) / c)

tokens/s. The program "one process" is this for c = 1. "The cores" is what a chain could reach on all of its
cores, c = min(nodes, cores): the better of that, since one group may pass the stages one after another, and
of the formula for c with the t(r) of c processes that compute at once, since these share the bandwidth of the
memory. The coordinator has no core of its own in either."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise

from bench.chain import Chain, Expected, alone, chains, cores, in_turns, opened, over, parser, streamed
from bench.lab.runs import rate
from bench.rounds import Samples

PROMPT = 16


def groups(streams: int, count: int) -> list[int]:
    """The sizes of `count` groups of streams, as even as possible, the larger ones first."""
    return [streams // count + (i < streams % count) for i in range(count)]


def batches(streams: Sequence[int]) -> list[int]:
    """All sizes of groups that `best` needs the time of."""
    return sorted({size for k in streams for g in range(1, k + 1) for size in groups(k, g)})


def best(streams: int, on_cores: int, step_s: Mapping[int, float]) -> float:
    """Tokens/s of the best grouping; `step_s` is t(r) by r."""

    def lap(sizes: Sequence[int]) -> float:
        return max(max(step_s[r] for r in sizes), sum(step_s[r] for r in sizes) / on_cores)

    return streams / min(lap(groups(streams, g)) for g in range(1, streams + 1))


def step_seconds(times: Sequence[float]) -> float:
    """The median of a step, from the times at which a sequence got its tokens."""
    return statistics.median(b - a for a, b in pairwise(times))


def main(arguments: Sequence[str] | None = None) -> int:
    made = parser("streams", __doc__ or "")
    made.add_argument("--nodes", default="1,2,3", metavar="N,...", help="(default 1,2,3)")
    made.add_argument("--streams", default="1,2,4,8,16", metavar="N,...", help="(default 1,2,4,8,16)")
    made.add_argument("--tokens", type=int, default=96, metavar="N", help="tokens of a stream (default 96)")
    args = made.parse_args(arguments)
    counts, streams = ([int(n) for n in text.split(",")] for text in (args.nodes, args.streams))
    model, checkouts = opened(args)
    samples, expected = Samples(), Expected(checkouts[0], model, PROMPT)
    sizes = batches(streams)

    def at_once(count: int) -> dict[int, float]:
        """t(r) of so many processes on a core each, at once."""
        job = {"prompt": PROMPT, "tokens": args.tokens // 2, "batches": sizes}
        one = partial(alone, checkouts[0], model, "decode", **job)
        with ThreadPoolExecutor(count) as pool:
            found = list(pool.map(lambda core: one(core=core)["runs"], cores()[-count:]))
        times = [[step_seconds(run["times"][0]) for run in runs] for runs in found]
        return dict(zip(sizes, map(statistics.fmean, zip(*times, strict=True)), strict=True))

    def one_process(number: int) -> None:
        used = {n: min(n, len(cores())) for n in counts}
        step_s = {c: at_once(c) for c in sorted({1, *used.values()})}
        for c, seconds in step_s.items():
            for size in sizes:
                samples.add(f"a step of {size}, ms", f"{c} at once", number, seconds[size] * 1e3)
        for n, c in used.items():
            for k in streams:
                one, all_cores = best(k, 1, step_s[1]), best(k, c, step_s[c])
                samples.add(_figure(n, k), "one process", number, one)
                if c > 1:
                    samples.add(_figure(n, k), "the cores", number, max(one, all_cores))

    def measure(chain: Chain, number: int) -> None:
        for n in counts:
            for k in streams:
                job = {"streams": k, "prompt": PROMPT, "tokens": args.tokens, "context": PROMPT + args.tokens}
                found = chain.head(n, "decode", **job)
                expected.check(found["tokens"])
                samples.add(_figure(n, k), chain.checkout.name, number, rate(found["times"]))
                rows = f"{over(n)}: rows a call, {streamed(k)}"
                samples.add(rows, chain.checkout.name, number, statistics.fmean(found["rows"]))

    with chains(checkouts, model, max(counts)) as running:
        turns = [lambda number, chain=chain: measure(chain, number) for chain in running]
        in_turns(args.rounds, [one_process, *turns])
    print(f"\n{samples.report('this')}")
    samples.save(args.output, {"command": "bench.streams", "model_hash": model.hash, "cores": len(cores())})
    return 0


def _figure(nodes: int, streams: int) -> str:
    return f"{over(nodes)}: tokens/s, {streamed(streams)}"


if __name__ == "__main__":
    sys.exit(main())
