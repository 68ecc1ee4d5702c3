"""How concurrent sequences share calls: the formula against cases by hand."""

from dataclasses import replace

import pytest

from shoal.planner.cost import CALL_STEPS
from shoal.planner.groups import (
    MOST_SEQUENCES,
    Fixed,
    Grouping,
    Way,
    best_groups,
    grouping,
    groupings,
    of_many,
    plain_groupings,
    round_seconds,
    sizes,
)

FLAT = Fixed([0.0] + [0.004] * 32)
"""Calls of 4 ms, whatever their rows."""
USUAL = Fixed([0.0] + [0.004 + 0.0005 * rows for rows in range(1, 33)])
"""Calls that read weights for 4 ms and compute for 0.5 ms a row."""
EVEN = Fixed([0.002 * rows for rows in range(33)])
"""Calls whose rows take 2 ms each: sharing one gains nothing."""


def way(*stages: Fixed, hop: float = 0.001, row: float = 0.0) -> Way:
    return Way(stages, [hop] * (len(stages) + 1), [row] * (len(stages) + 1))


@pytest.mark.parametrize(
    ("count", "groups", "found"),
    [(8, 1, [8]), (8, 3, [3, 3, 2]), (3, 3, [1, 1, 1]), (7, 2, [4, 3])],
)
def test_sizes_differ_by_one_at_most(count: int, groups: int, found: list[int]) -> None:
    assert sizes(count, groups) == found


def test_a_round_is_a_lap_or_what_all_groups_take_on_the_busiest_stage_or_link() -> None:
    two = way(FLAT, FLAT)
    assert round_seconds(two, 4, 1) == pytest.approx(0.011)
    assert round_seconds(two, 4, 2) == pytest.approx(0.011)  # both stages work 8 ms of 11
    assert round_seconds(two, 4, 4) == pytest.approx(0.016)  # and now all the time
    slow = way(FLAT, FLAT, row=0.01)  # a link takes 10 ms a row
    assert round_seconds(slow, 4, 4) == pytest.approx(0.041)
    assert round_seconds(way(FLAT, row=0.01, hop=0.0), 4, 4) == pytest.approx(0.040)
    assert round_seconds(way(EVEN, hop=0.0), 5, 2) == pytest.approx(0.010)  # groups of 3 and 2


def test_attention_counts_for_each_row_and_position() -> None:
    deep = Fixed([0.0, 0.004, 0.004], position=1e-6)
    assert round_seconds(way(deep, hop=0.0), 2, 1, depth=1000) == pytest.approx(0.006)
    assert round_seconds(way(deep, hop=0.0), 2, 2, depth=1000) == pytest.approx(0.010)


def test_a_stage_that_idles_in_a_round_pays_for_one_pause() -> None:
    sleepy = Fixed([0.0] + [0.004] * 4, pause=0.002)
    assert round_seconds(way(sleepy), 1, 1) == pytest.approx(0.008)
    assert round_seconds(way(sleepy, hop=0.0002), 1, 1) == pytest.approx(0.0044)
    assert round_seconds(way(sleepy, hop=0.004), 4, 2) == pytest.approx(0.014)
    assert round_seconds(way(sleepy), 4, 4) == pytest.approx(0.016)  # always busy
    # The pauses of one stage make another one idle: 4 + 4 + 2 ms are more than the 9 ms of the first.
    other = Fixed([0.0] + [0.0045] * 4, pause=0.001)
    assert round_seconds(way(other, sleepy, hop=0.0), 2, 2) == pytest.approx(0.0115)


def test_a_group_for_each_stage_where_rows_cost_less_than_reading_the_weights() -> None:
    for stages in (1, 2, 3):
        chain = way(*[USUAL] * stages, hop=0.0001)
        for count in (stages, 2 * stages, 4 * stages):
            assert best_groups(chain, count) == stages
        assert best_groups(chain, 1) == 1


def test_more_groups_where_links_are_slow_and_fewer_where_a_stage_is() -> None:
    assert best_groups(way(USUAL, USUAL, hop=0.010), 16) == 4
    slow = Fixed([0.0] + [0.050 + 0.0005 * rows for rows in range(1, 33)])
    assert best_groups(way(USUAL, slow, USUAL, hop=0.0001), 16) == 1


def test_a_group_for_each_stage_unless_another_number_is_clearly_better() -> None:
    assert best_groups(way(FLAT, FLAT), 16) == 2  # as good as one
    # Two groups of two pass three stages as quickly as groups of two, one and one.
    assert best_groups(way(USUAL, USUAL, USUAL, hop=0.0001), 4) == 3
    # Four of one are 4 % quicker where links are slow, which is less than costs are known to.
    assert best_groups(way(USUAL, USUAL, USUAL, hop=0.005), 4) == 3


def test_fewer_groups_where_stages_read_from_one_memory() -> None:
    apart = way(USUAL, USUAL, hop=0.0005)
    one = replace(apart, shared=[[0, 1]])
    # The weights are read in 4.5 ms a call; for a group, both stages read in 7.2 ms, for two in 14.4 ms.
    assert [round_seconds(apart, 2, groups) for groups in (1, 2)] == pytest.approx([0.0115, 0.0105])
    assert [round_seconds(one, 2, groups) for groups in (1, 2)] == pytest.approx([0.0115, 0.0144])
    assert [best_groups(apart, count) for count in (2, 4, 16, 32)] == [2, 2, 2, 2]
    assert [best_groups(one, count) for count in (2, 4, 16, 32)] == [1, 1, 2, 2]
    # A stage that is on a machine of its own reads meanwhile.
    assert round_seconds(replace(way(USUAL, USUAL, USUAL, hop=0.0), shared=[[0, 2]]), 3, 3) == pytest.approx(
        0.0216
    )


def test_calls_never_have_more_rows_than_a_node_takes() -> None:
    assert best_groups(way(FLAT), 3 * CALL_STEPS) == 3
    assert [of_many(plain_groupings(2), count).groups for count in (1, 2, 32, 64, 65, 200)] == [
        1, 2, 2, 4, 5, 13,
    ]  # fmt: skip


def test_a_wait_is_what_three_laps_save_on_the_busiest_stage() -> None:
    assert grouping(way(FLAT), 4).wait == pytest.approx(0.012)
    assert grouping(way(FLAT), 1).wait == 0.0
    assert grouping(way(EVEN, hop=0.010), 4).wait == pytest.approx(0.0)
    slow = Fixed([0.0] + [0.050] * 32)
    found = grouping(way(FLAT, slow), 8)
    assert (found.groups, found.wait) == (1, pytest.approx(0.15))


def test_every_stage_and_link_is_done_with_a_slice_within_two_rounds() -> None:
    # A round takes 6.5 ms, and a call 4 ms and 0.5 ms a row: with the decoded one, 13 ms for 18 rows.
    assert grouping(way(USUAL), 1).rows == 17
    assert grouping(way(USUAL, USUAL), 1).rows > 17
    # On a stage of 2 ms a row, of rounds of 8.5 ms.
    assert grouping(way(USUAL, EVEN, hop=0.0), 1).rows == 5
    # A link takes 1 ms a row.
    assert grouping(way(USUAL, hop=0.0, row=0.001), 1).rows == 13


def test_slices_shrink_with_the_position_of_their_prompt() -> None:
    one = Grouping(1, 0.0, 12, 0.001)
    assert [one.slice(position) for position in (0, 1000, 100_000)] == [12, 6, 1]
    assert plain_groupings(2)[0].slice(0) == 4096


def test_the_table_has_a_row_for_each_number_of_sequences() -> None:
    table = groupings(way(USUAL, USUAL, hop=0.0001))
    assert len(table) == MOST_SEQUENCES
    assert [one.groups for one in table[:4]] == [1, 2, 2, 2]
    assert table[7] == grouping(way(USUAL, USUAL, hop=0.0001), 8)


def test_what_is_no_grouping_is_refused() -> None:
    for wrong in ((0,), (1, -1.0), (1, float("nan")), (1.5,), (1, 0.0, 0), (1, 0.0, 5000), (1, 0.0, 8, -1.0)):
        with pytest.raises(ValueError, match=r"group|rows of prompts"):
            Grouping(*wrong)  # type: ignore[arg-type]
