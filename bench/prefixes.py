"""What shared prefixes save, in one process:

    python -m bench.prefixes MODEL [--history 1500] [--prefix 1000] [--requests 16] [--threads N] [--rounds 3]

A chat without a session: the first token of its second turn beside that of its first, whose prompt has
`--history` tokens. Requests that begin with the same `--prefix` tokens, asked for together: the rows that are
computed, and the seconds to the last answer, with and without sharing. Each round has other tokens; the least
times count, since neighbours on the machine only ever add to them."""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Sequence

from shoal import LLM
from shoal.answering import LocalEngine
from shoal.engine.batch import Result, Run
from shoal.text_table import table

from .models import model_path

WORDS = (
    "river",
    "stone",
    "winter",
    "boat",
    "light",
    "under",
    "morning",
    "green",
    "table",
    "letter",
    "walked",
)
ANSWER = 16  # tokens
OWN = 24  # tokens of each request after the prefix


class Rows:
    """The rows that a stage computes from now on."""

    def __init__(self, llm: LLM) -> None:
        assert isinstance(llm._engine, LocalEngine)
        stage = llm._engine.stage
        self.count, self._run = 0, stage.run
        stage.run = self.run  # type: ignore[method-assign]

    def run(self, batch: Sequence[Run]) -> list[Result]:
        """As the stage does."""
        self.count += sum(len(run.tokens) for run in batch)
        return self._run(batch)


def two_turns(llm: LLM, tokens: int, rng: random.Random) -> tuple[float, float, int, int]:
    """Seconds to the first tokens of two turns of a chat, and the tokens of their prompts that were
    computed."""
    text = ""
    while llm.count([{"role": "user", "content": text}]) < tokens:
        text += " ".join(rng.choices(WORDS, k=8)) + ". "
    turns = [{"role": "user", "content": text + "Tell me what this is about."}]
    first = llm.chat(turns, max_tokens=ANSWER)
    turns += [
        {"role": "assistant", "content": first.text},
        {"role": "user", "content": "And why is that so?"},
    ]
    second = llm.chat(turns, max_tokens=ANSWER)
    new = [made.usage.prompt_tokens - made.usage.cached_tokens for made in (first, second)]
    return first.timings.first_token_s, second.timings.first_token_s, new[0], new[1]


def together(llm: LLM, rows: Rows, prefix: int, requests: int, rng: random.Random) -> tuple[int, float]:
    """The rows that requests with a common prefix take, and the seconds to the last answer."""
    vocab = llm.model.program.vocab
    common = [rng.randrange(vocab) for _ in range(prefix)]
    prompts = [common + [rng.randrange(vocab) for _ in range(OWN)] for _ in range(requests)]
    before, start = rows.count, time.perf_counter()
    llm.generate(prompts, max_tokens=ANSWER, end=())
    return rows.count - before, time.perf_counter() - start


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.prefixes", description=(__doc__ or "")[:47])
    parser.add_argument("model")
    parser.add_argument("--threads", type=int)
    for name, default in (("--history", 1500), ("--prefix", 1000), ("--requests", 16), ("--rounds", 3)):
        parser.add_argument(name, type=int, default=default, metavar="N", help=f"(default {default})")
    args = parser.parse_args(arguments)
    chats, batches = [], []
    for share in (False, True):
        with LLM(model_path(args.model), threads=args.threads, share_prefixes=share) as llm:
            rows, rng = Rows(llm), random.Random(0)
            llm.chat("Good morning!", max_tokens=4)  # the first answer finds cold caches
            turns = [two_turns(llm, args.history, rng) for _ in range(args.rounds)]
            runs = [together(llm, rows, args.prefix, args.requests, rng) for _ in range(args.rounds)]
        name = "shared" if share else "not shared"
        first, second = (min(turn[i] for turn in turns) for i in (0, 1))
        counts = [str(max(turn[i] for turn in turns)) for i in (2, 3)]
        times = [f"{first * 1e3:.0f}", f"{second * 1e3:.0f}", f"{second / first:.3f}"]
        chats.append([name, counts[0], times[0], counts[1], times[1], times[2]])
        seconds = min(seconds for _, seconds in runs)
        batches.append([name, str(max(count for count, _ in runs)), f"{seconds:.2f}"])
    header = [
        "chat",
        "rows of turn 1",
        "first token, ms",
        "rows of turn 2",
        "first token, ms",
        "turn 2 / turn 1",
    ]
    print(table(header, chats), end="\n\n")
    print(table([f"{args.requests} requests, prefix of {args.prefix}", "rows", "seconds"], batches))
    return 0


if __name__ == "__main__":
    sys.exit(main())
