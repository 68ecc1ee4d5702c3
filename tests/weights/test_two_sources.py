"""Checkpoints that say a thing twice and differently: transformers' rule decides, and a warning says so."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tests.weights.checkpoints import EMBEDDING, HEAD, change_config, rewrite, tensors
from tests.weights.conftest import TINY
from tests.weights.rope_cases import CASES

from shoal.cli import main
from shoal.engine import families
from shoal.engine.config import parse_config
from shoal.engine.convert import convert
from shoal.engine.decoder import Decoder
from shoal.engine.errors import ModelFileError, ShoalError, UnsupportedModelError, Warn
from shoal.engine.model_directory import Model
from shoal.engine.rope import Rotation


def _noted(warnings: list[str]) -> Warn:
    """Notes warnings but the one that the tiny checkpoint has no tokenizer."""
    return lambda message: None if "tokenizer.json" in message else warnings.append(message)


def test_a_head_of_its_own_is_used_though_the_config_says_tied(
    checkpoint_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change_config(checkpoint_dir, tie_word_embeddings=True)
    warnings: list[str] = []
    convert(checkpoint_dir, checkpoint_dir / "out", dtype="f32", warn=_noted(warnings))
    model = Model.open(checkpoint_dir / "out")
    assert not model.program.units[-1].tied
    np.testing.assert_array_equal(model.unit_weights(4)["head.weight"].data, tensors(TINY)[HEAD])
    (warning,) = warnings
    assert "tie_word_embeddings" in warning
    assert f"{HEAD} differs from {EMBEDDING}" in warning
    assert main(["convert", str(checkpoint_dir), str(checkpoint_dir / "f32"), "--dtype", "f32"]) == 0
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
    convert(checkpoint_dir, checkpoint_dir / "out", dtype="f32", warn=_noted(warnings))
    assert bool(Model.open(checkpoint_dir / "out").program.units[-1].tied) == (row is None)
    assert len(warnings) == (row is not None)


def test_optional_keys_may_be_missing() -> None:
    """The defaults are those of transformers; the files themselves name the types of the weights."""
    values = json.loads((TINY / "config.json").read_text())
    full = parse_config(values, "x")
    values |= {
        "num_attention_heads": 4,
        "hidden_size": 64,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 2048,
    }
    needed = ["model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
    least = parse_config({key: values[key] for key in [*needed, "vocab_size"]}, "x")
    shape = Decoder.of(least)
    assert (shape.head_dim, shape.kv_heads, least.context) == (16, 4, 2048)
    assert (shape.norm_epsilon, shape.rotation, shape.tied) == (1e-6, Rotation(10000.0, ()), False)
    assert least.vocab == full.vocab
    for key in [*needed, "vocab_size"]:
        with pytest.raises(ModelFileError, match=f"x: {key} must "):
            Decoder.of(parse_config({k: v for k, v in values.items() if k != key}, "x"))


def test_a_tied_model_may_have_its_table_under_either_name(checkpoint_dir: Path) -> None:
    values = tensors(TINY)
    values[HEAD] = values.pop(EMBEDDING)
    rewrite(checkpoint_dir, values)
    change_config(checkpoint_dir, tie_word_embeddings=True)
    warnings: list[str] = []
    convert(checkpoint_dir, checkpoint_dir / "out", dtype="f32", warn=_noted(warnings))
    model = Model.open(checkpoint_dir / "out")
    assert model.program.units[-1].tied
    np.testing.assert_array_equal(model.unit_weights(0)["embed.weight"].data, values[HEAD])
    assert warnings == []


@pytest.mark.parametrize("case", CASES)
def test_rotary_positions_that_are_spelled_in_several_ways(checkpoint_dir: Path, case: str) -> None:
    changes, expected, odd = CASES[case]
    change_config(checkpoint_dir, rope_parameters=None)
    change_config(checkpoint_dir, **changes)
    warnings: list[str] = []
    convert(checkpoint_dir, checkpoint_dir / "out", dtype="f32", warn=_noted(warnings))
    rotation = Rotation.of(Model.open(checkpoint_dir / "out").config)
    assert {"rope_theta": rotation.theta, **dict(rotation.scaling)} == expected
    assert [odd in warning for warning in warnings if odd] == ([True] if odd else [])
    assert all(str(checkpoint_dir) in warning for warning in warnings)


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        (
            {"rope_scaling": {"rope_type": "mystery", "factor": 2.0}},
            UnsupportedModelError,
            "'mystery' is not supp",
        ),
        (
            {"rope_scaling": {"rope_type": None, "factor": 2.0}},
            UnsupportedModelError,
            "None is not supported",
        ),
        (
            {"rope_scaling": {"rope_type": ["linear"], "factor": 2.0}},
            UnsupportedModelError,
            "is not supported",
        ),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            UnsupportedModelError,
            "'dynamic' is not supported",
        ),
        (
            {"rope_scaling": {"type": "linear"}},
            UnsupportedModelError,
            "factor must be a positive number, not None",
        ),
        ({"rope_scaling": [2.0]}, ModelFileError, r"rope_scaling must be an object, not \[2\.0\]"),
        ({"rope_parameters": "linear"}, ModelFileError, "rope_parameters must be an object"),
        ({"rope_parameters": {"full": {"rope_theta": 1e4}}}, UnsupportedModelError, "differs among layers"),
        ({"partial_rotary_factor": 0.5}, UnsupportedModelError, "partial_rotary_factor is 0.5"),
        ({"rope_theta": None}, ModelFileError, "rope_theta must be a positive number, not None"),
    ],
)
def test_rotary_positions_that_are_not_here_are_refused(
    changes: dict[str, object], kind: type[ShoalError], message: str
) -> None:
    values = json.loads((TINY / "config.json").read_text())
    with pytest.raises(kind, match=f"^x: .*{message}"):
        families.build(parse_config({**values, "rope_parameters": None, **changes}, "x"))
