"""The delay of running answers while a long prompt is read, and of the prompt beside them:

    python -m bench.press [MODEL] [--nodes 3] [--streams 1,3] [--prompt 2000] [--against DIRECTORY]

A gap is the time from one token of a running stream to its next. Figures are the median while only the
streams run, and the median and the longest from the arrival of the prompt until its first token; "of alone"
is their ratio to the median alone. The prompt is measured alone on an idle chain, and beside the streams.
What is predicted is the planner's, by the latest measurements of the nodes (planner/pressed.py)."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from itertools import pairwise

from bench.chain import Chain, Expected, alone, chains, in_turns, opened, over, parser, same, streamed
from bench.rounds import Samples

PROMPT = 16
QUIET_TOKENS, WARM = 72, 8
"""Tokens of each stream before the prompt arrives, and those of them that are not counted."""


def gaps(times: Sequence[Sequence[float]], start: float, end: float) -> list[float]:
    """The gaps of all streams that overlap with the time from `start` to `end`."""
    return [b - a for own in times for a, b in pairwise(own) if b > start and a < end]


def main(arguments: Sequence[str] | None = None) -> int:
    made = parser("press", __doc__ or "")
    made.add_argument("--nodes", default="3", metavar="N,...", help="(default 3)")
    made.add_argument("--streams", default="1,3", metavar="N,...", help="(default 1,3)")
    made.add_argument("--prompt", type=int, default=2000, metavar="N", help="its tokens (default 2000)")
    args = made.parse_args(arguments)
    counts, streams = ([int(n) for n in text.split(",")] for text in (args.nodes, args.streams))
    model, checkouts = opened(args)
    samples, expected = Samples(), Expected(checkouts[0], model, PROMPT)
    first = alone(checkouts[0], model, "first", lengths=[args.prompt])["tokens"][0]

    def measure(chain: Chain, number: int) -> None:
        for n in counts:
            for k in streams:
                job = {
                    "streams": k, "sequences": k + 1, "prompt": PROMPT, "quiet_tokens": QUIET_TOKENS,
                    "long": args.prompt, "context": model.config.context,
                }  # fmt: skip
                found = chain.head(n, "press", **job)
                expected.check(found["tokens"])
                same([first, first], [[token] for token in found["long_tokens"]])
                _add(samples, chain.checkout.name, number, f"{over(n)}, {streamed(k)}", found)

    with chains(checkouts, model, max(counts)) as running:
        in_turns(args.rounds, [lambda number, chain=chain: measure(chain, number) for chain in running])
    print(f"\n{samples.report('this')}")
    samples.save(args.output, {"command": "bench.press", "model_hash": model.hash, "prompt": args.prompt})
    return 0


def _add(samples: Samples, name: str, number: int, case: str, found: dict[str, object]) -> None:
    times, start, end = found["times"], found["from"], found["to"]
    assert isinstance(times, list) and isinstance(start, float) and isinstance(end, float)
    before = gaps([own[WARM:] for own in times], 0.0, start)
    quiet, pressed = statistics.median(before), gaps(times, start, end)
    alone_s = found["alone_s"]
    assert isinstance(alone_s, float)
    predicted = found.get("predicted")  # not by an older checkout
    if isinstance(predicted, list):
        gap, prompt = predicted
        samples.add(f"{case}: gap beside, predicted, ms", name, number, gap * 1e3)
        samples.add(f"{case}: prompt beside, predicted, s", name, number, prompt)
    for figure, value in (
        ("gap alone, ms", quiet * 1e3),
        ("gap beside, median, ms", statistics.median(pressed) * 1e3),
        ("gap beside, longest, ms", max(pressed) * 1e3),
        ("gap beside, median, of alone", statistics.median(pressed) / quiet),
        ("gap beside, longest, of alone", max(pressed) / quiet),
        ("prompt alone, s", alone_s),
        ("prompt beside, s", end - start),
        ("prompt beside, of alone", (end - start) / alone_s),
    ):
        samples.add(f"{case}: {figure}", name, number, value)


if __name__ == "__main__":
    sys.exit(main())
