"""Which piece is asked for where: whatever sources do, the bytes are right in the end if one of them is
honest, and no honest one is ever accused."""

import hashlib
import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.net import files
from shoal.net.fetch_plan import DISPUTE_SECONDS, DOUBT_SECONDS, FetchPlan, GetAllSums, GetPiece
from shoal.net.files import piece_range

PIECE = 8


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PIECE", PIECE)


def digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


@dataclass(frozen=True)
class Manner:
    """What a source does: which of the bytes it sends are wrong, and whether the sums that it tells are those
    of these bytes, right, or neither."""

    wrong: frozenset[int] = frozenset()
    sums: str = "of its bytes"
    rate: float = 1.0

    @property
    def honest(self) -> bool:
        return not self.wrong and self.sums != "wrong"


@dataclass
class World:
    """A node that fetches from sources; the tests decide in which order answers arrive."""

    contents: dict[str, bytes]
    sources: dict[int, Manner]
    head: int | None = None
    plan: FetchPlan = field(default_factory=FetchPlan)
    got: dict[str, bytearray] = field(default_factory=dict)
    jobs: list[tuple[int, GetPiece | GetAllSums]] = field(default_factory=list)
    done: set[str] = field(default_factory=set)
    now: float = 0.0

    def begin(self) -> None:
        for name, data in self.contents.items():
            self.got[name] = bytearray(len(data))
            self.plan.begin(name, len(data), {})
        self.offer()

    def offer(self) -> None:
        self.plan.offered(dict.fromkeys(self.sources, self.contents))
        if self.head in self.sources:
            assert self.head is not None
            self.plan.is_head(self.head)

    def sent(self, source: int, name: str) -> bytes:
        data = bytearray(self.contents[name])
        for at in self.sources[source].wrong:
            data[at % len(data)] ^= 1
        return bytes(data)

    def sums(self, source: int, name: str) -> bytes:
        manner = self.sources[source]
        data = self.contents[name] if manner.sums == "right" else self.sent(source, name)
        ranges = [piece_range(p, len(data)) for p in range(files.pieces(len(data)))]
        told = [digest(data[a:b]) for a, b in ranges]
        return b"".join([digest(b"no"), *told[1:]] if manner.sums == "wrong" else told)

    def ask(self) -> None:
        for source in self.sources:
            busy = sum(other == source for other, _ in self.jobs)
            while busy < 2 and (job := self.plan.next(source, self.now)) is not None:
                self.jobs.append((source, job))
                busy += 1

    def answer(self, source: int, job: GetPiece | GetAllSums) -> None:
        self.now += 0.1
        self.plan.measured(source, self.sources[source].rate)
        if isinstance(job, GetAllSums):
            self.plan.told(source, job.name, self.sums(source, job.name))
        elif self.plan.owns(source, job):
            data = self.sent(source, job.name)[job.first : job.last]
            self.got[job.name][job.first : job.last] = data
            self.plan.arrived(source, job.name, job, digest(data), str(source))
        if self.plan.complete(job.name):
            right = self.got[job.name] == self.contents[job.name]
            self.plan.finished(job.name, right=right)
            if right:
                self.done.add(job.name)

    @property
    def honest(self) -> set[int]:
        return {source for source, manner in self.sources.items() if manner.honest}

    def check(self) -> None:
        assert not self.plan.liars.keys() & self.honest


MANNERS = st.builds(
    Manner,
    st.frozensets(st.integers(0, 60), max_size=3),
    st.sampled_from(["of its bytes", "right", "wrong"]),
    st.sampled_from([0.5, 1.0, 100.0]),
)


@given(
    manners=st.lists(MANNERS, max_size=4),
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=3),
    head=st.booleans(),
    seed=st.integers(0, 1 << 32),
)
def test_an_honest_source_is_enough_and_is_never_accused(
    manners: list[Manner], sizes: list[int], head: bool, seed: int
) -> None:
    dice = random.Random(seed)
    contents = {f"f{i}": dice.randbytes(size) for i, size in enumerate(sizes)}
    sources = dict(enumerate([*manners, Manner()]))
    world = World(contents, sources, len(manners) if head else None)
    world.begin()
    for _ in range(2000):
        world.ask()
        if not world.jobs:
            break
        if len(world.sources) > 1 and dice.random() < 0.02:  # one that is not the last honest one leaves
            gone = dice.choice(sorted(world.sources.keys() - {len(manners)}))
            del world.sources[gone]
            world.jobs = [(source, job) for source, job in world.jobs if source != gone]
            world.offer()
            continue
        if dice.random() < 0.1:
            world.now += dice.choice([1.0, DISPUTE_SECONDS])
            world.plan.look(world.now)
            continue
        world.answer(*world.jobs.pop(dice.randrange(len(world.jobs))))
        world.check()
        assert not world.plan.hopeless()
    assert world.done == set(contents)


@pytest.mark.parametrize("leaves", [False, True])
def test_one_that_lies_in_sums_and_takes_its_time_does_not_keep_a_file(leaves: bool) -> None:
    """It sends no piece, by which it would be found out. Or it breaks the connection and is back first."""
    liar, honest = 1, 2
    world = World({"f": bytes(range(24))}, {liar: Manner(sums="wrong"), honest: Manner()})
    world.begin()
    job = world.plan.next(liar, 0.0)
    assert isinstance(job, GetAllSums)
    world.answer(liar, job)
    kept = world.plan.next(liar, 0.1)
    assert isinstance(kept, GetPiece) and kept.piece == 0
    world.plan.measured(liar, 0.001)
    while isinstance(job := world.plan.next(honest, 20.0), GetPiece):  # takes over the piece that it keeps
        world.answer(honest, job)
    assert world.plan.next(honest, 20.0) is None, "its piece 0 differs from the sums"
    if leaves:
        world.plan.lost(liar)
    else:
        world.plan.look(20.0)
        world.plan.look(20.0 + DISPUTE_SECONDS - 1)
        assert world.plan.next(honest, 40.0) is None
        world.plan.look(20.0 + DISPUTE_SECONDS)
    assert not isinstance(world.plan.next(liar, 40.0), GetAllSums), "another one is to tell"
    world.now = 40.0
    del world.sources[liar]  # it is not asked in this test any more, and the plan does not know
    while not world.done:
        world.ask()
        world.answer(*world.jobs.pop(0))
    assert world.got["f"] == bytes(range(24)) and honest not in world.plan.liars


def test_a_doubted_source_tells_again_where_no_other_does() -> None:
    plan = FetchPlan()
    plan.begin("f", 16, {})
    plan.offered({1: ["f"], 2: ["f"]})
    assert isinstance(plan.next(1, 0.0), GetAllSums)
    plan.lost(1)
    assert plan.next(1, 1.0) is None
    plan.look(DOUBT_SECONDS - 1)
    assert plan.next(1, DOUBT_SECONDS - 1) is None
    plan.look(DOUBT_SECONDS)
    assert isinstance(plan.next(1, DOUBT_SECONDS), GetAllSums)
    plan.lost(1)
    plan.offered({1: ["f"]})
    assert isinstance(plan.next(1, DOUBT_SECONDS), GetAllSums)


def test_without_an_honest_source_it_says_so() -> None:
    world = World({"f": bytes(20)}, {1: Manner(frozenset({3})), 2: Manner(frozenset({12}))})
    world.begin()
    while True:
        world.ask()
        if not world.jobs:
            break
        world.answer(*world.jobs.pop(0))
    assert world.plan.hopeless() == ("f",) and not world.done


def test_pieces_that_are_there_are_asked_for_only_if_they_are_wrong() -> None:
    data = bytes(range(24))
    world = World({"f": data}, {1: Manner()})
    world.begin()
    world.plan.begin("f", 24, {0: (digest(data[:8]), "b"), 1: (digest(b"torn"), "b")})
    world.got["f"][:8] = data[:8]
    world.ask()
    ((source, sums),) = world.jobs
    assert world.plan.told(source, "f", world.sums(source, "f")) == {1}
    assert isinstance(sums, GetAllSums)
    asked = [world.plan.next(1, 0.0), world.plan.next(1, 0.0), world.plan.next(1, 0.0)]
    assert [job and (job.name, getattr(job, "piece", None)) for job in asked] == [("f", 1), ("f", 2), None]


def test_a_fast_source_takes_over_the_piece_of_a_slow_one_and_only_then() -> None:
    plan = FetchPlan()
    plan.begin("f", 16, {})
    plan.offered({1: ["f"], 2: ["f"]})
    assert isinstance(plan.next(1, 0.0), GetAllSums)
    assert plan.next(2, 0.0) is None, "the sums are asked for once"
    plan.told(1, "f", bytes(64))
    slow, fast = plan.next(1, 0.0), plan.next(2, 0.0)
    assert isinstance(slow, GetPiece) and isinstance(fast, GetPiece)
    plan.measured(1, 1.0)
    plan.measured(2, 8.0)
    plan.arrived(2, "f", fast, bytes(32), "fast")
    assert plan.next(2, 7.0) is None, "the slow one needs 1 s for the rest, and the fast one for all"
    taken = plan.next(2, 1.0)
    assert isinstance(taken, GetPiece) and taken.piece == slow.piece
    assert plan.owns(2, taken) and not plan.owns(1, slow)
    assert plan.next(1, 1.0) is None
