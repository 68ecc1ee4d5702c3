"""Small real models: the committed tiny Llama, converted once per session."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal.engine.convert import convert
from shoal.engine.shards import Model

FIXTURES = Path(__file__).parent.parent / "fixtures"


@pytest.fixture(scope="session", params=["f32", "int8"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """The tiny Llama in both types."""
    return _tiny(request.param, tmp_path_factory)


@pytest.fixture(scope="session")
def tiny_f32(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return _tiny("f32", tmp_path_factory)


@pytest.fixture(scope="session")
def tiny_int8(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return _tiny("int8", tmp_path_factory)


def _tiny(dtype: str, factory: pytest.TempPathFactory) -> Model:
    target = factory.mktemp("models") / dtype
    convert(FIXTURES / "tiny-llama", target, dtype=dtype)
    return Model.open(target)
