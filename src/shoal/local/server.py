"""The server of the head's socket: answers for an engine, in threads.

A client has a thread that reads its requests and one that writes what comes of them. The engine's threads
only put results into a queue, so a client that does not read never holds up others: when too much waits for
it, its connection is ended. With its connection all of its answers end.
"""

from __future__ import annotations

import os
import selectors
import socket
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue

from .. import __version__
from ..answering import Engine, Session, Settings, Stop, stop_all
from ..engine.batch import ReadRequest, Result, Want
from ..engine.errors import ShoalError
from ..engine.generate import check_prompt, check_text
from ..engine.model_directory import Model
from ..engine.request_scheduler import Report
from ..grammars import LateGrammars
from ..net.errors import RemoteProtocolError
from ..status import Status
from . import frames, unix_socket
from .frames import Message

MOST_CLIENTS, MOST_SESSIONS = 64, 4096
MOST_BACKLOG = 64 * 1024 * 1024
"""Bytes that wait for a client, about."""
_MESSAGE_BYTES = 256
"""What a small message takes in memory, about."""
_PAUSE, _LAST = 0.1, 5.0
"""Seconds before the next client after one could not be served, and for the last messages to one."""
_TOGETHER = 64
"""Messages that are written together."""


@dataclass(frozen=True, slots=True)
class Head:
    """What is served: the engine of a model, the context length of its plan (0: it has none yet), and its
    status. The functions may be called in any thread. `port` is where the head waits for devices; 0: it does
    not."""

    model: Model
    engine: Engine
    context: Callable[[], int]
    status: Callable[[], Status]
    port: int = 0


@contextmanager
def serve(path: Path, head: Head) -> Iterator[None]:
    """Answers on a socket at `path`, from `unix_socket.claimed`, while the block runs. Leaving it ends what
    clients have begun. OSError: the socket cannot be made."""
    path.unlink(missing_ok=True)  # that of a process that was killed
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with listener, unix_socket.short(path) as name:
        listener.bind(name)
        try:
            path.chmod(0o600)
            listener.listen(MOST_CLIENTS)
            listener.setblocking(False)
            with _accepting(listener, head):
                yield
        finally:
            path.unlink(missing_ok=True)


@contextmanager
def _accepting(listener: socket.socket, head: Head) -> Iterator[None]:
    wake, woken = socket.socketpair()
    clients: set[_Client] = set()
    grammars = LateGrammars(head.model)

    def accept() -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(listener, selectors.EVENT_READ)
            selector.register(woken, selectors.EVENT_READ)
            while all(key.fileobj is not woken for key, _ in selector.select()):
                try:
                    _Client(listener.accept()[0], head, grammars, clients).start()
                except (OSError, RuntimeError):  # it has gone away, or there are too many files or threads
                    threading.Event().wait(_PAUSE)

    thread = threading.Thread(target=accept, name="shoal socket", daemon=True)
    thread.start()
    try:
        yield
    finally:
        with wake, woken:
            wake.send(b"x")
            thread.join()
        for client in list(clients):
            client.end()
        for client in list(clients):
            client.join()


class _Request:
    """A request that has not ended. `stop` is there once the engine has begun it."""

    def __init__(self, report: Report) -> None:
        self.report, self.reported = report, 0
        self.stop: Stop | None = None


class _Client:
    """A connection of a client."""

    def __init__(
        self, stream: socket.socket, head: Head, grammars: LateGrammars, clients: set[_Client]
    ) -> None:
        stream.setblocking(True)
        self._stream, self._head, self._grammars, self._clients = stream, head, grammars, clients
        self._out = SimpleQueue[tuple[Message, int] | None]()
        self._lock = threading.Lock()
        self._backlog, self._faulted = 0, False
        self._requests: dict[int, _Request] = {}
        self._sessions: dict[int, Session] = {}
        """Belong to the thread that reads."""
        self._reader = threading.Thread(target=self._read, name="shoal client", daemon=True)
        self._writer = threading.Thread(target=self._write, name="shoal client", daemon=True)

    def start(self) -> None:
        """Begins to serve the client. RuntimeError: the system has no more threads."""
        try:
            self._writer.start()
            self._clients.add(self)
            self._reader.start()
        except RuntimeError:
            self._clients.discard(self)
            self._out.put(None)
            self._stream.close()
            raise

    def end(self) -> None:
        """Ends the connection, without waiting."""
        with suppress(OSError):
            self._stream.shutdown(socket.SHUT_RDWR)

    def join(self) -> None:
        """Waits until all that the client has begun has ended."""
        self._reader.join()

    # --- what is sent

    def _send(self, message: Message, size: int = _MESSAGE_BYTES) -> None:
        """Sends in the other thread. With too much that waits, the client has stopped reading."""
        with self._lock:
            self._backlog += size
            full = self._backlog > MOST_BACKLOG
            if not full and not self._faulted:
                self._faulted = isinstance(message, frames.Fault)  # which is the last message
                self._out.put((message, size))
        if full:
            self.end()

    def _write(self) -> None:
        ended = False
        while not ended:
            items = [self._out.get()]
            with suppress(Empty):
                while len(items) < _TOGETHER:
                    items.append(self._out.get_nowait())
            found = [item for item in items if item is not None]
            ended = len(found) < len(items)
            try:
                self._stream.sendall(b"".join(frames.frame(message) for message, _ in found))
            except (OSError, ValueError):  # it has gone away, or a value cannot be sent
                self.end()
                return
            with self._lock:
                self._backlog -= sum(size for _, size in found)

    # --- what is received

    def _read(self) -> None:
        try:
            self._serve()
        except ShoalError as error:
            self._send(frames.Fault(*frames.told(error)))
        except OSError:
            pass  # the client has gone away
        finally:
            self._leave()

    def _serve(self) -> None:
        unix_socket.check_peer(self._stream)
        if len(self._clients) > MOST_CLIENTS:
            raise ShoalError(f"the head serves {MOST_CLIENTS} programs, the most: end one of them")
        model, head = self._head.model, (os.getpid(), __version__, self._head.port)
        self._send(frames.Welcome(*head, str(model.path), model.hash, self._head.context()))
        while (message := frames.receive(self._stream, requests=True)) is not None:
            self._hear(message)

    def _leave(self) -> None:
        """Ends all requests and sessions, then the connection."""
        with self._lock:
            stops = [request.stop for request in self._requests.values() if request.stop is not None]
        stop_all(stops)
        for session in self._sessions.values():
            session.close()
        self._out.put(None)
        self._writer.join(_LAST)
        self.end()
        self._writer.join()
        self._stream.close()
        self._clients.discard(self)

    def _hear(self, message: Message) -> None:
        match message:
            case frames.Begin() | frames.Reading():
                self._begin(message)
            case frames.Stop(number, keep):
                with self._lock:
                    request = self._requests.get(number)
                if request is not None and request.stop is not None:
                    request.stop(wait=False, keep=keep)
            case frames.OpenSession(number, sampling, context):
                if number in self._sessions or len(self._sessions) >= MOST_SESSIONS:
                    raise RemoteProtocolError(f"session {number} is open, or there are {MOST_SESSIONS}")
                self._sessions[number] = self._head.engine.session(Settings(context, sampling))
            case frames.CloseSession(number):
                session = self._sessions.pop(number, None)
                if session is not None:
                    session.close()
            case frames.GetStatus(number):
                try:
                    told: Message = frames.StatusReply(number, self._head.status())
                except Exception as error:
                    told = frames.end_of(number, error)
                self._send(told)

    def _begin(self, message: frames.Begin | frames.Reading) -> None:
        number, request = message.request, _Request(Report(message.report))
        with self._lock:
            if number in self._requests or len(self._requests) >= frames.MOST_REQUESTS:
                raise RemoteProtocolError(f"request {number} is under way, or too many are")
            self._requests[number] = request
        try:
            if isinstance(message, frames.Begin):
                request.stop = self._answer(message, request)
            else:
                request.stop = self._reading(message, request)
        except (ShoalError, ValueError) as error:
            self._put(number, request, error)

    def _answer(self, message: frames.Begin, request: _Request) -> Stop:
        self._head.model.check_generates()
        prompt, vocab = frames.unpacked(message.prompt), self._head.model.config.vocab
        check_prompt(prompt, message.context, vocab)
        end = frozenset(frames.unpacked(message.end))
        put = partial(self._put, message.request, request)
        if message.session is None:
            allow = None
            if message.grammar is not None:
                allow = self._grammars.get().masks(frames.unpacked_text(message.grammar))
            settings = Settings(message.context, message.sampling, message.max_tokens, end, allow=allow)
            return self._head.engine.begin(prompt, settings, put, request.report)
        session = self._sessions.get(message.session)
        if session is None:
            raise ValueError(f"session {message.session} is not open")
        if message.grammar is not None:
            raise ValueError("an answer of a session has no grammar")
        most = message.context - len(prompt) if message.max_tokens is None else message.max_tokens
        tokens = session.answer(prompt, max_tokens=most, end=end, report=request.report)
        return _pulled(session, tokens, put)

    def _reading(self, message: frames.Reading, request: _Request) -> Stop:
        tokens, want = frames.unpacked(message.tokens), frames.WANTS[message.want]
        if want is not Want.ROWS:
            self._head.model.check_generates()
        check_text(tokens, message.context, self._head.model.config.vocab)
        put = partial(self._put, message.request, request)
        text = ReadRequest(tokens, message.first, want, message.context, message.report)
        return self._head.engine.read(text, put)

    def _put(self, number: int, request: _Request, item: int | Result | Exception | None) -> None:
        """Takes what comes of a request, in any thread."""
        if isinstance(item, int):
            self._send(self._token(number, request, item))
        elif isinstance(item, Result):
            for part in frames.parts_of(number, item):
                self._send(part, _MESSAGE_BYTES + len(part.output or ""))
        else:
            with self._lock:
                self._requests.pop(number, None)
            self._send(frames.end_of(number, item))

    def _token(self, number: int, request: _Request, token: int) -> Message:
        found = tuple(request.report.found[request.reported :])
        request.reported += len(found)
        return frames.Token(number, token, found, request.report.cached)


def _pulled(
    session: Session, tokens: Generator[int, None, None], put: Callable[[int | Exception | None], None]
) -> Stop:
    """Puts the tokens of a session's answer in a thread of its own; returns what ends it."""

    def pull() -> None:
        try:
            for token in tokens:
                put(token)
            put(None)
        except Exception as error:
            put(error)

    thread = threading.Thread(target=pull, name="shoal session", daemon=True)
    thread.start()

    def stop(*, wait: bool = True, keep: bool = False) -> None:
        session.stop()
        if wait:
            thread.join()

    return stop
