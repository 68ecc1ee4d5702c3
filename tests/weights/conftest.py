"""Checkpoints and model directories for the tests of weights, all small and made here."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tests.models import smollm2_dir

from shoal.engine.convert import convert

TINY = Path(__file__).parent.parent / "fixtures" / "tiny-llama"


@pytest.fixture(scope="session", params=["int8", "int4", "f32"])
def tiny_dtype(request: pytest.FixtureRequest) -> str:
    dtype: str = request.param
    return dtype


@pytest.fixture(scope="session")
def converted(tiny_dtype: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, converted; not to be changed (see `model_dir`)."""
    target = tmp_path_factory.mktemp("converted") / tiny_dtype
    convert(TINY, target, dtype=tiny_dtype)
    return target


@pytest.fixture
def model_dir(converted: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may damage."""
    return Path(shutil.copytree(converted, tmp_path / "model"))


@pytest.fixture
def checkpoint_dir(tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint that a test may damage."""
    return Path(shutil.copytree(TINY, tmp_path / "checkpoint"))


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The real model, int8; the first test run on a machine fetches it."""
    return smollm2_dir()
