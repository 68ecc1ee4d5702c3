"""Which piece of which file a node asks which source for, and what it makes of the answers. It is pure:
sources are numbers (incarnations), and the clock is the caller's.

The sums of the pieces come from a source, too. If that is the head of the house, they are right, and a piece
that differs shows that its source lies. Any other source may lie about the sums themselves: then the sources
of pieces that differ are only left out of this file until it is whole. If its SHA-256 is right, they have
lied, and if not, the one that told the sums. A source that has lied is not asked again.

Until the file is whole nobody knows who lies, and the one that told the sums could take its time. So after a
while another source tells sums, and the pieces that are there are compared with those.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from .files import SUM_BYTES, piece_range, pieces

STEAL = 2.0
"""A piece is taken from a source that needs so many times as long for the rest as another one for all of it,
which has nothing else to do."""


DISPUTE_SECONDS, DOUBT_SECONDS = 15.0, 20.0
"""After so long with a source that is left out, other sums are asked for; and for so long whoever told the
first ones, or told none when it was asked, tells none of the file if others may."""


@dataclass(frozen=True, slots=True)
class GetPiece:
    """Bytes [first, last) of a file are to be asked for: a piece."""

    name: str
    piece: int
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class GetAllSums:
    """The sums of a file are to be asked for."""

    name: str


@dataclass(slots=True)
class _Flight:
    source: int
    since: float
    job: GetPiece


@dataclass(slots=True)
class _File:
    size: int
    sums: tuple[bytes, ...] | None = None
    teller: int | None = None
    """The source that is asked for the sums, or has told them."""
    have: dict[int, tuple[bytes, str]] = field(default_factory=dict)
    flying: dict[int, _Flight] = field(default_factory=dict)
    suspects: set[int] = field(default_factory=set)
    """Sources whose pieces differ from sums that may be wrong themselves."""
    disputed: float | None = None
    """Since when there are such sources."""
    doubted: dict[int, float] = field(default_factory=dict)
    """Sources that rather tell no sums, and until when."""

    @property
    def complete(self) -> bool:
        return self.sums is not None and len(self.have) == len(self.sums)

    def distrust(self, until: float) -> None:
        """Forgets the sums, so that another source is asked for them."""
        if self.teller is not None:
            self.doubted[self.teller] = until
        self.sums = self.teller = self.disputed = None
        self.suspects.clear()


class FetchPlan:
    """The files that are being fetched, in the order in which they are wanted."""

    def __init__(self) -> None:
        self.liars: dict[int, str] = {}
        """Sources that are not asked again, and the file of which they have sent wrong bytes."""
        self._files: dict[str, _File] = {}
        self._sources: dict[int, frozenset[str]] = {}
        self._head: int | None = None
        self._rates: dict[int, float] = {}
        self._now = 0.0

    @property
    def files(self) -> Collection[str]:
        """The names of the files."""
        return self._files.keys()

    def begin(self, name: str, size: int, have: Mapping[int, tuple[bytes, str]]) -> None:
        """Adds a file, of which these pieces are there already."""
        self._files[name] = _File(size, have=dict(have))

    def end(self, name: str) -> None:
        """Removes a file."""
        self._files.pop(name, None)

    def sort(self, names: Sequence[str]) -> None:
        """Changes the order of the files."""
        self._files = {name: self._files[name] for name in names if name in self._files}

    def offered(self, sources: Mapping[int, Collection[str]]) -> None:
        """The sources and the names of their files, instead of earlier ones."""
        for gone in self._sources.keys() - sources.keys():
            self.lost(gone)
        self._sources = {source: frozenset(names) for source, names in sources.items()}

    def look(self, now: float) -> None:
        """Settles disputes that have lasted too long. To be called from time to time."""
        self._now = now
        for file in self._files.values():
            file.doubted = {source: until for source, until in file.doubted.items() if until > now}
            if file.suspects and file.disputed is None:
                file.disputed = now
            if file.disputed is not None and now - file.disputed >= DISPUTE_SECONDS and not file.complete:
                self._distrust(file)

    def measured(self, source: int, bytes_per_s: float) -> None:
        """Notes the rate at which a source's bytes arrive."""
        self._rates[source] = bytes_per_s

    def is_head(self, source: int) -> None:
        """Notes that a source is on the head of the house, whose sums are right."""
        self._head = source

    def lost(self, source: int) -> None:
        """A source cannot be reached any more: others are asked for what it was asked for."""
        if self._head == source:
            self._head = None
        for file in self._files.values():
            if file.teller == source and (file.sums is None or file.suspects):
                self._distrust(file)
            file.flying = {p: flight for p, flight in file.flying.items() if flight.source != source}

    def has_work(self, source: int) -> bool:
        """Whether a source has one of the files and may be asked."""
        return any(True for _ in self._of(source))

    def next(self, source: int, now: float) -> GetPiece | GetAllSums | None:
        """What to ask a source for next; None: nothing for now."""
        self._now = now
        for name, file in self._of(source):
            if file.sums is None and file.teller is None and self._may_tell(source, name, file):
                file.teller = source
                return GetAllSums(name)
        for name, file in self._of(source):
            for piece in range(len(file.sums or ())):
                if piece not in file.have and piece not in file.flying:
                    return self._take(source, name, file, piece, now)
        return self._steal(source, now)

    def owns(self, source: int, job: GetPiece) -> bool:
        """Whether a piece is still expected from a source."""
        file = self._files.get(job.name)
        flight = None if file is None else file.flying.get(job.piece)
        return flight is not None and flight.source == source and flight.job is job

    def told(self, source: int, name: str, sums: bytes) -> frozenset[int]:
        """Takes the sums of a file. Returns the pieces that are there and differ from them. ValueError: they
        are not as many as the file has pieces."""
        file = self._files.get(name)
        if file is None or file.teller != source or file.sums is not None:
            return frozenset()
        if len(sums) != pieces(file.size) * SUM_BYTES:
            raise ValueError(f"{len(sums)} bytes of sums for {name}, which has {file.size} bytes")
        file.sums = tuple(sums[i : i + SUM_BYTES] for i in range(0, len(sums), SUM_BYTES))
        wrong = frozenset(p for p, (digest, _) in file.have.items() if file.sums[p] != digest)
        file.have = {piece: kept for piece, kept in file.have.items() if piece not in wrong}
        return wrong

    def arrived(self, source: int, name: str, job: GetPiece, digest: bytes, label: str) -> bool:
        """Takes a piece that has arrived from a source of that name. False: it is wrong. Without sums, which
        turned out to be lies, that shows when others are told."""
        file = self._files[name]
        del file.flying[job.piece]
        if file.sums is None or digest == file.sums[job.piece]:
            file.have[job.piece] = digest, label
            return True
        if file.teller in (source, self._head):
            self._lied(source, name)
        elif file.teller in self._sources:
            file.suspects.add(source)
        else:  # who could be found out has left
            self._distrust(file)
        return False

    def complete(self, name: str) -> bool:
        """Whether all pieces of a file are there."""
        return name in self._files and self._files[name].complete

    def finished(self, name: str, *, right: bool) -> None:
        """Notes whether the SHA-256 of a complete file is right. If it is not, the file begins anew."""
        file = self._files[name]
        for source in file.suspects if right else {file.teller} - {None}:
            assert source is not None
            self._lied(source, name)
        if right:
            self.end(name)
        else:
            self.begin(name, file.size, {})

    def hopeless(self) -> tuple[str, ...]:
        """The files that some source has, all of which have sent wrong bytes."""
        found = []
        for name, file in self._files.items():
            having = {source for source, names in self._sources.items() if name in names}
            if having and having <= self.liars.keys() | file.suspects:
                found.append(name)
        return tuple(found)

    def _of(self, source: int) -> Iterable[tuple[str, _File]]:
        if source in self.liars:
            return
        names = self._sources.get(source, frozenset())
        for name, file in self._files.items():
            if name in names and source not in file.suspects and not file.complete:
                yield name, file

    def _may_tell(self, source: int, name: str, file: _File) -> bool:
        """The head tells the sums of the files that it has, else a source that is not doubted."""
        head, left_out = self._head, self.liars.keys() | file.doubted.keys()
        if head is not None and head not in self.liars and name in self._sources.get(head, frozenset()):
            return head == source
        others = (other for other, names in self._sources.items() if name in names)
        return source not in left_out or all(other in left_out for other in others)

    def _distrust(self, file: _File) -> None:
        file.distrust(self._now + DOUBT_SECONDS)

    def _take(self, source: int, name: str, file: _File, piece: int, now: float) -> GetPiece:
        job = GetPiece(name, piece, *piece_range(piece, file.size))
        file.flying[piece] = _Flight(source, now, job)
        return job

    def _steal(self, source: int, now: float) -> GetPiece | None:
        """A piece that another source would bring much later."""
        mine = self._rates.get(source, 0.0)
        best: tuple[float, str, _File, int] | None = None
        for name, file in self._of(source):
            for piece, flight in file.flying.items():
                theirs = self._rates.get(flight.source, 0.0)
                if flight.source == source or mine <= 0:
                    continue
                first, last = piece_range(piece, file.size)
                flown = now - flight.since
                seconds = abs((last - first) / theirs - flown) if theirs > 0 else flown  # late: as late again
                if seconds > STEAL * (last - first) / mine and (best is None or seconds > best[0]):
                    best = seconds, name, file, piece
        return None if best is None else self._take(source, *best[1:], now)

    def _lied(self, source: int, name: str) -> None:
        self.liars[source] = name
        for file in self._files.values():
            if file.teller == source and not file.complete:
                self._distrust(file)
        self.lost(source)
