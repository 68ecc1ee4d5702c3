"""What a chain is worth in the end: by its goal's formula, or, where several streams gather in shared calls
or a prompt comes in chunks, by following them. No search can minimise the latter, so there the searches'
answers are candidates, which `Judge.best` compares and improves."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from .dp import Chain, parts
from .goal import Goal
from .rows import Cluster, Stage
from .tables import TimeTables

TRIALS = 100  # chains that are followed for one plan
MOVES = (1, -1, 2, -2, 4, -4)  # units that a boundary moves by
BETTER = 1 - 1e-9


@dataclass(frozen=True, slots=True)
class Found:
    """A search's answer with the problem that it answers, and its worth."""

    tables: TimeTables
    goal: Goal
    chain: Chain
    how: str
    optimal: bool
    value: float


def stages_of(cluster: Cluster, chain: Chain) -> list[Stage]:
    """A chain by device index as stages."""
    return [Stage(cluster.devices[j].name, first, last) for j, first, last in chain.stages]


@dataclass(frozen=True, slots=True)
class Following:
    """What gives the seconds of a chain where no formula does, and what it follows, in words."""

    what: str
    seconds: Callable[[Sequence[Stage]], float]


class Judge:
    """Judges chains for one question, by `following` where that is given."""

    def __init__(self, cluster: Cluster, following: Following | None) -> None:
        self._cluster, self._following = cluster, following
        self._known: dict[tuple[tuple[int, int, int], ...], float] = {}

    def value(self, tables: TimeTables, goal: Goal, chain: Chain) -> float:
        """Seconds of a token, or until the first one."""
        if self._following is None:
            return goal.value(*parts(tables, chain))
        if chain.stages not in self._known:
            stages = stages_of(self._cluster, chain)
            self._known[chain.stages] = self._following.seconds(stages)
        return self._known[chain.stages]

    def best(self, found: Sequence[Found]) -> Found:
        """The best of the answers to a question's goals: where it follows something, after each had its
        boundaries moved as long as that helped."""
        if self._following is None:
            return replace(min(found, key=lambda one: one.value), optimal=all(one.optimal for one in found))
        ranked = sorted(found, key=lambda one: one.value)
        best = min((self._improved(one, TRIALS // len(ranked)) for one in ranked), key=lambda one: one.value)
        followed = f" and boundaries moved, by following {self._following.what}"
        how = best.how if best.how.endswith(followed) else best.how + followed
        return replace(best, how=how, optimal=False)

    def _improved(self, found: Found, trials: int) -> Found:
        moves = [(at, by) for at in range(len(found.chain.stages) - 1) for by in MOVES]
        last = 0  # the move that helped last
        at = 0
        while moves and at - last < len(moves) and at < trials:
            moved = _moved(found, *moves[at % len(moves)])
            at += 1
            if moved is None:
                continue
            value = self.value(found.tables, found.goal, moved)
            if value < found.value * BETTER:
                found, last = replace(found, chain=moved, value=value), at
        return found


def _moved(found: Found, at: int, by: int) -> Chain | None:
    """The chain with the boundary after stage `at` moved, if that is possible and there is room."""
    stages, tables = list(found.chain.stages), found.tables
    (i, first, cut), (j, _, last) = stages[at : at + 2]
    cut += by
    if not first < cut < last or not (tables.fits(i, first, cut) and tables.fits(j, cut, last)):
        return None
    stages[at : at + 2] = [(i, first, cut), (j, cut, last)]
    return Chain(tuple(stages), found.chain.total)
