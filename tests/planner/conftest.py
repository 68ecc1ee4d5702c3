"""What the planner's tests share."""

import pytest

from shoal.planner import milp


@pytest.fixture(scope="session")
def highs() -> milp.Solver:
    return milp.load_solver("highs")
