"""GGUF in parts: read as one checkpoint from any of them, and refused by name where they are not of one."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from tests.weights.conftest import TINY
from tests.weights.gguf_files import text, write_tiny

from shoal.engine.checkpoint import open_checkpoint
from shoal.engine.checkpoint.gguf_names import models_of, part_names
from shoal.engine.convert import convert
from shoal.engine.errors import ModelFileError
from shoal.engine.model_directory import Model

U16, I32 = (2, "H"), (5, "i")  # GGUF's types of split.no and split.count, and of split.tensors.count


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    """The tiny model in three parts, by the gguf package's own writer."""
    first = write_tiny(tmp_path / "tiny.gguf", split=12)
    return [first.with_name(name) for name in part_names(first.name)]


def change(path: Path, key: str, kind: tuple[int, str], value: int) -> None:
    """Sets a number in the metadata of a file."""
    data = path.read_bytes()
    at = data.index(text(key) + struct.pack("<I", kind[0])) + len(text(key)) + 4
    path.write_bytes(data[:at] + struct.pack("<" + kind[1], value) + data[at + struct.calcsize(kind[1]) :])


def test_parts_are_read_together_whichever_is_named(parts: list[Path], tmp_path: Path) -> None:
    assert [part.name for part in parts] == [f"tiny-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    original = open_checkpoint(TINY)
    for path in (*parts, tmp_path):
        together = open_checkpoint(path)
        assert set(together.names) == set(original.names)
        for name in original.names:
            np.testing.assert_array_equal(together.tensor(name), original.tensor(name))
    convert(parts[1], tmp_path / "from-parts", origin="x")
    convert(write_tiny(tmp_path / "whole.gguf"), tmp_path / "from-one", origin="x")
    assert Model.open(tmp_path / "from-parts").hash == Model.open(tmp_path / "from-one").hash


def test_a_first_part_may_hold_metadata_only(tmp_path: Path) -> None:
    first = write_tiny(tmp_path / "tiny.gguf", split=16, small_first=True)
    together = open_checkpoint(first)
    assert set(together.names) == set(open_checkpoint(TINY).names)
    assert together.config == open_checkpoint(first.with_name(part_names(first.name)[-1])).config
    for name in part_names(first.name)[1:]:
        first.with_name(name).unlink()
    with pytest.raises(
        ModelFileError, match=r"is part 1 of 3 of a checkpoint, and .*-00002-of-00003.gguf is miss"
    ):
        open_checkpoint(first)


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_a_missing_part_is_named(parts: list[Path], tmp_path: Path, missing: int) -> None:
    parts[missing].unlink()
    for path in (parts[(missing + 1) % 3], tmp_path):
        with pytest.raises(
            ModelFileError, match=rf"{parts[missing].name} is missing in its directory \(1 of 3 are\)"
        ):
            open_checkpoint(path)


def test_a_part_must_have_the_name_of_its_number(parts: list[Path], tmp_path: Path) -> None:
    renamed = parts[0].rename(tmp_path / "model.gguf")
    with pytest.raises(ModelFileError, match=r"model\.gguf is part 1 of 3 .* but its name is not"):
        open_checkpoint(renamed)
    swapped = parts[1].rename(parts[0])
    with pytest.raises(ModelFileError, match=r"is part 2 of 3 of a checkpoint, but its name is not"):
        open_checkpoint(swapped)


@pytest.mark.parametrize(
    ("key", "kind", "value", "message"),
    [
        ("split.no", U16, 0, "00002-of-00003.gguf: split.no is 0 and should be 1"),
        ("split.no", U16, 2, "00002-of-00003.gguf: split.no is 2 and should be 1"),
        ("split.no", U16, 3, "00002-of-00003.gguf: split.no is 3 and should be 1"),
        ("split.count", U16, 4, "00002-of-00003.gguf: split.count is 4 and should be 3"),
        ("split.tensors.count", I32, 9, "00002-of-00003.gguf: split.tensors.count is 9 and should be 30"),
    ],
)
def test_parts_that_disagree_are_named(
    parts: list[Path], key: str, kind: tuple[int, str], value: int, message: str
) -> None:
    change(parts[1], key, kind, value)
    with pytest.raises(ModelFileError, match=message):
        open_checkpoint(parts[0])


@pytest.mark.parametrize(("number", "count"), [(3, 3), (5, 0), (1, 1)])
def test_a_part_beyond_the_last_is_impossible(parts: list[Path], number: int, count: int) -> None:
    change(parts[0], "split.no", U16, number)
    change(parts[0], "split.count", U16, count)
    with pytest.raises(
        ModelFileError, match=f"split.no is {number} of split.count {count}, which is impossible"
    ):
        open_checkpoint(parts[0])


@pytest.mark.parametrize("total", [0, 29, 31])
def test_a_wrong_total_is_named(parts: list[Path], total: int) -> None:
    for part in parts:
        change(part, "split.tensors.count", I32, total)
    with pytest.raises(ModelFileError, match=f"split.tensors.count is {total}, and its 3 parts hold 30"):
        open_checkpoint(parts[0])


def test_a_tensor_in_two_parts_is_named(parts: list[Path], tmp_path: Path) -> None:
    parts[2].write_bytes(parts[1].read_bytes())
    change(parts[2], "split.no", U16, 2)
    with pytest.raises(
        ModelFileError, match=r"the tensor '.*' is in .*00002-of-00003.gguf and in .*00003-of-00003"
    ):
        open_checkpoint(tmp_path)


def test_a_damaged_part_is_named(parts: list[Path]) -> None:
    parts[2].write_bytes(parts[2].read_bytes()[:-1000])
    with pytest.raises(ModelFileError, match=r"00003-of-00003\.gguf is truncated"):
        open_checkpoint(parts[0])


def test_metadata_of_another_model_are_named(parts: list[Path]) -> None:
    """Parts by other writers repeat the metadata, which must then be equal."""
    data = parts[1].read_bytes()
    (pairs,) = struct.unpack("<Q", data[16:24])
    more = text("llama.block_count") + struct.pack("<II", 4, 7)
    changed = data[:16] + struct.pack("<Q", pairs + 1) + more + data[24:]
    parts[1].write_bytes(changed)
    with pytest.raises(
        ModelFileError, match=r"00002-of-00003\.gguf: llama\.block_count is not that of tiny-"
    ):
        open_checkpoint(parts[0])


def test_names_of_parts() -> None:
    assert part_names("a-00002-of-00002.gguf") == ["a-00001-of-00002.gguf", "a-00002-of-00002.gguf"]
    for alone in (
        "a.gguf",
        "a-00003-of-00002.gguf",
        "a-00000-of-00002.gguf",
        "a-1-of-2.gguf",
        "-00001-of-00002.gguf",
    ):
        assert part_names(alone) == [alone]
    names = [
        "q/b-00002-of-00002.gguf",
        "q/a.gguf",
        "README.md",
        "mmproj-a-f16.gguf",
        "q/imatrix.gguf",
        "c.mmproj.gguf",
    ]
    assert models_of(names) == {
        "q/a.gguf": ["q/a.gguf"],
        "q/b-00001-of-00002.gguf": ["q/b-00001-of-00002.gguf", "q/b-00002-of-00002.gguf"],
    }
