"""A file server on loopback that misbehaves as asked: breaks off, ignores ranges, lies, refuses."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Behaviour:
    """What the server does, and what it was asked."""

    files: dict[str, tuple[str, bytes]]
    """Content type and body by path."""
    break_after: int | None = None
    """Bytes of a body after which the connection is closed."""
    breaks: int = 1
    """How many bodies are broken off."""
    ranges: bool = True
    status: int = 200
    requests: list[tuple[str, str | None]] = field(default_factory=list)
    """Path and Range header of each request."""


@contextmanager
def serving(behaviour: Behaviour) -> Iterator[str]:
    """The server's URL while it runs."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wanted = self.headers.get("Range")
            behaviour.requests.append((self.path, wanted))
            if behaviour.status != 200 or self.path not in behaviour.files:
                self.send_error(behaviour.status if behaviour.status != 200 else 404)
                return
            kind, body = behaviour.files[self.path]
            first = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and behaviour.ranges else 0
            self.send_response(206 if first else 200)
            if first:
                self.send_header("Content-Range", f"bytes {first}-{len(body) - 1}/{len(body)}")
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body) - first))
            self.end_headers()
            part = body[first:]
            if behaviour.break_after is not None and behaviour.breaks:
                behaviour.breaks -= 1
                part = part[: behaviour.break_after]
            self.wfile.write(part)

        def log_message(self, form: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
