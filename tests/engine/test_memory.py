"""Weights copied into memory give the same tokens as mapped ones, and let the files go."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from shoal.engine import memory, stage
from shoal.engine.backends.base import WeightData
from shoal.engine.batch import Run, Want
from shoal.engine.convert import convert
from shoal.engine.shards import Model
from shoal.engine.stage import Stage, StageOptions

FIXTURES = Path(__file__).parents[1] / "fixtures"


def mapped(model: Model, weight: WeightData) -> bool:
    """Whether the weight's numbers stand in a file of the model that this process maps."""
    at = weight.data.ctypes.data
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, _, last = line.split()[0].partition("-")
        if int(first, 16) <= at < int(last, 16):
            return str(model.path) in line
    raise AssertionError("the weight is nowhere")


@pytest.mark.parametrize("resident", [True, False])
def test_resident_or_mapped(tiny_int8: Model, resident: bool) -> None:
    n = len(tiny_int8.program.units)
    linked = stage.link(tiny_int8, 0, n, StageOptions(resident=resident))
    assert all(mapped(tiny_int8, w) is not resident for (u, _), w in linked.weights.items() if u >= 0)
    logits = []
    for option in (resident, not resident):
        with Stage(tiny_int8, 0, n, StageOptions(resident=option)) as whole:
            whole.open(0)
            logits.append(whole.run([Run(0, 0, [3, 1, 4, 1, 5], Want.LOGITS)])[0].logits)
    np.testing.assert_array_equal(logits[0], logits[1])


def test_copied_only_where_there_is_room(tiny_int8: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    n = len(tiny_int8.program.units)
    for available, copied in ((100, False), (0, False), (1 << 40, True)):
        monkeypatch.setattr(memory, "ram", lambda a=available: (1 << 41, a))
        linked = stage.link(tiny_int8, 0, n, StageOptions())
        weight = next(w for (unit, _), w in linked.weights.items() if unit == 1)
        assert mapped(tiny_int8, weight) is not copied


def test_a_tied_table_is_copied_once(tmp_path: Path) -> None:
    source = shutil.copytree(FIXTURES / "tiny-llama", tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    convert(source, tmp_path / "model", dtype="int8")
    model = Model.open(tmp_path / "model")
    units = model.program.units
    (name,) = units[-1].tied
    linked = stage.link(model, 0, len(units), StageOptions(resident=True))
    assert np.shares_memory(linked.weights[0, name].data, linked.weights[len(units) - 1, name].data)


@pytest.mark.parametrize("pinned", [False, True])
def test_files_in_an_arena_are_whole_aligned_and_read_only(tmp_path: Path, pinned: bool) -> None:
    sizes = (1, 63, 64, 65, 5000, memory._CHUNK + 7)
    arena = memory.Arena(memory.room(sizes), pinned=pinned)
    for size in sizes:
        data = np.random.default_rng(size).bytes(size)
        (tmp_path / "file").write_bytes(data)
        with (tmp_path / "file").open("rb") as file:
            held = arena.read(file, size)
        assert bytes(held) == data
        assert held.readonly and np.frombuffer(held, np.uint8).ctypes.data % 64 == 0


def test_a_file_that_becomes_shorter_while_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 50)
    with (tmp_path / "file").open("rb") as file, pytest.raises(OSError, match="became shorter"):
        memory.Arena(100).read(file, 100)
