"""Settings for every test: hypothesis draws the same cases each time, without a clock to race;
`--library PATH` selects the C library that another build made (make sanitize); this device has no house and
no head; and signals have their usual actions, since a shell that starts a program in the background may have
told it to ignore them."""

import os
import signal
from pathlib import Path

import pytest
from hypothesis import settings

from shoal.engine.backends import native

settings.register_profile("shoal", deadline=None, derandomize=True, database=None)
settings.load_profile("shoal")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--library", type=Path, help="the C library to test")


def pytest_configure(config: pytest.Config) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    os.environ["XDG_CONFIG_HOME"] = os.environ["XDG_RUNTIME_DIR"] = "/nonexistent"
    library = config.getoption("--library")
    if library is not None:
        from tests.kernels import harness

        native.library_path = harness.library_path = lambda: library
