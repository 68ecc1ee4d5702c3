"""Many chats at once with one system prompt, by `shoal serve` and by llama.cpp's server, in turns on the same
cores and weights: tokens/s, and the wait for the first token.

    python -m bench.parallel [--clients 8,32] [--rounds 3] [--tokens N] [--words 400] [--skip-build]

A round of a number of clients has two waves on each server. In the first one nobody has asked with this
system prompt yet; in the second one the users ask something else after the same one, which both servers still
have. Both servers run throughout, each has as many places as there are clients, and they take turns to be
first. Printed are medians over the rounds, and the median, lowest and highest ratio of a pair."""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from bench import llama_server
from bench.asking import ask, timings

from shoal.commands.pull import pull
from shoal.text_table import table

WORDS = (
    "the",
    "sea",
    "is",
    "wide",
    "old",
    "men",
    "go",
    "out",
    "in",
    "small",
    "boats",
    "to",
    "look",
    "for",
    "fish",
)
ALL_TOKENS, LEAST_TOKENS = 512, 16
"""The answers of a wave have so many tokens together, unless another number is given, and each at least so
many."""
SILENCE_S = 3600.0
"""llama.cpp reads the system prompt of each client anew, and says nothing meanwhile: with 32 clients on a
slow machine that takes many minutes."""
WAVES = ("new prompt", "known prompt")
_OTHER_TOKENS = 176
"""Of a chat, beside the words of the system prompt, which are a token each, and the answer."""


@dataclass(frozen=True, slots=True)
class Wave:
    """What one wave reached: tokens/s of all clients together, and seconds until the median and the last
    client had a first token."""

    tokens_per_s: float
    first: float
    last: float


def system_prompt(number: int, words: int) -> str:
    """A text that begins unlike all others."""
    draw = random.Random(number)
    return f"Case {number}. " + " ".join(draw.choice(WORDS) for _ in range(words))


def bodies(system: str, wave: int, clients: int, tokens: int, more: dict[str, object]) -> list[object]:
    """The chats of a wave. No end token ends an answer, so that all have the same length."""
    return [
        {
            "messages": [
                {"role": "system", "content": system},
                {"role": "user", "content": f"Tell me story {wave}-{i} of it, please."},
            ],
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": 0,
            "max_tokens": tokens,
            **more,
        }
        for i in range(clients)
    ]


def wave(port: int, asked: Sequence[object], tokens: int) -> Wave:
    """Sends chats at once. ValueError: an answer is shorter than it should be."""
    found = timings(ask(port, "/v1/chat/completions", asked, silence=SILENCE_S))
    if any(one.tokens != tokens for one in found):
        raise ValueError(f"answers of {sorted({one.tokens for one in found})} tokens, not {tokens}")
    firsts = [one.first for one in found]
    seconds = max(one.seconds for one in found)
    return Wave(len(asked) * tokens / seconds, median(firsts), max(firsts))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.parallel", description=__doc__)
    parser.add_argument("--clients", default="8,32", metavar="N,...", help="(default 8,32)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--tokens", type=int, help=f"of each answer (default: {ALL_TOKENS} by the clients, or {LEAST_TOKENS})"
    )
    parser.add_argument("--words", type=int, default=400, help="of the system prompt (default 400)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--skip-build", action="store_true", help="fail if llama.cpp is not built")
    args = parser.parse_args(argv)
    programs = llama_server.programs(build=not args.skip_build)
    peer_model = llama_server.weights(programs, "Q8_0")
    model = pull(llama_server.NAME, "int8")
    for clients in (int(part) for part in args.clients.split(",")):
        tokens = args.tokens or max(LEAST_TOKENS, ALL_TOKENS // clients)
        sizes = args.threads, clients, args.words + tokens + _OTHER_TOKENS
        with (
            llama_server.shoal_server(model, *sizes) as (ours, _),
            llama_server.llama_server(programs, peer_model, *sizes) as (theirs, _),
        ):
            ports = {"shoal": ours, "llama.cpp": theirs}
            pairs = list(rounds(ports, clients, args.rounds, tokens, args.words))
        print(report(clients, pairs), flush=True)
    return 0


def rounds(
    ports: dict[str, int], clients: int, count: int, tokens: int, words: int
) -> Iterator[dict[tuple[str, int], Wave]]:
    """The waves of each round, by server and number. One round more, at first, warms up."""
    more = {"shoal": {"logit_bias": {"2": -100, "0": -100}}, "llama.cpp": {"ignore_eos": True}}
    for number in range(count + 1):
        found = {}
        for which in range(len(WAVES)):
            for name in sorted(ports, reverse=bool(number % 2)):
                system = system_prompt(100 * clients + number, words)
                asked = bodies(system, which, clients, tokens, more[name])
                found[name, which] = wave(ports[name], asked, tokens)
        if number:
            yield found


def report(clients: int, pairs: Sequence[dict[tuple[str, int], Wave]]) -> str:
    """A table of what the waves reached."""
    rows = []
    for which, name in enumerate(WAVES):
        for what in ("tokens_per_s", "first", "last"):
            ours, theirs = (
                [float(getattr(pair[server, which], what)) for pair in pairs]
                for server in ("shoal", "llama.cpp")
            )
            ratios = sorted(a / b for a, b in zip(ours, theirs, strict=True))
            label = {"tokens_per_s": "tokens/s", "first": "first token, s", "last": "the last client's, s"}[
                what
            ]
            numbers = (median(ours), median(theirs), median(ratios), ratios[0], ratios[-1])
            rows.append([f"{clients} clients, {name}", label, *(f"{number:.2f}" for number in numbers)])
    return table(["", "", "shoal", "llama.cpp", "ratio", "lowest", "highest"], rows)


if __name__ == "__main__":
    sys.exit(main())
