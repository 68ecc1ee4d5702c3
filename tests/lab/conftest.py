"""The lab's tests: what this machine does not permit is not run, and said in the header and at the end."""

from __future__ import annotations

from pathlib import Path

import pytest
from bench.lab import ground
from tests.models import smollm2_dir

from shoal.engine.model_directory import Model

_LEFT_OUT = pytest.StashKey[int]()


def lacks() -> list[str]:
    """What this machine lacks for a whole lab, one sentence each."""
    reasons = (ground.lacks_namespaces(), ground.lacks_cgroups(), ground.lacks_cgroups("cpu"))
    return [reason for reason in reasons if reason]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests of the whole lab are left out where there can be none; those of its parts always run."""
    if not any(item.get_closest_marker("lab") for item in items) or not lacks():
        return
    whole = [item for item in items if item.get_closest_marker("whole_lab")]
    config.stash[_LEFT_OUT] = len(whole)
    config.hook.pytest_deselected(items=whole)
    items[:] = [item for item in items if item not in whole]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """The last word on what did not run."""
    left_out = config.stash.get(_LEFT_OUT, 0)
    if left_out:
        terminalreporter.write_line(
            f"{left_out} tests of the lab NOT run; this machine lacks {'; '.join(lacks())}"
        )


@pytest.fixture(scope="session")
def smollm2() -> Model:
    """SmolLM2-135M-Instruct in int8."""
    return Model.open(smollm2_dir())


@pytest.fixture(scope="session")
def labs() -> Path:
    """The folder of the labs that are described in files."""
    return Path(__file__).resolve().parents[2] / "bench" / "lab"
