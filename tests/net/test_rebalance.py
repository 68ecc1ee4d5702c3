"""The rebalancer: when it proposes to move layers, which, and what it learns from the outcome."""

import pytest

from shoal.net.rebalance import expected_tokens


@pytest.mark.parametrize(
    ("made", "most", "expected"), [(0, 512, 64), (0, 10, 10), (100, 512, 100), (500, 512, 12), (12, 12, 0)]
)
def test_a_long_answer_is_expected_to_last(made: int, most: int, expected: int) -> None:
    assert expected_tokens(made, most) == expected
