"""Small real models: the committed tiny Llama, converted once per session."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tests.weights.checkpoints import HEAD, change_config, rewrite, tensors

from shoal.engine.convert import convert
from shoal.engine.model_directory import Model

FIXTURES = Path(__file__).parent.parent / "fixtures"


@pytest.fixture(scope="session", params=["f32", "int8", "int4", "int4-min"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """The tiny Llama in all types."""
    return _tiny(request.param, tmp_path_factory)


@pytest.fixture(scope="session")
def tiny_f32(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return _tiny("f32", tmp_path_factory)


@pytest.fixture(scope="session")
def tiny_int8(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return _tiny("int8", tmp_path_factory)


@pytest.fixture(scope="session", params=["int8", "int4", "int4-min", "int8-kv"])
def tiny_quantised(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return _tiny(request.param, tmp_path_factory)


@pytest.fixture(scope="session")
def tiny_tied(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """The tiny Llama in int8 with its embedding as LM head."""
    source = shutil.copytree(FIXTURES / "tiny-llama", tmp_path_factory.mktemp("tied") / "source")
    values = tensors(source)
    del values[HEAD]
    rewrite(source, values)
    change_config(source, tie_word_embeddings=True)
    convert(source, source / "model", dtype="int8")
    return Model.open(source / "model")


def _tiny(types: str, factory: pytest.TempPathFactory) -> Model:
    """`types`: a type, with -min for minima and an int8 head, or -kv for int8 keys and values."""
    target = factory.mktemp("models") / types
    dtype, _, more = types.partition("-")
    head = "int8" if more == "min" else None
    kv = "int8" if more == "kv" else None
    convert(
        FIXTURES / "tiny-llama",
        target,
        dtype=dtype,
        has_min=more == "min",
        head_dtype=head,
        kv_dtype=kv,
    )
    return Model.open(target)
