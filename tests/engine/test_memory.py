"""Weights copied into memory give the same tokens as mapped ones, and let the files go."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shoal.engine import memory
from shoal.engine.backends.base import BoundProgram, WeightData
from shoal.engine.batch import Run, Want
from shoal.engine.host import Ram
from shoal.engine.model_directory import Model, unit_file
from shoal.engine.prepared import bind
from shoal.engine.safetensors_file import SafetensorsFile
from shoal.engine.stage import Stage, StageOptions
from shoal.engine.weights import WeightStore


def mapped(model: Model, weight: WeightData) -> bool:
    """Whether the weight's numbers stand in a file of the model that this process maps."""
    at = weight.data.ctypes.data
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, _, last = line.split()[0].partition("-")
        if int(first, 16) <= at < int(last, 16):
            return str(model.path) in line
    raise AssertionError("the weight is nowhere")


def bound_to(model: Model, first: int, last: int, resident: bool | None) -> BoundProgram:
    weights = WeightStore(model, resident)
    weights.load(first, last)
    return bind(weights, first, last, StageOptions())


@pytest.mark.parametrize("resident", [True, False])
def test_resident_or_mapped(tiny_int8: Model, resident: bool) -> None:
    n = len(tiny_int8.program.units)
    bound = bound_to(tiny_int8, 0, n, resident)
    assert all(mapped(tiny_int8, w) is not resident for (u, _), w in bound.weights.items() if u >= 0)
    logits = []
    for option in (resident, not resident):
        with Stage(tiny_int8, 0, n, StageOptions(resident=option)) as whole:
            whole.open_sequence(0)
            logits.append(whole.run([Run(0, 0, [3, 1, 4, 1, 5], Want.LOGITS)])[0].logits)
    np.testing.assert_array_equal(logits[0], logits[1])


def test_copied_only_where_there_is_room(tiny_int8: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    n = len(tiny_int8.program.units)
    for available, copied in ((100, False), (0, False), (None, False), (1 << 40, True)):
        monkeypatch.setattr(memory, "ram", lambda a=available: Ram(1 << 41, a))
        bound = bound_to(tiny_int8, 0, n, None)
        weight = next(w for (unit, _), w in bound.weights.items() if unit == 1)
        assert mapped(tiny_int8, weight) is not copied


def test_a_tied_table_is_copied_once(tiny_tied: Model) -> None:
    units = tiny_tied.program.units
    (name,) = units[-1].tied
    bound = bound_to(tiny_tied, 0, len(units), True)
    assert np.shares_memory(bound.weights[0, name].data, bound.weights[len(units) - 1, name].data)


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


@pytest.mark.parametrize("platform", ["linux", "android"])
def test_memory_that_is_forgotten_returns_to_the_system(
    monkeypatch: pytest.MonkeyPatch, platform: str
) -> None:
    monkeypatch.setattr("sys.platform", platform)
    block = memory.Arena(1 << 20, huge=False).take(1 << 20)
    block[:] = 7
    assert memory.forget(block) == 1 << 20
    assert not block.any()  # the system gives fresh pages of zeros


def test_a_file_that_becomes_shorter_while_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 50)
    with (tmp_path / "file").open("rb") as file, pytest.raises(OSError, match="became shorter"):
        memory.Arena(100).read(file, 100)


class Asked:
    """Files that the system was asked to read ahead, by name, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []
        monkeypatch.setattr(os, "posix_fadvise", self._advise)

    def _advise(self, fd: int, offset: int, length: int, advice: int) -> None:
        if advice == os.POSIX_FADV_WILLNEED:
            assert (offset, length) == (0, 0)  # all of it
            self.names.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name)


@pytest.mark.parametrize("resident", [True, False])
def test_files_are_read_ahead_in_the_order_of_their_use(
    tiny_int8: Model, monkeypatch: pytest.MonkeyPatch, resident: bool
) -> None:
    asked = Asked(monkeypatch)
    opened: list[tuple[str, list[str]]] = []
    check = Model.open_file

    def opening(model: Model, name: str, *rest: Any) -> SafetensorsFile:
        opened.append((name, list(asked.names)))
        return check(model, name, *rest)

    monkeypatch.setattr(Model, "open_file", opening)
    n = tiny_int8.n_units
    bound_to(tiny_int8, 1, n, resident)
    names = [unit_file(unit) for unit in range(1, n)]
    ahead = {name: before for name, before in opened if name in names}
    assert list(ahead) == names
    if resident:  # one file is read while another is copied
        assert [ahead[name] for name in names[:-1]] == [names[1:k] for k in range(2, n)]
    else:
        assert all(before == names for before in ahead.values())


def test_no_more_is_read_ahead_than_stays_in_ram(tiny_int8: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Asked(monkeypatch)
    sizes = [tiny_int8.index.files[unit_file(unit)].size for unit in (0, 1)]
    for available, names in (
        (None, []),
        (2 * sum(sizes), [unit_file(0), unit_file(1)]),
        (2 * sum(sizes) - 2, [unit_file(0)]),
    ):
        asked.names.clear()
        monkeypatch.setattr(memory, "ram", lambda a=available: Ram(1 << 41, a))
        tiny_int8.fetch_ahead(0, tiny_int8.n_units, memory.affordable())
        assert asked.names == names


@pytest.mark.parametrize("resident", [True, False])
def test_a_system_that_takes_no_advice(
    tiny_int8: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resident: bool
) -> None:
    def refuse(*_: int) -> None:
        raise OSError(errno.ENOSYS, "not here")

    monkeypatch.setattr(os, "posix_fadvise", refuse)
    memory.fetch_ahead(tmp_path / "missing")
    bound_to(tiny_int8, 0, tiny_int8.n_units, None if resident else False)
    monkeypatch.delattr(os, "posix_fadvise")
    bound = bound_to(tiny_int8, 0, tiny_int8.n_units, resident)
    assert bound.weights
