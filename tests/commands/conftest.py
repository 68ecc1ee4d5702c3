"""What the tests of several commands and benches share."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal.engine.convert import convert
from shoal.engine.model_directory import Model


@pytest.fixture
def tiny_llama(tmp_path: Path) -> Model:
    convert(Path(__file__).resolve().parents[1] / "fixtures" / "tiny-llama", tmp_path / "tiny")
    return Model.open(tmp_path / "tiny")
