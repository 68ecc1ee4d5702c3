"""bench/models.py: checkpoint, model directory and GGUF file of one shape hold the same weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from bench import models
from bench.models import Shape

from shoal.engine.checkpoint import Checkpoint, open_checkpoint
from shoal.engine.config import parse_config
from shoal.engine.decoder import Decoder
from shoal.engine.model_directory import Model
from shoal.engine.tokenizer import Tokenizer

SMALL = Shape(hidden=64, intermediate=96, layers=2, heads=4, kv_heads=2, vocab=400, context=128)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(models.SHAPES, "small", SMALL)
    return tmp_path / "shoal"


@pytest.fixture
def source(cache: Path) -> Checkpoint:
    return open_checkpoint(models.checkpoint("small"))


def test_the_checkpoint_has_the_shape_and_realistic_weights(source: Checkpoint) -> None:
    config = Decoder.of(parse_config(source.config, "here"))
    assert (config.hidden, config.layers, config.kv_heads, config.tied) == (64, 2, 2, False)
    table, head = source.tensor("model.embed_tokens.weight"), source.tensor("lm_head.weight")
    assert table.shape == head.shape == (400, 64)
    assert not np.array_equal(table, head)
    assert table.std() == pytest.approx(0.02, rel=0.05)
    down = source.tensor("model.layers.1.mlp.down_proj.weight")
    assert down.std() == pytest.approx(0.01, rel=0.05)  # 0.02 over the root of two adds a layer
    assert source.tensor("model.norm.weight").mean() == pytest.approx(1, abs=0.1)


def test_every_machine_and_run_makes_the_same(source: Checkpoint, tmp_path: Path) -> None:
    models.write_checkpoint(SMALL, tmp_path / "again", "small")
    files = sorted(path.name for path in source.path.iterdir())
    assert files == sorted(path.name for path in (tmp_path / "again").iterdir())
    assert len(files) == 6  # three of weights, their index, the configuration, the tokenizer
    assert all((source.path / f).read_bytes() == (tmp_path / "again" / f).read_bytes() for f in files)
    first = source.tensor("model.layers.0.self_attn.q_proj.weight")[0, :3]
    np.testing.assert_array_equal(first, [0.01419830322265625, -0.03369140625, 0.0302734375])


@pytest.mark.slow
def test_the_gguf_file_holds_the_same_weights_and_tokens(source: Checkpoint) -> None:
    other = open_checkpoint(models.gguf("small"))
    assert set(other.names) == set(source.names)
    for name in source.names:
        np.testing.assert_array_equal(other.tensor(name), source.tensor(name), err_msg=name)
    read, made = (parse_config(checkpoint.config, "") for checkpoint in (other, source))
    assert replace(read, values=made.values) == made
    shape = Decoder.of(read)
    assert shape.norm_epsilon == np.float32(1e-5)  # GGUF has it in f32
    assert replace(shape, norm_epsilon=1e-5) == Decoder.of(made)
    assert other.tokenizer_json() == source.tokenizer_json()


@pytest.mark.slow
def test_it_is_made_once_and_runs(source: Checkpoint, cache: Path) -> None:
    made = models.model("small")
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*.*") if path.suffix != ".lock"}
    assert models.main(["small", "--dtype", "int8"]) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert made == cache / "bench-models/small/int8"
    assert Model.open(made).dtype == "int8"
    tokenizer = Tokenizer.open(made)
    assert tokenizer.decode(tokenizer.encode("ab cd")) == "ab cd"
    assert not list(cache.rglob("*.part"))


def test_a_vocabulary_that_cannot_be_filled_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="286 to 36816 pieces, not 40000"):
        models.write_checkpoint(Shape(64, 96, 1, 4, 2, 40000), tmp_path / "large", "large")
