"""Keys and values that arrive from other stages while a stage runs, until it adopts them."""

from __future__ import annotations

import threading
from array import array
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from .batch import Sampling
from .errors import ContextError
from .kv import PagePool, SequenceKv
from .program import KvState


@dataclass(slots=True)
class Arriving:
    """A sequence as far as it has arrived. `sampling` is None unless its parameters have (`carried`)."""

    kv: SequenceKv
    sampling: Sampling | None = None
    context: int = 0
    tokens: array[int] = field(default_factory=lambda: array("i"))
    alike: dict[int, int] = field(default_factory=dict)
    """By other sequence: how many positions are said to have the same tokens."""


class Incoming:
    """A staging area for sequences that move to a stage (`Stage.incoming`).

    Its pages are of the stage's pool, and count towards its limit. Runs of the stage neither touch them nor
    wait for them, so any thread may fill it meanwhile. If a run needs the room, everything is dropped; later
    calls then raise ContextError, and so does `Stage.adopt`."""

    def __init__(
        self,
        pool: PagePool,
        states: Sequence[Sequence[KvState]],
        context: int,
        ready: Callable[[], None],
        check: Callable[[int | None, Sequence[int]], int],
    ) -> None:
        """`states`: of each unit of the model. `context`: the longest. `ready` is called before each call,
        and `check` checks the context and the tokens of a sequence."""
        self._pool, self._states, self._context = pool, states, context
        self._ready, self._check = ready, check
        self._lock = threading.Lock()
        self._sequences: dict[int, Arriving] = {}
        self._closed = self._dropped = False

    def carried(
        self, sequence: int, sampling: Sampling, context: int, first: int, tokens: Sequence[int]
    ) -> None:
        """Takes the parameters of a sequence that the stage does not have, and its token ids from position
        `first` on. ValueError: tokens before `first` are missing, or a token is not in the vocabulary.
        ContextError: the context is longer than the model's, or the tokens longer than the context."""
        context = self._check(context, [*tokens, *(token for token, _ in sampling.bias)])
        with self.locked() as sequences:
            known = sequences.get(sequence)
            held = 0 if known is None else len(known.tokens)
            if not 0 <= first <= held:
                raise ValueError(f"tokens from position {first} on do not follow the {held} of {sequence=}")
            if first + len(tokens) > context:
                raise ContextError(
                    f"{first + len(tokens)} tokens of sequence {sequence} exceed its context of {context}"
                )
            arriving = self._arriving(sequence)
            arriving.sampling, arriving.context = sampling, context
            arriving.tokens[first : first + len(tokens)] = array("i", tokens)

    def accept(self, sequence: int, unit: int, first: int, last: int, data: bytes | memoryview) -> None:
        """Takes what `Stage.export_positions` returned on another stage of the same model. The unit then
        holds positions [0, last) of the sequence. ValueError: `data` does not fit, or earlier positions are
        missing. ContextError: no memory for pages."""
        with self.locked():
            self._arriving(sequence).kv.accept(unit, first, last, data)
            self._changed(sequence, first)

    def share(self, sequence: int, source: int, units: Collection[int], positions: int) -> None:
        """Lets a sequence have the first `positions` that have arrived for another one, in these units,
        instead of what has arrived for it. Full pages are shared. `Stage.adopt` checks that their tokens are
        the same. ValueError: they have not arrived. ContextError: no memory for a page."""
        with self.locked() as sequences:
            other = sequences.get(source)
            if sequence == source or not units or positions < 1 or other is None:
                raise ValueError(f"nothing of sequence {source} has arrived that {sequence} can share")
            for u in units:
                if other.kv.positions(u) < positions:
                    raise ValueError(
                        f"unit {u} has {other.kv.positions(u)} of the {positions} positions of sequence "
                        f"{source} that {sequence} is to share"
                    )
            arriving = self._arriving(sequence)
            for u in units:
                arriving.kv.share(u, other.kv, positions)
            self._changed(sequence, 0)
            arriving.alike[source] = positions

    def _changed(self, sequence: int, first: int) -> None:
        """Positions from `first` on are not those any more that other sequences share."""
        own = self._sequences[sequence].alike
        for other in own:
            own[other] = min(own[other], first)
        for arriving in self._sequences.values():
            if sequence in arriving.alike:
                arriving.alike[sequence] = min(arriving.alike[sequence], first)

    def alike(self, sequence: int) -> Mapping[int, int]:
        """By other sequence: how many positions are said to have the same tokens (`share`)."""
        with self.locked() as sequences:
            arriving = sequences.get(sequence)
            return {} if arriving is None else dict(arriving.alike)

    def positions(self, sequence: int, unit: int) -> int:
        """Number of positions of a sequence that have arrived for a unit."""
        with self.locked() as sequences:
            arriving = sequences.get(sequence)
            return 0 if arriving is None else arriving.kv.positions(unit)

    def close(self) -> None:
        """Forgets all sequences, and frees their pages. Later calls raise ValueError."""
        with suppress(ValueError):  # the stage has been closed
            self._ready()
        with self._lock:
            self._closed = True
            self._free()

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def make_room(self) -> bool:
        """Drops everything for a run that needs the pages. False: there was nothing."""
        with self._lock:
            found = bool(self._sequences)
            self._dropped = self._dropped or found
            self._free()
            return found

    def unlock(self) -> None:
        """Replaces the lock. Called in a forked process, where the thread that held it does not exist."""
        self._lock = threading.Lock()

    @contextmanager
    def locked(self) -> Iterator[Mapping[int, Arriving]]:
        """The sequences, which do not change meanwhile. ValueError: closed. ContextError: dropped."""
        self._ready()
        with self._lock:
            if self._closed:
                raise ValueError("the staging area has been closed")
            if self._dropped:
                raise ContextError(
                    "keys and values that were to move here made room for running answers: end another "
                    "request, or promise more RAM"
                )
            yield self._sequences

    def _arriving(self, sequence: int) -> Arriving:
        if sequence not in self._sequences:
            kv = SequenceKv(self._pool, self._states, self._context)
            self._sequences[sequence] = Arriving(kv)
        return self._sequences[sequence]

    def _free(self) -> None:
        for arriving in self._sequences.values():
            arriving.kv.truncate(0)
        self._sequences = {}
