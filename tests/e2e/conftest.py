"""The real model."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.models import smollm2_dir


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct in int8."""
    return smollm2_dir()
