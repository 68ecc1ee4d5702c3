"""Keys and values that move with their units from one node to another, on a `bulk` connection.

Keys and values are written once for each position, so a giver copies finished chunks of positions while the
stage runs, and sends the rest after the commit, when nothing runs. A session that goes back to an earlier
position writes anew from there on, and so the giver sends it anew (`StageWork.rewinds`). What several
sessions begin with is sent once (`Shared`), so that they share pages at the taker as they do here.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial

import trio

from ..engine.batch import Sampling, common_prefix
from . import tags
from .connection import Connection, Hop
from .errors import NetError, RemoteProtocolError
from .messages import MOST_SESSIONS, Carried, Commit, Complete, Epoch, Pages, Shared
from .work import PORTION_BYTES, IncomingLike, Session, StageLike, StageWork, blank

LOOK_SECONDS = 0.05
"""How often a giver looks for chunks that have been finished."""
SHARE = 0.5
"""The share of the link, and of the time, that copies may take while the stage runs."""
MOST_CHUNKS = 4
"""The most chunks of a session that are copied in its turn."""
CARRIED_CHUNKS = 1024
"""The most chunks in a Carried message."""


class KvSender:
    """Sends the keys and values of units to the node that takes them over. `work` is the stage at work in the
    base epoch, and `units` are those that have keys and values. With `history`, the taker is also told of
    the sessions. `bytes_per_s` is the rate of the link, or None if it is
    unknown. `takers`: so many givers share the memory of a portion."""

    def __init__(
        self,
        stage: StageLike,
        work: StageWork,
        epoch: Epoch,
        units: Sequence[int],
        *,
        history: bool,
        hop: Hop,
        bytes_per_s: float | None,
        takers: int = 1,
    ) -> None:
        self._most_bytes = PORTION_BYTES // takers
        self._stage, self._work, self._epoch, self._units = stage, work, epoch, units
        self._history, self._hop, self._bytes_per_s = history, hop, bytes_per_s
        self._rewinds: dict[int, int] = {}
        self._sent: dict[int, int] = {}
        """For each session, up to which position keys and values have been sent."""
        self._told: dict[int, int] = {}
        """For each session, of how many positions the taker has been told."""
        self._commit: Commit | None = None
        self._ordered = trio.Event()
        self._until = 0.0
        """When the current pause is over."""
        self._piece = 256 * 1024
        """Bytes of a unit's chunk, as far as they are known."""
        self.bytes = 0
        """Bytes of keys and values that have been sent."""

    def finish(self, commit: Commit) -> None:
        """Lets `run` send the rest of the commit's sessions. No call of the stage runs any more."""
        self._commit = commit
        self._ordered.set()

    async def run(self, connection: Connection, copied: Callable[[], None]) -> None:
        """Sends everything, and Complete. `copied` is called when, for the first time, no finished chunk is
        left to send. NetError: the connection has ended, or the commit has positions that the stage does not
        hold."""
        with self._work.rewinds() as self._rewinds:
            await self._run(connection, copied)

    async def _run(self, connection: Connection, copied: Callable[[], None]) -> None:
        told = False
        while self._commit is None:
            if await self._copy(connection):
                continue
            if not told:
                copied()
                told = True
            await self._wait(LOOK_SECONDS)
        for kept in self._commit.sessions:
            known = self._work.sessions.get(kept.session)
            if kept.positions and known is None:
                raise NetError(f"the commit has session {kept.session}, which is not open here")
            if known is not None:
                await self._share(connection, kept.session, known, kept.positions)
            first = self._next(kept.session)
            starts = range(first, kept.positions, tags.CHUNK)
            cuts = [(at, min(at + tags.CHUNK, kept.positions)) for at in starts]
            for i in range(0, len(cuts), MOST_CHUNKS):
                some = cuts[i : i + MOST_CHUNKS]
                if known is not None and not await self._send(connection, kept.session, known, some):
                    raise NetError(
                        f"session {kept.session} does not hold the {kept.positions} positions of the commit"
                    )
        await connection.send(Complete(self._epoch))
        await connection.flush()

    async def _copy(self, connection: Connection) -> bool:
        """Sends the next finished chunks of each session. False: there are none."""
        found = False
        for session, known in list(self._work.sessions.items()):
            first, whole = self._next(session), known.positions // tags.CHUNK * tags.CHUNK
            if self._commit is not None or whole <= first:
                continue
            if await self._share(connection, session, known, whole):
                found = True
                continue
            if self._is_left(session, known, first + tags.CHUNK):
                continue
            end = min(first + MOST_CHUNKS * tags.CHUNK, whole)
            cuts = [(at, at + tags.CHUNK) for at in range(first, end, tags.CHUNK)]
            found |= await self._send(connection, session, known, cuts)
            await self._paused()
        for gone in self._sent.keys() - self._work.sessions.keys():
            del self._sent[gone]
            self._told.pop(gone, None)
        return found

    async def _share(self, connection: Connection, session: int, known: Session, end: int) -> bool:
        """Lets a session have positions before `end` of another one, whose tokens are the same and which have
        been sent. False: no other one has more of them than this one."""
        best, source = self._next(session), None
        for other, its in list(self._work.sessions.items()) if self._units else ():
            if other == session or min(self._sent.get(other, 0), end) < best + tags.CHUNK:
                continue
            same = min(common_prefix(known.tags, its.tags), min(self._sent[other], end) // tags.CHUNK)
            same *= tags.CHUNK
            # If its tokens have changed since they were sent, it is in a call, or that call has been noted.
            if same > best and self._work.calling.get(other, same) >= same and self._next(other) >= same:
                best, source = same, other
        if source is None:
            return False
        if self._history:
            await self._tell(connection, session, known, best)
        await connection.send(Shared(session, self._epoch, source, best))
        self._sent[session] = best
        return True

    def _is_left(self, session: int, known: Session, end: int) -> bool:
        """Whether an earlier session has the same tokens before `end`, and will send them."""
        for other, its in list(self._work.sessions.items()):
            if other == session:
                return False
            at = tags.spanned(0, end)
            if its.positions >= end and its.tags[at] == known.tags[at]:
                return True
        return False

    def _next(self, session: int) -> int:
        """The position from which a session's keys and values are still to be sent: the first of a chunk, or
        the end."""
        low = self._rewinds.pop(session, None)
        if low is not None:
            self._sent[session] = min(self._sent.get(session, 0), low // tags.CHUNK * tags.CHUNK)
            self._told[session] = min(self._told.get(session, 0), low)
        return self._sent.get(session, 0)

    async def _send(
        self, connection: Connection, session: int, known: Session, cuts: Sequence[tuple[int, int]]
    ) -> bool:
        """Sends positions [first, last) of a session for each of the cuts, which follow each other. False:
        the stage does not hold them any more."""
        if not cuts:
            return True
        if self._history:
            await self._tell(connection, session, known, cuts[-1][1])
        for units, some in self._portions(cuts):
            start = trio.current_time()
            try:
                found = await self._hop(partial(self._stage.export_cuts, session, units, some))
            except (KeyError, ValueError):  # it has ended, or gone back, since it was looked at
                return False
            self._rest((trio.current_time() - start) * (1 / SHARE - 1))
            for (first, last), parts in zip(some, found, strict=True):
                for unit, data in zip(units, parts, strict=True):
                    await connection.send(Pages(session, self._epoch, unit, first, last, data))
                    self.bytes += len(data)
                    self._piece = len(data)
                    if self._bytes_per_s is not None:
                        self._rest(len(data) / self._bytes_per_s / SHARE)
                        await self._paused()
        self._sent[session] = cuts[-1][1]
        return True

    def _portions(
        self, cuts: Sequence[tuple[int, int]]
    ) -> list[tuple[Sequence[int], Sequence[tuple[int, int]]]]:
        """Units and cuts to be read at once, in portions that the stage's next call may wait for: for each
        unit, all cuts in order."""
        units, most = self._units, max(1, self._most_bytes // self._piece)
        whole = most // max(1, len(units))
        if whole:
            return [(units, cuts[i : i + whole]) for i in range(0, len(cuts), whole)]
        return [(units[i : i + most], [cut]) for cut in cuts for i in range(0, len(units), most)]

    async def _tell(self, connection: Connection, session: int, known: Session, end: int) -> None:
        """Tells of a session's positions up to `end`, unless it has gone back meanwhile: then it is told
        later."""
        while (first := self._told.get(session, 0)) < end:
            last = min(end, (first // tags.CHUNK + CARRIED_CHUNKS) * tags.CHUNK)
            own = tuple(known.tags[tags.spanned(first, last)])
            if len(own) < tags.counted(first, last):
                return
            self._told[session] = last
            await connection.send(Carried(session, self._epoch, known.context, first, last, own))

    def _rest(self, seconds: float) -> None:
        """Makes the next pause longer."""
        self._until = max(self._until, trio.current_time()) + seconds

    async def _paused(self) -> None:
        """Waits until the pause is over, unless the commit has come."""
        await self._wait(self._until - trio.current_time())

    async def _wait(self, seconds: float) -> None:
        """Waits, but not any longer once the commit has come."""
        if self._commit is None and seconds > 0:
            with trio.move_on_after(seconds):
                await self._ordered.wait()


class KvReceiver:
    """Takes what givers send for one transition. `history`: the node has no stage in the base epoch, so it
    is told of the sessions, too. `stateless`: the units without keys and values."""

    def __init__(
        self, incoming: IncomingLike, hop: Hop, *, history: bool, stateless: Collection[int] = ()
    ) -> None:
        self.incoming, self._hop, self._history, self._stateless = incoming, hop, history, stateless
        self.sessions: dict[int, Session] = {}
        """The sessions as far as the node has been told of them."""
        self._seen: set[int] = set()

    async def take(self, message: Carried | Pages | Shared, units: Collection[int]) -> None:
        """Takes a message of the giver of `units`. RemoteProtocolError: it does not fit. ContextError: there
        is no room for it."""
        self._seen.add(message.session)
        if len(self._seen) > 2 * MOST_SESSIONS:  # some of them may have ended meanwhile
            raise RemoteProtocolError(f"more than {2 * MOST_SESSIONS} sessions were sent in one transition")
        try:
            if isinstance(message, Carried):
                await self._carried(message)
            elif isinstance(message, Shared):
                those = [unit for unit in units if unit not in self._stateless]
                whose = message.session, message.source
                await self._hop(partial(self.incoming.share, *whose, those, message.positions))
            elif message.unit not in units:
                raise ValueError(f"unit {message.unit} is not among those that this node takes over from it")
            else:
                where = message.session, message.unit, message.first, message.last, message.data
                await self._hop(partial(self.incoming.accept, *where))
        except ValueError as error:
            raise RemoteProtocolError(f"keys and values do not fit: {error}") from error

    async def _carried(self, message: Carried) -> None:
        if not self._history:
            raise ValueError(f"session {message.session} is open here, and known")
        first, last = message.first, message.last
        if first >= last or len(message.tags) != tags.counted(first, last):
            raise ValueError(f"positions [{first}, {last}) have {len(message.tags)} tags")
        where = message.session, Sampling(), message.context, first, blank(last - first)
        await self._hop(partial(self.incoming.carried, *where))
        known = self.sessions.setdefault(message.session, Session(message.context))
        known.tags[tags.spanned(first, last)] = array("Q", message.tags)
        known.positions = max(last, known.positions)

    def check_alike(self, sessions: Mapping[int, Session], kept: Mapping[int, int]) -> None:
        """ValueError: two sessions share positions that are kept, and their tokens differ."""
        for session, positions in kept.items():
            for other, shared in self.incoming.alike(session).items():
                if other not in kept:  # it has ended since it was sent
                    continue
                at = tags.spanned(0, min(shared, positions, kept[other]))
                if sessions[session].tags[at] != sessions[other].tags[at]:
                    raise ValueError(f"sessions {session} and {other} share positions of other tokens")
