"""The protocol, explored in small worlds; `make check-protocol` explores larger ones."""

from dataclasses import replace

import pytest
import trio
from tests.explorer.bound import Bound
from tests.explorer.bounds import CRASH, LOAD, MOVE, ONE, PLANS, SHORT, SMALL
from tests.explorer.mutations import MUTATIONS, Mutation
from tests.explorer.search import Report, explore
from tests.explorer.world import Distributed


def run(model: Distributed) -> Report:
    async def main() -> Report:
        return explore(model)

    return trio.run(main)


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_no_run_violates_an_invariant(name: str) -> None:
    report = run(Distributed(SMALL[name]))
    assert report.found is None, str(report.found)
    assert report.whole and report.states > 50


@pytest.mark.slow
@pytest.mark.parametrize(
    "mutation", [m for m in MUTATIONS if m.bound in SMALL], ids=lambda m: m.change.__name__
)
def test_a_seeded_bug_is_found(mutation: Mutation) -> None:
    async def main() -> bool:
        return mutation.found()

    assert trio.run(main)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bound", "factor"),
    [
        (Bound((ONE,), PLANS, moves=(MOVE,)), 3.0),
        (Bound((ONE,), PLANS, moves=(MOVE,), quick=False), 10.0),
        (Bound((SHORT,), PLANS, faults=1, kinds=CRASH), 1.2),
        (Bound((SHORT,), PLANS, faults=1, kinds=frozenset({"stick"})), 3.0),
        (Bound((SHORT,), PLANS, moves=(MOVE,), faults=1, kinds=LOAD), 1.0),
    ],
    ids=("move", "slow nodes", "crash", "step stuck", "failed load"),
)
def test_the_reduction_loses_no_outcome(bound: Bound, factor: float) -> None:
    """The states in which a run can end are the same with fewer orders of steps."""
    model = Distributed(bound)
    reduced = run(model)
    model.bound = replace(bound, reduce=False)
    whole = run(model)
    assert reduced.finals == whole.finals
    assert reduced.states < whole.states / factor


def test_a_trace_can_be_read() -> None:
    mutation = next(m for m in MUTATIONS if m.change.__name__ == "forgets_a_flow")
    with mutation.seeded():
        report = run(Distributed(SMALL[mutation.bound]))
    lines = str(report.found).splitlines()
    assert any("move ((0, 0, 2), (1, 2, 4), (2, 4, 6)) is proposed" in line for line in lines)
    assert any("node 1 gets Commit 2 (session 0: 2)" in line for line in lines)
    assert lines[-1] == "=> a stage changes to epoch 2 and has 0 of 2 positions of session 0 in unit 2"
