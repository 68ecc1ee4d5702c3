"""What happens to the sequences of a stage when its range of units changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .batch import Sampling
from .incoming import Arriving
from .kv import PagePool, SequenceKv
from .program import KvState


@dataclass(slots=True)
class OpenSequence:
    """A sequence of a stage."""

    kv: SequenceKv
    tokens: NDArray[np.int32]
    """Token ids by position; only [0, length) are valid."""
    length: int
    sampling: Sampling

    @classmethod
    def begun(
        cls, kv: SequenceKv, context: int, sampling: Sampling, history: Sequence[int] | NDArray[np.int32]
    ) -> OpenSequence:
        """A sequence of at most `context` positions with the tokens of a history."""
        tokens = np.zeros(context, np.int32)
        tokens[: len(history)] = history
        return cls(kv, tokens, len(history), sampling)


@dataclass(frozen=True, slots=True)
class Transition:
    """A change from the units `old` to the units `new`. `kept` has the positions that each sequence keeps;
    other sequences are closed. `arriving` has what other stages have sent. Units in `lost` may lack
    positions."""

    old: range
    new: range
    kept: Mapping[int, int]
    arriving: Mapping[int, Arriving]
    lost: range

    def check(self, sequences: Mapping[int, OpenSequence], states: Sequence[Sequence[KvState]]) -> None:
        """ValueError: tokens, keys or values of kept positions would be missing."""
        for number, positions in self.kept.items():
            if positions < 0:
                raise ValueError(f"sequence {number} cannot keep {positions} positions")
        needed = [u for u in self.new if states[u] and u not in self.lost]
        if not needed and any(u in self.lost for u in self.new):
            return  # what the range needs is run again, with its tokens
        for number, positions in self.kept.items():
            own, more = sequences.get(number), self.arriving.get(number)
            length = 0 if own is None else own.length
            if own is None and more is not None and more.sampling is not None:
                length = len(more.tokens)
            if length < positions:
                raise ValueError(
                    f"sequence {number} has the tokens of {length} positions here, not of {positions}"
                )
            for u in needed:
                stays = own is not None and u in self.old
                source = more if not stays and more is not None and more.kv.holds(u) else own
                held = 0 if source is None else source.kv.positions(u)
                if held < positions:
                    raise ValueError(
                        f"unit {u} holds {held} of the {positions} positions of sequence {number}: "
                        "send the others first"
                    )

        self._check_alike(sequences)

    def _check_alike(self, sequences: Mapping[int, OpenSequence]) -> None:
        """ValueError: two sequences were said to begin alike, and their tokens differ."""
        for number, positions in self.kept.items():
            alike = self.arriving[number].alike if number in self.arriving else {}
            for other, shared in alike.items():
                n = min(shared, positions, self.kept.get(other, 0))
                if list(self._tokens(sequences, number, n)) != list(self._tokens(sequences, other, n)):
                    raise ValueError(
                        f"sequences {number} and {other} share {n} positions, and their tokens differ"
                    )

    def _tokens(self, sequences: Mapping[int, OpenSequence], number: int, n: int) -> Sequence[int]:
        """The first n tokens of a sequence."""
        own = sequences.get(number)
        return list(self.arriving[number].tokens[:n]) if own is None else own.tokens[:n].tolist()

    def apply(
        self, sequences: dict[int, OpenSequence], pool: PagePool, states: Sequence[Sequence[KvState]]
    ) -> None:
        """Closes, truncates and takes over sequences, after `check`."""
        for number in [number for number in sequences if number not in self.kept]:
            sequences.pop(number).kv.truncate(0)
        for number, positions in self.kept.items():
            more = self.arriving.get(number)
            stay = self.old if number in sequences else range(0)
            if number not in sequences:
                if more is None or more.sampling is None:
                    continue
                kv = SequenceKv(pool, states, more.context)
                sequences[number] = OpenSequence.begun(kv, more.context, more.sampling, more.tokens)
            own = sequences[number]
            own.kv.keep(self.new.start, self.new.stop)
            for u in self.new if more is not None else ():
                if more is not None and more.kv.holds(u) and u not in stay and u not in self.lost:
                    own.kv.receive(u, more.kv)
            own.length = min(own.length, positions)
            own.kv.truncate(positions)
            own.kv.arrange(self.new.start, self.new.stop)
