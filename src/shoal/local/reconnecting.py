"""An engine for a process that stays longer than the head that it asks."""

from __future__ import annotations

import threading
from collections.abc import Collection, Generator, Sequence

from ..answering import Put, Settings, Stop
from ..engine.batch import ReadRequest
from ..engine.batcher import PutResult
from ..engine.request_scheduler import Report
from ..net.errors import MismatchError, NodeLostError
from ..status import Status
from .client import GONE, RemoteEngine, RemoteSession, connect
from .frames import Welcome


class ReconnectingEngine:
    """An answering.Engine on the head of this device, made of a connection to it. When that head has ended,
    the next request connects to the one that runs then, and waits for it. What was under way ends with the
    head.

    NodeLostError: no head runs. MismatchError: it has another model. Other errors as for RemoteEngine."""

    def __init__(self, engine: RemoteEngine) -> None:
        self._engine, self._lock, self._closed = engine, threading.Lock(), False

    @property
    def welcome(self) -> Welcome:
        """What the head said of itself that was asked last."""
        return self._engine.welcome

    @property
    def busy(self) -> bool:
        """Whether anything was asked that has not ended."""
        return self._engine.busy

    def session(self, settings: Settings) -> ReconnectingSession:
        """See Engine."""
        return ReconnectingSession(self, settings)

    def begin(
        self, prompt: Sequence[int], settings: Settings, put: Put, report: Report | None = None
    ) -> Stop:
        """See RemoteEngine."""
        return self.now().begin(prompt, settings, put, report)

    def read(self, request: ReadRequest, put: PutResult) -> Stop:
        """See RemoteEngine."""
        return self.now().read(request, put)

    def status(self) -> Status:
        """See RemoteEngine."""
        return self.now().status()

    def close(self) -> None:
        """Ends the connection, and with it all that was begun."""
        with self._lock:
            self._closed = True
            self._engine.close()

    def now(self) -> RemoteEngine:
        """A connection to a head that runs; the same one while that lives."""
        with self._lock:
            if self._engine.ended and not self._closed:
                self._engine = self._anew(self._engine)
            return self._engine

    def _anew(self, old: RemoteEngine) -> RemoteEngine:
        found = connect()
        if found is None:
            raise NodeLostError(GONE)
        if found.welcome.hash != old.welcome.hash:
            found.close()
            raise MismatchError(f"the head on this device has another model now: {found.welcome.model}")
        old.close()
        return found


class ReconnectingSession:
    """An answering.Session of the head, which goes on with the next head. That computes the whole prompt."""

    def __init__(self, engine: ReconnectingEngine, settings: Settings) -> None:
        self._engine, self._settings = engine, settings
        self._on = engine.now()
        self._session: RemoteSession = self._on.session(settings)

    def answer(
        self,
        prompt: Sequence[int],
        *,
        max_tokens: int,
        end: Collection[int],
        report: Report | None = None,
    ) -> Generator[int, None, None]:
        """See answering.Session. Errors as for ReconnectingEngine."""
        now = self._engine.now()
        if now is not self._on:
            self._on, self._session = now, now.session(self._settings)
        return self._session.answer(prompt, max_tokens=max_tokens, end=end, report=report)

    def stop(self) -> None:
        """See answering.Session."""
        self._session.stop()

    def close(self) -> None:
        """See answering.Session."""
        self._session.close()


def connect_to_head() -> ReconnectingEngine | None:
    """The engine of the head of this device; None: none runs. Errors as for `connect`."""
    found = connect()
    return None if found is None else ReconnectingEngine(found)
