"""An engine that asks the head of this device, over its socket."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import ExitStack, suppress
from itertools import count
from pathlib import Path
from queue import SimpleQueue

from ..answering import Put, Settings, Stop
from ..engine.batch import ReadRequest, Result
from ..engine.batcher import PutResult
from ..engine.errors import ShoalError
from ..engine.generate import check_prompt, check_text
from ..engine.request_scheduler import Report
from ..grammars import GrammarError, Masks
from ..net.errors import NodeLostError, RemoteProtocolError
from ..status import Status
from . import frames, unix_socket
from .frames import Message

ANSWER_SECONDS = 5.0
"""A head that runs says Welcome sooner."""
GONE = "the head on this device has ended: start `shoal up` again"
_NO_MASKS = (
    "`allow` is not possible through the head, unless it is a grammar and not a session's, since all answers "
    "there would wait for this process at each token: open the model in this process, without house=True"
)
_WANTED = {want: name for name, want in frames.WANTS.items()}


class RemoteEngine:
    """An answering.Engine over the socket of the head, made by `connect`. Its answers are computed together
    with those of other programs. Results are put in a thread of its own. After a fork, the child process is
    told to connect for itself.

    NodeLostError: the head has ended. Other errors are those of the head's engine."""

    def __init__(self, stream: socket.socket, welcome: frames.Welcome) -> None:
        self.welcome = welcome
        self._stream, self._process = stream, os.getpid()
        self._numbers = count(1)
        self._out = SimpleQueue[bytes | None]()
        self._slots = threading.BoundedSemaphore(frames.MOST_REQUESTS)
        self._lock = threading.Lock()
        self._requests: dict[int, _Request] = {}
        self._ended: frames.End | None = None
        """How the connection has ended."""
        self._reader = threading.Thread(target=self._read, name="shoal head", daemon=True)
        self._writer = threading.Thread(target=self._write, name="shoal head", daemon=True)
        self._reader.start()
        self._writer.start()

    def close(self) -> None:
        """Ends the connection, and with it all that was begun."""
        if self._process != os.getpid():
            return
        self._out.put(None)
        with suppress(OSError):
            self._stream.shutdown(socket.SHUT_RDWR)
        self._writer.join()
        self._reader.join()
        self._stream.close()

    @property
    def ended(self) -> bool:
        """Whether the connection has ended, so that no request can be made any more."""
        return self._ended is not None

    @property
    def busy(self) -> bool:
        """Whether there are requests that have not ended."""
        return bool(self._requests)

    # --- answering.Engine

    def session(self, settings: Settings) -> RemoteSession:
        """See Engine."""
        return RemoteSession(self, next(self._numbers), settings)

    def begin(
        self, prompt: Sequence[int], settings: Settings, put: Put, report: Report | None = None
    ) -> Stop:
        """See Engine. It waits while this process has MOST_REQUESTS requests under way. ShoalError:
        `settings.allow` is set, and is no grammar."""
        return self.ask_answer(prompt, settings, put, report)

    def read(self, request: ReadRequest, put: PutResult) -> Stop:
        """See Engine. Errors as for `begin`. ValueError: something else than tokens, scores or rows is
        wanted."""
        check_text(request.tokens, request.context)
        if request.want not in _WANTED:
            raise ValueError(f"the head gives no {request.want.name} of a text")
        ids, want = frames.packed(request.tokens), _WANTED[request.want]
        return self._ask(
            lambda number: frames.Reading(number, ids, request.first, want, request.context, request.report),
            lambda message: put(_result(message)),
            put,
        )

    def status(self) -> Status:
        """The status of the head."""
        found: SimpleQueue[Status | Exception | None] = SimpleQueue()
        self._ask(frames.GetStatus, lambda message: found.put(_status(message)), found.put)
        status = found.get()
        if not isinstance(status, Status):
            raise status or ShoalError(GONE)
        return status

    # --- for sessions

    def ask_answer(
        self,
        prompt: Sequence[int],
        settings: Settings,
        put: Put,
        report: Report | None,
        session: int | None = None,
    ) -> Stop:
        """Begins an answer, of an open session if its number is given."""
        grammar = settings.allow.grammar if isinstance(settings.allow, Masks) else None
        if settings.allow is not None and (grammar is None or session is not None):
            raise ShoalError(_NO_MASKS)
        check_prompt(prompt, settings.context)
        ids, end = frames.packed(prompt), frames.packed(sorted(settings.end))
        most = None if settings.max_tokens is None else max(0, settings.max_tokens)
        wanted = None if report is None else report.count

        def take(message: Message) -> None:
            if not isinstance(message, frames.Token):
                raise RemoteProtocolError("the head answers with something else than tokens")
            if report is not None:
                report.cached = message.cached
                report.found.extend(message.logprobs)
            put(message.token)

        return self._ask(
            lambda number: frames.Begin(
                number,
                ids,
                settings.sampling,
                settings.context,
                most,
                end,
                wanted,
                session,
                None if grammar is None else frames.packed_text(grammar),
            ),
            take,
            put if grammar is None else _of_grammar(put),
        )

    def send(self, message: Message) -> None:
        """Sends a message that is no request."""
        self._check()
        self._out.put(frames.frame(message))

    # --- requests

    def _ask(
        self,
        message: Callable[[int], Message],
        take: Callable[[Message], None],
        finish: Callable[[Exception | None], None],
    ) -> Stop:
        """Makes the request `message(number)`. `take` gets what comes of it, and `finish` its end, in the
        reader's thread. ValueError: a value is out of range."""
        self._check()
        number, request = next(self._numbers), _Request(take, finish)
        data = frames.frame(message(number))
        self._slots.acquire()
        with self._lock:
            lives = self._ended is None
            if lives:
                self._requests[number] = request
        if not lives:
            self._slots.release()
            self._check()
        self._out.put(data)

        def stop(*, wait: bool = True, keep: bool = False) -> None:
            if self._process != os.getpid() or request.ended.is_set():
                return
            if not request.stopped:
                request.stopped = True
                self._out.put(frames.frame(frames.Stop(number, keep)))
            if wait and threading.current_thread() is not self._reader:
                request.ended.wait()

        return stop

    def _check(self) -> None:
        if self._process != os.getpid():
            raise ShoalError(
                "the connection to the head belongs to the process that opened it: open the model in this "
                "one, too"
            )
        if self._ended is not None:
            raise frames.raised_by(self._ended) or NodeLostError(GONE)

    # --- threads

    def _write(self) -> None:
        with suppress(OSError):  # the reader notices
            while (data := self._out.get()) is not None:
                self._stream.sendall(data)

    def _read(self) -> None:
        error: Exception = NodeLostError(GONE)
        try:
            while (message := frames.receive(self._stream, requests=False)) is not None:
                if isinstance(message, frames.Fault):
                    error = frames.raised_by(message) or error
                    break
                self._dispatch(message)
        except ShoalError as failure:
            error = failure
        except OSError:
            pass
        self._end_all(error)
        self._out.put(None)

    def _dispatch(self, message: Message) -> None:
        """Gives a message to its request, which a StatusReply or an End ends. Tokens that were on their way
        when a request was stopped belong to none."""
        if isinstance(message, frames.Welcome):
            raise RemoteProtocolError("the head said Welcome twice")
        assert isinstance(message, frames.Token | frames.Part | frames.StatusReply | frames.End)
        with self._lock:
            request = self._requests.get(message.request)
            if request is not None and isinstance(message, frames.End | frames.StatusReply):
                del self._requests[message.request]
        if request is None:
            return
        if not isinstance(message, frames.End):
            request.take(message)
        if isinstance(message, frames.End | frames.StatusReply):
            self._slots.release()
            request.ended.set()
            request.finish(frames.raised_by(message) if isinstance(message, frames.End) else None)

    def _end_all(self, error: Exception) -> None:
        """Ends all requests with an error, and those to come."""
        with self._lock:
            self._ended = frames.end_of(0, error)
            left, self._requests = list(self._requests.values()), {}
        for request in left:
            self._slots.release()
            request.ended.set()
            request.finish(frames.raised_by(self._ended))


class _Request:
    """A request of this process that has not ended."""

    def __init__(self, take: Callable[[Message], None], finish: Callable[[Exception | None], None]) -> None:
        self.take, self.finish = take, finish
        self.ended = threading.Event()
        self.stopped = False


class RemoteSession:
    """An answering.Session of the head."""

    def __init__(self, engine: RemoteEngine, number: int, settings: Settings) -> None:
        if settings.allow is not None:
            raise ShoalError(_NO_MASKS)
        self._engine, self._number, self._settings = engine, number, settings
        self._stop: Stop | None = None
        engine.send(frames.OpenSession(number, settings.sampling, settings.context))

    def answer(
        self,
        prompt: Sequence[int],
        *,
        max_tokens: int,
        end: Collection[int],
        report: Report | None = None,
    ) -> Generator[int, None, None]:
        """See answering.Session. Errors as for RemoteEngine."""
        tokens: SimpleQueue[int | Exception | None] = SimpleQueue()
        settings = Settings(self._settings.context, self._settings.sampling, max_tokens, end)
        self._stop = stop = self._engine.ask_answer(prompt, settings, tokens.put, report, self._number)
        return _tokens(tokens, stop)

    def stop(self) -> None:
        """See answering.Session."""
        if self._stop is not None:
            self._stop()

    def close(self) -> None:
        """See answering.Session."""
        self.stop()
        with suppress(ShoalError):  # the head has ended
            self._engine.send(frames.CloseSession(self._number))


def _of_grammar(put: Put) -> Put:
    """Puts the errors of an answer that has a grammar."""

    def told(item: int | Exception | None) -> None:
        put(GrammarError(str(item)) if isinstance(item, ValueError) else item)

    return told


def _tokens(tokens: SimpleQueue[int | Exception | None], stop: Stop) -> Generator[int, None, None]:
    try:
        while (item := tokens.get()) is not None:
            if isinstance(item, Exception):
                raise item
            yield item
    finally:
        stop()


def _result(message: Message) -> Result:
    if not isinstance(message, frames.Part):
        raise RemoteProtocolError("the head answers with something else than results of a text")
    try:
        return frames.result_of(message)
    except ValueError as error:
        raise RemoteProtocolError(str(error)) from error


def _status(message: Message) -> Status:
    if not isinstance(message, frames.StatusReply):
        raise RemoteProtocolError("the head answers with something else than its status")
    return message.status


def running(path: Path | None = None) -> frames.Welcome | None:
    """What the head of this device says of itself; None: none runs. Errors as for `connect`."""
    found = _greeted(path)
    if found is None:
        return None
    found[0].close()
    return found[1]


def connect(path: Path | None = None) -> RemoteEngine | None:
    """The engine of the head of this device; None: none runs. NodeLostError: it does not answer.
    MismatchError: it is another version of shoal. RemoteProtocolError: something else is there."""
    found = _greeted(path)
    return None if found is None else RemoteEngine(*found)


def _greeted(path: Path | None) -> tuple[socket.socket, frames.Welcome] | None:
    """A connection to the head, and its Welcome."""
    place = unix_socket.socket_path() if path is None else path
    if not os.path.exists(place):
        return None
    with ExitStack() as failing:
        stream = failing.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        try:
            welcome = _welcome(stream, place)
        except TimeoutError:
            raise NodeLostError(
                f"the head on this device does not answer within {ANSWER_SECONDS:g} s: end its `shoal up`, "
                "and start it again"
            ) from None
        except OSError:  # that of a head that was killed, or of another user
            return None
        if welcome is None:
            return None
        if isinstance(welcome, frames.Fault):
            raise frames.raised_by(welcome) or NodeLostError(GONE)
        if not isinstance(welcome, frames.Welcome):
            raise RemoteProtocolError("the head did not say Welcome first")
        failing.pop_all()
    return stream, welcome


def _welcome(stream: socket.socket, place: Path) -> Message | None:
    stream.settimeout(ANSWER_SECONDS)
    with unix_socket.short(place) as name:
        stream.connect(name)
    unix_socket.check_peer(stream)
    welcome = frames.receive(stream, requests=False)
    stream.settimeout(None)
    return welcome
