"""The search on graphs that can be looked through by eye."""

from collections.abc import Hashable, Iterable

import pytest
from tests.explorer.search import Edge, Report, State, explore


class Graph:
    """A graph of numbered states from 0 on. Edges are (to, fault); -1 is a violation."""

    def __init__(self, edges: dict[int, list[tuple[int, bool]]], done: set[int]) -> None:
        self.edges, self.complete = edges, done

    def initial(self) -> State:
        return (0,)

    def successors(self, state: State) -> Iterable[Edge]:
        for to, fault in self.edges.get(state[0], []):
            yield Edge((state[0], to), fault, None if to < 0 else (to,), "bad" if to < 0 else "")

    def lacking(self, state: State) -> str:
        return "" if state[0] in self.complete else "work is left"

    def describe(self, state: State, action: Hashable) -> str:
        return f"{state[0]}: {action}"


def found(edges: dict[int, list[tuple[int, bool]]], done: set[int] | None = None) -> Report:
    return explore(Graph(edges, {9} if done is None else done))


def test_all_states_are_seen_once() -> None:
    report = found({0: [(1, False), (2, False)], 1: [(3, False)], 2: [(3, False)], 3: [(9, False)]})
    assert (report.states, report.edges, report.found) == (5, 5, None)
    assert len(report.finals) == 1


def test_the_trace_to_a_violation_is_the_shortest() -> None:
    report = found(
        {0: [(1, False)], 1: [(2, False), (4, True)], 2: [(3, False)], 3: [(-1, False)], 4: [(-1, False)]}
    )
    assert str(report.found).splitlines() == [
        "  1. 0: (0, 1)",
        "  2. FAULT 1: (1, 4)",
        "  3. 4: (4, -1)",
        "=> bad",
    ]


@pytest.mark.parametrize("done", [{9}, set[int]()])
def test_a_state_without_a_step_has_done_all_work(done: set[int]) -> None:
    report = found({0: [(9, False), (8, True)], 8: [(9, False)]}, done)
    assert (report.found is None) == bool(done)
    report = found({0: [(9, False), (8, True)]})
    assert report.found is not None and "work is left" in report.found.what
    assert report.found.trace == ("  1. FAULT 0: (0, 8)",)


def test_faults_do_not_count_as_a_way_on() -> None:
    report = found({0: [(9, True)]})
    assert report.found is not None and report.found.trace == ()


def test_a_run_that_never_ends_is_found() -> None:
    report = found(
        {
            0: [(1, False), (9, False)],
            1: [(2, False), (9, False)],
            2: [(3, False)],
            3: [(2, False), (9, False)],
        }
    )
    assert report.found is not None and "circle" in report.found.what
    assert report.found.trace[-2:] == ("2: (2, 3)", "3: (3, 2)")
    assert found({0: [(1, False)], 1: [(0, True), (9, False)]}).found is None  # a fault uses up its number


def test_a_search_may_be_cut_short() -> None:
    report = explore(Graph({i: [(i + 1, False)] for i in range(100)}, {100}), most=10)
    assert not report.whole and report.found is None
