"""What 10,000 requests leave behind in `shoal serve`: memory, descriptors, threads, and what /metrics counts.

    python -m bench.leak [--requests 10000] [--clients 16]

The model is tiny and says noise. Requests are whole and streamed chats, texts that are scored, embeddings,
wrong ones, and streams whose client leaves after the first token. Before them come as many answers as the
engine keeps keys and values of, each as long as the context: the pool takes memory for these from the system
as they are first written, and keeps it, so it would grow until long answers have by chance been everywhere.
The process is looked at after a tenth of the requests and at the end; the exit code is 1 if descriptors or
threads are more than then, an answer still runs, or memory has grown by more than 4 MB."""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bench.asking import ask
from bench.llama_server import shoal_server
from tests.models import tiny_chat_checkpoint

from shoal.engine.convert import convert

_CONTEXT, _THREADS, _SLOTS = 300, 1, 32
_END = ("2", "3")
"""The end tokens of the model."""
_GROWTH = 4 << 20
_SETTLE_S = 30.0


@dataclass(frozen=True, slots=True)
class Look:
    """A process at a moment."""

    rss: int
    descriptors: int
    threads: int

    def __str__(self) -> str:
        return f"{self.rss / 1e6:.1f} MB, {self.descriptors} descriptors, {self.threads} threads"


def look(pid: int) -> Look:
    """The process now."""
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return Look(
        int(lines["VmRSS"].split()[0]) * 1024, len(os.listdir(f"/proc/{pid}/fd")), int(lines["Threads"])
    )


def bodies(number: int) -> Iterator[tuple[str, Any, int]]:
    """A path, a body and the status that it should have, of each kind of request."""
    chat: dict[str, Any] = {"messages": [{"role": "user", "content": f"Number {number}"}], "max_tokens": 4}
    yield "/v1/chat/completions", chat, 200
    yield "/v1/chat/completions", {**chat, "stream": True}, 200
    yield "/v1/completions", {"prompt": f"{number}", "max_tokens": 1, "echo": True, "logprobs": 1}, 200
    yield "/v1/embeddings", {"input": [f"{number}", "b"]}, 200
    yield "/v1/chat/completions", {"messages": []}, 400
    yield "/v1/completions", {"prompt": f"{number}", "n": 3, "max_tokens": 2, "stop": "x"}, 200
    yield "/nothing", {}, 404


def fill(port: int) -> None:
    """Answers of the whole context, as many as run together and then as many again, while the first ones are
    kept for prompts that begin alike. RuntimeError: one fails, or is shorter."""
    bodies = [
        {"messages": [{"role": "user", "content": f"{i}"}], "logit_bias": dict.fromkeys(_END, -100)}
        for i in range(2 * _SLOTS)
    ]
    for heard in ask(port, "/v1/chat/completions", bodies):
        if heard.status != 200 or heard.json["usage"]["total_tokens"] < _CONTEXT:
            raise RuntimeError(f"not an answer of the whole context: {heard.status}, {heard.body[-300:]!r}")


def leave(port: int, number: int) -> None:
    """A stream whose client goes after the first bytes."""
    body = json.dumps({"prompt": f"{number}", "max_tokens": 200, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    with closing(socket.create_connection(("127.0.0.1", port))) as connection:
        connection.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
        connection.recv(1000)


def send(port: int, first: int, count: int, clients: int) -> None:
    """So many requests, `clients` of them at a time. RuntimeError: a status is not as it should be."""
    done = 0
    while done < count:
        for path, body, status in bodies(first + done):
            for heard in ask(port, path, [body] * clients):
                if heard.status != status:
                    raise RuntimeError(f"{path}: {heard.status}, not {status}: {heard.body[:300]!r}")
            done += clients
        for i in range(clients):
            leave(port, first + done + i)
        done += clients


def settled(pid: int, port: int) -> Look:
    """The process when no answer runs, no request waits, and idle threads have ended. RuntimeError: that does
    not come."""
    until = time.monotonic() + _SETTLE_S
    while True:
        (heard,) = ask(port, "/metrics", [b""], "GET")
        counts = dict(line.split() for line in heard.body.decode().splitlines() if not line.startswith("#"))
        if counts["shoal_answers_running"] == counts["shoal_requests_waiting"] == "0.0":
            time.sleep(11)  # threads of trio's cache end after 10 s
            return look(pid)
        if time.monotonic() > until:
            raise RuntimeError(f"{counts['shoal_answers_running']} answers still run")
        time.sleep(0.1)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.leak", description=__doc__)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=16)
    args = parser.parse_args(argv)
    with TemporaryDirectory() as directory:
        model = Path(directory) / "tiny"
        convert(tiny_chat_checkpoint(Path(directory) / "checkpoint"), model)
        with shoal_server(model, _THREADS, _SLOTS, _CONTEXT) as (port, process):
            fill(port)
            begun, first = time.perf_counter(), args.requests // 10
            send(port, 0, first, args.clients)
            before = settled(process.pid, port)
            print(f"after {first} requests: {before}", flush=True)
            send(port, first, args.requests - first, args.clients)
            after = settled(process.pid, port)
            print(f"after {args.requests} requests: {after}, {time.perf_counter() - begun:.0f} s", flush=True)
    grown = after.rss - before.rss > _GROWTH
    more = after.descriptors > before.descriptors or after.threads > before.threads
    return 1 if grown or more else 0


if __name__ == "__main__":
    sys.exit(main())
