"""Settings for every test: hypothesis draws the same cases each time, without a clock to race; and
`--library PATH`, for tests of the C code as some other build has it (make sanitize)."""

from pathlib import Path

import pytest
from hypothesis import settings

from shoal.engine.backends import native

settings.register_profile("shoal", deadline=None, derandomize=True, database=None)
settings.load_profile("shoal")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--library", type=Path, help="the C library to test")


def pytest_configure(config: pytest.Config) -> None:
    library = config.getoption("--library")
    if library is not None:
        from tests.kernels import harness

        native.library_path = harness.library_path = lambda: library
