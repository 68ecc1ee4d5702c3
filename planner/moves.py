"""Which one boundary should move: a few layers from a stage to its neighbour, by the same cost model as
plans. Whoever sees the cluster at work asks, with devices and links as measured now (net/pace.py) and a
workload of the depth that the sequences have, and weighs the gain against the bytes that must travel."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from . import cost
from .evaluation import check_stages, token_seconds
from .rows import Assignment, Question
from .streams import Follower

MOST_UNITS = 2  # of one move
NOTHING = 1e-9  # of a token: a gain below that is none


@dataclass(frozen=True, slots=True)
class Move:
    """Units [first, last) from the stage of `giver` to that of its neighbour `taker`, and the stages after
    it. `seconds` is what a token takes then (or until the first one, where that is the objective), `gain` how
    much less than now. Of the units: their weights, and the state of all sequences at the workload's
    depth."""

    giver: str
    taker: str
    first: int
    last: int
    stages: tuple[Assignment, ...]
    seconds: float
    gain: float
    weight_bytes: int
    state_bytes: int


def boundary_moves(
    question: Question, stages: Sequence[Assignment], most_units: int = MOST_UNITS
) -> Iterator[Move]:
    """Every move of up to `most_units` units across one boundary that leaves both stages a unit, within the
    RAM caps, whether it gains or not. ValueError: stages that are no chain of the question's."""
    check_stages(question, stages)
    model, load, follower = question.model, question.workload, Follower(question)
    now = token_seconds(question, stages, follower)
    for at, (left, right) in enumerate(pairwise(stages)):
        for by in (step for size in range(1, most_units + 1) for step in (-size, size)):
            cut = left.last + by
            if not left.first < cut < right.last:
                continue
            pair = (Assignment(left.device, left.first, cut), Assignment(right.device, cut, right.last))
            giver, taker, grown = (left, right, pair[1]) if by < 0 else (right, left, pair[0])
            device = question.cluster.device(taker.device)
            if cost.range_ram_bytes(model, device, load, grown.first, grown.last) > device.ram_bytes:
                continue
            after = (*stages[:at], *pair, *stages[at + 2 :])
            first, last = sorted((cut, left.last))
            units, seconds = model.units[first:last], token_seconds(question, after, follower)
            weights = sum(unit.bytes for unit in units)
            state = sum(cost.sequence_state_bytes(model, unit, load.decode_depth) for unit in units)
            sizes = weights, state * load.sequences
            yield Move(giver.device, taker.device, first, last, after, seconds, now - seconds, *sizes)


def best_move(question: Question, stages: Sequence[Assignment], most_units: int = MOST_UNITS) -> Move | None:
    """The move that gains most, of equal ones that with the fewest bytes; None: none gains anything."""
    moves = boundary_moves(question, stages, most_units)
    best = max(moves, key=lambda move: (move.gain, -move.weight_bytes - move.state_bytes), default=None)
    return best if best is not None and best.gain > NOTHING * (best.seconds + best.gain) else None
