"""Checkpoints that say a thing twice and differently: transformers' rule decides, and a warning says so."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.weights.checkpoints import EMBEDDING, HEAD, change_config, rewrite, tensors
from tests.weights.conftest import TINY

from shoal.cli import main
from shoal.engine.convert import convert
from shoal.engine.shards import Model


def test_a_head_of_its_own_is_used_though_the_config_says_tied(
    checkpoint_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change_config(checkpoint_dir, tie_word_embeddings=True)
    warnings: list[str] = []
    convert(checkpoint_dir, checkpoint_dir / "out", dtype="f32", warn=warnings.append)
    model = Model.open(checkpoint_dir / "out")
    assert not model.config.tied
    np.testing.assert_array_equal(model.unit_weights(4)["head.weight"].data, tensors(TINY)[HEAD])
    (warning,) = warnings
    assert "tie_word_embeddings" in warning
    assert f"{HEAD} differs from {EMBEDDING}" in warning
    assert main(["convert", str(checkpoint_dir), str(checkpoint_dir / "again")]) == 0
    assert f"shoal: warning: {warning}" in capsys.readouterr().err.splitlines()


@pytest.mark.parametrize("row", [None, 0, 266])
def test_a_tied_table_that_is_stored_twice_is_no_head_of_its_own(
    checkpoint_dir: Path, row: int | None
) -> None:
    """Unless one value differs, in whichever row."""
    values = tensors(TINY)
    values[HEAD] = values[EMBEDDING].copy()
    if row is not None:
        values[HEAD][row, 3] += 1
    rewrite(checkpoint_dir, values)
    change_config(checkpoint_dir, tie_word_embeddings=True)
    warnings: list[str] = []
    convert(checkpoint_dir, checkpoint_dir / "out", dtype="f32", warn=warnings.append)
    assert Model.open(checkpoint_dir / "out").config.tied == (row is None)
    assert len(warnings) == (row is not None)
