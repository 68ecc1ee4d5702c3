"""Clients of a server of OpenAI's API, many at once in one thread: what each heard, and when.

As a program, `python -m bench.asking PORT PATH`, each line of standard input is a list of bodies that are
sent at once; a line of output says when each client heard its first token and the end. So clients take next
to nothing of the machine, and nothing of the process of a server that is measured from within."""

from __future__ import annotations

import json
import re
import selectors
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

FIRST = re.compile(rb'"(?:content|text)": ?"(?!")')
"""What a stream of a chat, or of a completion, has at its first token with text."""
SECONDS = 300.0
"""Longest silence of a server, in seconds, where nothing else is said."""


@dataclass(frozen=True, slots=True)
class Heard:
    """A response. Times are in seconds from when the request was sent. `first`: of a stream, when its first
    text came; None: none came."""

    status: int
    body: bytes
    first: float | None
    seconds: float
    headers: Mapping[str, str]

    @property
    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        """The events of a stream, without [DONE]. ValueError: it has not ended as streams end."""
        lines = [line[6:] for line in self.body.decode().split("\n") if line.startswith("data: ")]
        if not lines or lines.pop() != "[DONE]":
            raise ValueError(f"not a whole stream: {self.body[-200:]!r}")
        return [json.loads(line) for line in lines]

    @property
    def text(self) -> str:
        """The text of a stream's only answer."""
        parts = [choice for event in self.events for choice in event["choices"]]
        return "".join(part.get("text") or part.get("delta", {}).get("content") or "" for part in parts)

    @property
    def tokens(self) -> int:
        """The tokens of the answers, by the usage that was reported."""
        whole = self.events[-1] if self.body.startswith(b"data: ") else self.json
        return int(whole["usage"]["completion_tokens"])


class _Client:
    """A connection with one request."""

    def __init__(self, port: int, data: bytes, silence: float) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), silence)
        self.data = bytearray()
        self.first: float | None = None
        self.ended = 0.0
        self.begun = time.perf_counter()
        self.socket.sendall(data)

    def read(self) -> bool:
        """Takes what has arrived; False: that was all."""
        part = self.socket.recv(1 << 16)
        now = time.perf_counter()
        at = max(0, len(self.data) - 32)
        self.data += part
        if self.first is None and FIRST.search(self.data, at):
            self.first = now
        self.ended = now
        return bool(part)

    def heard(self) -> Heard:
        head, _, body = bytes(self.data).partition(b"\r\n\r\n")
        status, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        if headers.get("transfer-encoding", "").lower() == "chunked":
            body = b"".join(_chunks(body))
        first = None if self.first is None else self.first - self.begun
        return Heard(int(status.split()[1]), body, first, self.ended - self.begun, headers)


def ask(
    port: int, path: str, bodies: Sequence[Any], method: str = "POST", silence: float = SECONDS
) -> list[Heard]:
    """Sends requests at once, each on a connection of its own, and waits for all responses. A body is JSON,
    or bytes as they are. TimeoutError: the server says nothing to anybody for `silence` seconds."""
    requests = []
    for body in bodies:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        requests.append(head.encode() + data)
    with selectors.DefaultSelector() as selector:
        clients = [_Client(port, request, silence) for request in requests]
        try:
            for client in clients:
                selector.register(client.socket, selectors.EVENT_READ, client)
            while selector.get_map():
                ready = selector.select(silence)
                if not ready:
                    raise TimeoutError(f"nothing came from port {port} for {silence:.0f} s")
                for key, _ in ready:
                    if not key.data.read():
                        selector.unregister(key.fileobj)
        finally:
            for client in clients:
                client.socket.close()
    return [client.heard() for client in clients]


def _chunks(data: bytes) -> Iterator[bytes]:
    """The parts of a body in chunks. ValueError: it is not whole."""
    at = 0
    while True:
        end = data.index(b"\r\n", at)
        size = int(data[at:end], 16)
        if not size:
            return
        yield data[end + 2 : end + 2 + size]
        at = end + 4 + size


@dataclass(frozen=True, slots=True)
class Timing:
    """When a client got its first token, and the end, in seconds; and how many tokens."""

    first: float
    seconds: float
    tokens: int


def timings(heard: Sequence[Heard]) -> list[Timing]:
    """Of streams with usage. ValueError: one is an error, or has no text."""
    made = []
    for one in heard:
        if one.status != 200 or one.first is None:
            raise ValueError(f"{one.status}: {one.body[:500]!r}")
        made.append(Timing(one.first, one.seconds, one.tokens))
    return made


class Asker:
    """The clients as a process beside this one."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def __call__(self, bodies: Sequence[Any]) -> list[Timing]:
        """Sends streams at once and waits for them. RuntimeError: one has failed, and has said why."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(bodies) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the clients' process has ended")
        return [Timing(**one) for one in json.loads(line)]


@contextmanager
def asker(port: int, path: str) -> Iterator[Asker]:
    """Clients of a server in a process of their own."""
    command = [sys.executable, "-m", "bench.asking", str(port), path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield Asker(process)
        finally:
            assert process.stdin is not None
            process.stdin.close()


def main(port: str, path: str) -> None:
    """The process of the clients."""
    for line in sys.stdin:
        made = [asdict(one) for one in timings(ask(int(port), path, json.loads(line)))]
        print(json.dumps(made), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
