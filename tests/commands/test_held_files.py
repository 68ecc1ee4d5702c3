"""Fetched models on the disk: what is left of a file that was being fetched, and what is removed for
others."""

import argparse
import errno
import hashlib
import os
import random
import subprocess
import sys
import time
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal import held_files
from shoal.commands import ls, rm
from shoal.engine.errors import ModelFileError, ShoalError
from shoal.engine.hash_cache import HashCache
from shoal.engine.index import FileEntry, Index, UnitEntry
from shoal.engine.temporary import new_directory
from shoal.held_files import HeldFiles, Stored, fetched_directory, local_model, make_skeleton, to_remove
from shoal.net.files import PIECE, pieces
from shoal.part_file import PartFile, read_record, record_line

MB = 1_000_000
SMALL = {"config.json": b"{}", "common.safetensors": b"common"}


def unit(u: int) -> str:
    return f"unit-{u:03d}.safetensors"


def skeleton(seed: int, units: int = 4) -> tuple[Path, dict[str, bytes]]:
    """A fetched model without its units, and the files of these: a megabyte each."""
    every = {unit(u): random.Random(f"{seed} {u}").randbytes(MB) for u in range(units)}
    entries = {n: FileEntry(len(d), hashlib.sha256(d).hexdigest()) for n, d in (every | SMALL).items()}
    listed = tuple(UnitEntry(f"u{u}", (unit(u),)) for u in range(units))
    index = Index("int8", "llama", "hf:org/name", None, entries, ("common.safetensors",), listed).to_json()
    return make_skeleton(hashlib.sha256(index).hexdigest(), index, SMALL), every


def fetch(
    files: HeldFiles, every: dict[str, bytes], units: Collection[int], in_use: Collection[int] = ()
) -> str:
    """Fetches what the disk has room for; returns the problem."""
    room = files.make_room(sorted(units), in_use)
    for name in room.names:
        part = files.part(name)
        assert part is not None
        part.write(0, every[name])
        part.keep(0, hashlib.sha256(every[name]).digest(), "a")
        assert part.finish(lambda: False)
        part.close()
    return room.problem


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


DIGEST = st.binary(min_size=32, max_size=32)
LINES = st.lists(st.tuples(st.integers(0, 5), st.none() | DIGEST, st.text(max_size=5)))


@given(lines=LINES, cut=st.integers(0, 500), tail=st.text(max_size=40))
def test_a_record_that_is_torn_or_damaged_says_only_what_was_written(
    lines: list[tuple[int, bytes | None, str]], cut: int, tail: str
) -> None:
    size = 4 * PIECE + 1
    text = "".join(record_line(*line) for line in lines)
    expected = dict[int, tuple[bytes, str]]()
    states = [{}]
    for piece, digest, source in lines:
        if piece < pieces(size):
            expected.pop(piece, None)
            if digest is not None:
                expected[piece] = digest, source
        states.append(dict(expected))
    assert read_record(text, size) == expected
    assert read_record(text[: max(0, len(text) - cut)], size) in states
    damaged = read_record(text + tail.replace("\n", ""), size)
    assert damaged == expected, "a line without its end says nothing"
    read_record(tail + text, size)


def test_a_part_keeps_the_pieces_that_are_right_and_no_others(tmp_path: Path) -> None:
    data = random.Random(1).randbytes(2 * PIECE + 7)
    entry, ended = FileEntry(len(data), hashlib.sha256(data).hexdigest()), list[bool]()

    def part() -> PartFile:
        return PartFile(tmp_path / "file", entry, HashCache(tmp_path), ended.append)

    first = part()
    for piece in range(3):
        first.write(piece * PIECE, data[piece * PIECE : (piece + 1) * PIECE])
        digest = hashlib.sha256(data[piece * PIECE : (piece + 1) * PIECE]).digest()
        first.keep(piece, digest, f"source {piece}")
    with pytest.raises(BlockingIOError):
        part()
    first.forget([0])
    first.close()
    with (tmp_path / "file.part").open("r+b") as file:
        file.seek(2 * PIECE)
        file.write(b"torn")

    second = part()
    assert {piece: source for piece, (_, source) in second.have.items()} == {1: "source 1"}
    assert not second.finish(lambda: False) and not second.have
    second.write(0, data)
    assert second.finish(lambda: True)
    second.close()
    assert ended == [False, True]
    assert {path.name for path in tmp_path.iterdir()} == {"file", "stamps.json"}
    assert (tmp_path / "file").read_bytes() == data


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is full")
def test_a_part_whose_record_finds_the_disk_full_is_closed_all_the_same(tmp_path: Path) -> None:
    data, ended = random.Random(1).randbytes(100), list[bool]()
    entry = FileEntry(len(data), hashlib.sha256(data).hexdigest())
    part = PartFile(tmp_path / "file", entry, HashCache(tmp_path), ended.append)
    part.write(0, data)
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, part._record.fileno())
    os.close(full)
    with pytest.raises(OSError, match="No space left"):
        part.keep(0, hashlib.sha256(data).digest(), "a")
    part.close()
    assert ended == [False]


def test_a_part_that_cannot_be_used_leaves_nothing_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = FileEntry(5, hashlib.sha256(b"bytes").hexdigest())

    def full(descriptor: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def part() -> PartFile:
        return PartFile(tmp_path / "file", entry, HashCache(tmp_path), lambda whole: None)

    with monkeypatch.context() as patch:
        patch.setattr(os, "ftruncate", full)
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(3):
            with pytest.raises(OSError, match="No space"):
                part()
        assert len(os.listdir("/proc/self/fd")) == before
    (tmp_path / "file.have").write_bytes(b"\xff\xfe\x80\n")  # what is left of a loss of power
    part().close()


STORED = st.builds(
    Stored,
    st.sampled_from(["own", "a", "b", "c"]),
    st.text("xyz", max_size=2),
    st.integers(0, 50),
    st.floats(0, 9),
)


@given(stored=st.lists(STORED, max_size=8), over=st.integers(-5, 200))
def test_no_more_is_removed_than_needed_and_other_models_go_first(stored: list[Stored], over: int) -> None:
    chosen, missing = to_remove(stored, "own", over)
    freed = sum(one.bytes for one in chosen)
    assert missing == max(0, over - freed)
    assert missing == 0 or len(chosen) == len(stored)
    assert not chosen or freed - chosen[-1].bytes < over, "the last one was needed"
    left = list(stored)
    for one in chosen:
        left.remove(one)
    for one in chosen:
        assert all(not (one.model == "own" != other.model) for other in left)
        assert all(other.used >= one.used for other in left if (other.model == "own") == (one.model == "own"))


def test_files_of_other_models_go_first_and_what_is_wanted_or_used_stays(cache: Path) -> None:
    (old_path, old), (new_path, new) = skeleton(1), skeleton(2)
    files = HeldFiles(old_path, 100 * MB)
    assert fetch(files, old, range(4)) == "" and files.complete
    files.close()
    os.utime(old_path, (1, 1))

    files = HeldFiles(new_path, int(4.5 * MB))
    problem = fetch(files, new, [0, 1])
    assert not old_path.exists() and files.held() == {0, 1} and not problem
    assert fetch(files, new, [2, 3]) == "", "there is room for all four"
    assert files.held() == {0, 1, 2, 3}
    files.close()

    files = HeldFiles(new_path, int(2.5 * MB))
    os.unlink(new_path / unit(3))
    files.close()
    files = HeldFiles(new_path, int(2.5 * MB))
    assert files.held() == {0, 1, 2}
    problem = fetch(files, new, [3], in_use=[1])
    assert files.held() == {1, 3} and not problem, "what a stage uses stays"
    problem = fetch(files, new, [0, 3], in_use=[1])
    assert files.held() == {1, 3} and "MB are missing on the disk" in problem and "--disk allows" in problem


def test_nothing_is_removed_that_another_process_uses(cache: Path) -> None:
    (old_path, old), (new_path, new) = skeleton(1), skeleton(2)
    files = HeldFiles(old_path, 100 * MB)
    fetch(files, old, range(4))
    files.close()
    code = "from shoal.held_files import *; "
    code += f"f = HeldFiles(Path({str(old_path)!r}))\nprint(len(f.held()), flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=dict(os.environ)
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == b"4\n"
        files = HeldFiles(new_path, 3 * MB)
        assert "are missing" in fetch(files, new, [0]) and old_path.exists()
        with pytest.raises(ShoalError, match="a shoal process uses the model"):
            rm.run(argparse.Namespace(names=[old_path.name[:12]]))
        other.communicate(b"\n")
    assert not fetch(files, new, [0]) and not old_path.exists()


def test_what_can_be_removed_makes_room_when_other_files_are_in_use(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (used_path, used), (path, every) = skeleton(1), skeleton(2)
    holder = HeldFiles(used_path, 100 * MB)
    fetch(holder, used, [0])
    files = HeldFiles(path, 100 * MB)
    fetch(files, every, [0, 1])
    files.close()
    files = HeldFiles(path, int(3.5 * MB))
    assert fetch(files, every, [1, 2]) == "" and used_path.exists()
    assert files.held() == {1, 2}, "the model in use would have gone first"
    files.close()
    holder.close()


def test_a_skeleton_is_made_of_the_models_files_alone(cache: Path) -> None:
    path, every = skeleton(3)
    index = (path / "index.json").read_bytes()
    assert path == fetched_directory() / path.name == local_model(path.name)
    assert local_model("0" * 64) is None
    for wrong in ({**SMALL, "config.json": b"{ }"}, {"config.json": SMALL["config.json"]}):
        with pytest.raises(ModelFileError, match="that arrived is not that of the index"):
            make_skeleton(path.name, index, wrong)
    with pytest.raises(ModelFileError, match="is not that of the model"):
        make_skeleton("0" * 64, index, SMALL)
    files = HeldFiles(path)
    fetch(files, every, [2])
    files.close()
    assert make_skeleton(path.name, index, SMALL) == path, "what is there stays"
    assert HeldFiles(path).held() == {2}
    (path / unit(2)).write_bytes(bytes(MB))
    assert HeldFiles(path).held() == set(), "an altered file is fetched again"


def test_two_nodes_that_begin_at_once_make_one_skeleton(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Path] = []

    @contextmanager
    def slowly(path: Path, *, replace: bool) -> Iterator[Path]:
        made.append(path)
        time.sleep(0.2)  # in which the other one would begin, too
        with new_directory(path, replace=replace) as new:
            yield new

    monkeypatch.setattr(held_files, "new_directory", slowly)
    with ThreadPoolExecutor() as pool:
        (one, files), (other, _) = pool.map(skeleton, (6, 6))
    assert one == other == made[0] and len(made) == 1
    assert set(SMALL) <= {path.name for path in one.iterdir()} and files


def test_fetched_models_are_listed_and_removed(
    cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, every = skeleton(4)
    files = HeldFiles(path)
    fetch(files, every, [0, 1])
    files.close()
    ls.run(argparse.Namespace())
    (line,) = [line for line in capsys.readouterr().out.splitlines() if path.name[:12] in line]
    assert "int8, part" in line and "2.0 of 4.0" in line and "hf:org/name" in line
    with pytest.raises(ShoalError, match="there is no model"):
        rm.run(argparse.Namespace(names=[path.name[:5]]))
    rm.run(argparse.Namespace(names=[path.name[:12]]))
    assert not path.exists() and held_files.fetched_models() == []
