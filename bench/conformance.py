"""The same 60 requests to `shoal serve` and to llama.cpp's server, with the same weights, and how the answers
differ:

    python -m bench.conformance [--skip-build] [-o docs/conformance.md]

Compared are the status, the content type, the fields of the JSON, and the tokens that are counted of a
prompt; not the texts, since the two round weights in other places. Each difference is explained in EXPLAINED;
the exit code is 1 if one is not, or if an explanation has no difference any more."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from bench import llama_server
from bench.asking import Heard, ask
from bench.requests import Request, requests

from shoal.commands.pull import pull

CONTEXT, SLOTS, THREADS = 1024, 4, 1

ONLY_LLAMA = {"timings", "__verbose", "prompt_progress"}
"""Fields that llama.cpp adds to replies and chunks, and OpenAI's API does not have."""

_STRICT = "shoal refuses what it cannot do as it is asked"
_IDS = "llama.cpp adds token ids, which OpenAI's API does not have"
_TYPED = "a request that is wrong is a 4xx; llama.cpp answers as for a failure of its own"
_OLD = "shoal answers in OpenAI's form for completions, which lm-eval reads; llama.cpp in that for chats"
EXPLAINED: Mapping[str, str] = {
    "models": "llama.cpp adds what Ollama's clients and its own page read; shoal the context length",
    "one model": "in OpenAI's API; llama.cpp has no such path",
    "chat by GET": "the path is there, and the method is wrong: shoal says which one it takes",
    "chat: logprobs": _IDS,
    "chat: stream of logprobs": _IDS,
    "chat: no messages": f"{_STRICT}; OpenAI refuses an empty list, too",
    "chat: unknown role": _STRICT,
    "chat: a picture": _TYPED,
    "chat: another model": "OpenAI answers 404; llama.cpp answers with the model that it has",
    "chat: tool_choice of no tool": f"{_STRICT}; OpenAI refuses it, too",
    "broken JSON": _TYPED,
    "empty body": _TYPED,
    "a name twice": "two readers could understand such a body differently, so shoal refuses it",
    "text: two prompts": "shoal counts the tokens of both prompts, llama.cpp those of one",
    "text: logprobs": _OLD,
    "text: echo of logprobs": f"{_OLD}, and does not score the prompt",
    "response: plain": "shoal says, as OpenAI, with which options it answered",
    "embeddings": "llama.cpp needs to be started for embeddings alone; shoal has both at once",
    "tokenize": "shoal adds what vLLM has",
    "detokenize": "shoal adds what vLLM has",
}
"""Why the answers to a request differ, by its name."""

Seen = dict[str, Any]


def seen(heard: Heard) -> Seen:
    """What is compared of an answer, by aspect."""
    kind = heard.headers.get("content-type", "").partition(";")[0]
    found: Seen = {"status": heard.status, "type": kind}
    if kind == "text/event-stream":
        found |= _of_stream(heard)
    elif kind == "application/json":
        found |= _of_json(heard.json)
    return found


def _of_stream(heard: Heard) -> Seen:
    lines = heard.body.decode().split("\n")
    names = {line[7:] for line in lines if line.startswith("event: ")}
    if names:  # of a response
        return {"events": names}
    events = heard.events
    keys = set().union(*(set(_keys(event)) for event in events))
    return {"fields": _without(keys)}


def _of_json(value: Any) -> Seen:
    found: Seen = {"fields": _without(set(_keys(value)))}
    if not isinstance(value, dict):
        return found
    if value.get("error"):
        return {"error": "of OpenAI's form" if _is_error(value["error"]) else value["error"]}
    usage = value.get("usage", {})
    found["tokens"] = usage.get("prompt_tokens", usage.get("input_tokens"))
    return found


def _is_error(error: Any) -> bool:
    return isinstance(error, dict) and all(isinstance(error.get(name), str) for name in ("message", "type"))


def _keys(value: Any, path: str = "") -> Iterator[str]:
    """The paths of all fields. Null is as good as no field; items of lists have one path together."""
    if isinstance(value, dict):
        for name, item in value.items():
            if item is not None and item not in ([], {}):
                yield from _keys(item, f"{path}.{name}" if path else name)
    elif isinstance(value, list):
        for item in value:
            yield from _keys(item, f"{path}[]")
    else:
        yield path


def _without(keys: set[str]) -> set[str]:
    return {key for key in keys if key.partition(".")[0] not in ONLY_LLAMA}


def differences(ours: Seen, theirs: Seen) -> list[str]:
    """How two answers differ, aspect by aspect: llama.cpp's first."""
    found = []
    for aspect in sorted({*ours, *theirs}, key=[*theirs, *ours].index):
        one, other = theirs.get(aspect), ours.get(aspect)
        if one == other:
            continue
        if isinstance(one, set) and isinstance(other, set):
            found += [f"{aspect}: only llama.cpp has {_named(one, other)}"] * bool(one - other)
            found += [f"{aspect}: only shoal has {_named(other, one)}"] * bool(other - one)
        else:
            found.append(f"{aspect}: {_shown(one)} and {_shown(other)}")
    if ours["status"] != theirs["status"]:
        return found[:1]
    return found


def _named(items: set[str], others: set[str]) -> str:
    """The paths that the others lack, each only as far as needed."""
    known = {prefix for other in others for prefix in accumulate(other.split("."), "{}.{}".format)}
    found = set()
    for item in items - others:
        found.add(
            next((path for path in accumulate(item.split("."), "{}.{}".format) if path not in known), item)
        )
    return ", ".join(f"`{path}`" for path in sorted(found))


def _shown(value: Any) -> str:
    return "nothing" if value is None else f"`{json.dumps(value, default=sorted, ensure_ascii=False)}`"


def table(rows: Sequence[tuple[str, list[str], str]]) -> str:
    """The table as Markdown."""
    lines = ["| request | llama.cpp and shoal | why |", "|---|---|---|"]
    for name, found, why in rows:
        what = "; ".join(found).replace("|", "\\|").replace("\n", "\\n") or "the same"
        lines.append(f"| {name} | {what} | {why} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.conformance", description=__doc__)
    parser.add_argument("--skip-build", action="store_true", help="fail if llama.cpp is not built")
    parser.add_argument("-o", "--output", type=Path, help="write the table there, between its two marks")
    args = parser.parse_args(argv)
    programs = llama_server.programs(build=not args.skip_build)
    peer_model = llama_server.weights(programs, "Q8_0")
    sizes = THREADS, SLOTS, CONTEXT
    with (
        llama_server.llama_server(programs, peer_model, *sizes) as (theirs, _),
        llama_server.shoal_server(pull(llama_server.NAME, "int8"), *sizes) as (ours, _),
    ):
        rows, wrong = [], 0
        for request in requests(llama_server.NAME):
            answers = [_asked(request, port) for port in (ours, theirs)]
            found = differences(*(seen(answer) for answer in answers))
            why = EXPLAINED.get(request.name, "")
            if bool(found) != bool(why):
                wrong += 1
                why = "NOT EXPLAINED" if found else "EXPLAINED, AND THE SAME"
                print(*(answer.body[:2000] for answer in answers), sep="\n", file=sys.stderr)
            rows.append((request.name, found, why))
            print(f"{len(rows)}: {request.name}", file=sys.stderr, flush=True)
    text = table(rows)
    print(text)
    same = sum(not found for _, found, _ in rows)
    print(f"\n{len(rows)} requests, {same} the same, {wrong} not explained")
    if args.output is not None and not wrong:
        _write(args.output, text)
    return 1 if wrong else 0


def _asked(request: Request, port: int) -> Heard:
    body = b"" if request.body is None else request.body
    (heard,) = ask(port, request.path, [body], request.method)
    return heard


def _write(path: Path, text: str) -> None:
    """Puts the table between the marks of a page."""
    page = path.read_text(encoding="utf-8")
    before, mark, rest = page.partition("<!-- table -->\n")
    _, end, after = rest.partition("<!-- end -->")
    if not mark or not end:
        raise ValueError(f"{path} has no <!-- table --> and <!-- end -->")
    path.write_text(f"{before}{mark}{text}\n{end}{after}", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
