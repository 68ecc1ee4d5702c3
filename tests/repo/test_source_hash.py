"""The hash that ties a compiled library to its sources."""

from pathlib import Path

from shoal.engine.source_hash import source_hash


def write(folder: Path, **files: str) -> Path:
    folder.mkdir()
    for name, content in files.items():
        (folder / name.replace("_", ".")).write_text(content)
    return folder


def test_a_folder_without_c_has_none(tmp_path: Path) -> None:
    assert source_hash(tmp_path / "absent") is None
    assert source_hash(write(tmp_path / "other", notes_txt="x")) is None


def test_every_c_source_counts_and_nothing_else(tmp_path: Path) -> None:
    first = source_hash(write(tmp_path / "a", pool_c="int x;", pool_h="", ops_inc="y"))
    assert first is not None
    assert len(first) == 64
    assert source_hash(write(tmp_path / "b", ops_inc="y", pool_h="", pool_c="int x;", pool_o="z")) == first
    others = [
        write(tmp_path / "c", pool_c="int y;", pool_h="", ops_inc="y"),
        write(tmp_path / "d", pool_c="int x;", ops_inc="y"),
        write(tmp_path / "e", pool_c="int x;", pool_h="y", ops_inc=""),
        write(tmp_path / "f", pool2_c="int x;", pool_h="", ops_inc="y"),
    ]
    assert len({first, *map(source_hash, others)}) == 5
