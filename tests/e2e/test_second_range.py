"""The second range of a node: the table that two stages of a process share, its promise, and what it says."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from tests.patience import LIMIT

from shoal.cli import main
from shoal.engine.costs import tied_bytes
from shoal.engine.errors import NoPlanError
from shoal.engine.generate import generate
from shoal.engine.model_directory import Model
from shoal.engine.stage import Stage, StageOptions
from shoal.node_process import StageOpener
from shoal.planner import Device
from shoal.planner.home import second_bytes, second_range
from shoal.planning import planner_model
from shoal.second_range import two_rows
from shoal.up_first import second_range as option

MB = 1_000_000


@pytest.mark.parametrize("resident", [True, False])
def test_two_stages_of_a_process_hold_a_tied_table_once(smollm2: Path, resident: bool) -> None:
    model = Model.open(smollm2)
    last, options = model.n_units - 1, StageOptions(resident=resident, threads=1)
    with Stage(model, 0, 2, options) as first, Stage(model, last, last + 1, options) as second:
        tables = [
            {weight.data.ctypes.data for weight in stage._weights.of(*ends).values() if weight.rows == 49152}  # type: ignore[attr-defined]
            for stage, ends in ((first, (0, 1)), (second, (last, last + 1)))
        ]
        assert len(tables[0]) == 1 and tables[0] == tables[1]
    with Stage(Model.open(smollm2), 0, last + 1, options) as stage:  # after both were closed
        assert len(list(generate(stage, [1, 2, 3], max_tokens=3, end=()))) == 3


def test_a_second_range_opens_the_last_unit_within_its_promise(smollm2: Path) -> None:
    model, options = Model.open(smollm2), StageOptions(threads=1)
    device = Device("laptop", 300 * MB, 1e9, 1e9, base_bytes=60 * MB)
    first, second = second_range(planner_model(model, options), device, scratch=MB)
    assert first.ram_bytes + second.ram_bytes == device.ram_bytes
    assert second.ram_bytes < tied_bytes(model)  # the table is the first range's
    opener, last = StageOpener(model, options, second), model.n_units - 1
    assert opener.kv_bytes(last, last + 1) == 0 and opener.held_bytes == 0
    with opener(last, last + 1):
        assert opener.held_bytes == second.ram_bytes
    with pytest.raises(NoPlanError, match="MB are missing"):
        opener(last - 1, last + 1)


def test_a_second_range_nobody_has_asked_for_takes_little(smollm2: Path) -> None:
    costs, said = planner_model(Model.open(smollm2), StageOptions(threads=1)), list[str]()
    need = second_bytes(costs)

    def rows(ram: int, *, asked: bool) -> list[str]:
        device = Device("laptop", ram, 1e9, 1e9)
        return [row.name for row in two_rows(costs, device, 0, asked=asked, log=said.append)]

    assert rows(20 * need, asked=False) == ["laptop", "end of laptop"] and not said
    assert rows(19 * need, asked=False) == ["laptop"]
    assert "12 of the 219 MB promised: ask for it with --private" in said.pop()
    assert rows(19 * need, asked=True) == ["laptop", "end of laptop"]
    assert rows(need, asked=False) == ["laptop"] and "no room for the LM head" in said.pop()
    with pytest.raises(NoPlanError, match=r"no room for the LM head .* promise more with --ram"):
        rows(need, asked=True)


def test_the_head_has_a_second_range_as_asked() -> None:
    def options(private: bool | None, *, no_layers: bool = False) -> list[str]:
        return option(argparse.Namespace(private=private, no_layers=no_layers))

    assert options(True) == ["--both-ends", "always"]
    assert options(None) == ["--both-ends", "if-small"]
    assert options(False) == options(None, no_layers=True) == []


def test_both_ends_need_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["node", "--both-ends", "always"]) == 1
    assert "--both-ends is for the device of the coordinator, and needs a MODEL" in capsys.readouterr().err


@contextmanager
def node(model: Path, home: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """A node on a port of its own, which is ended."""
    command = [sys.executable, "-m", "shoal", "node", str(model), "--name", "laptop", *options]
    with subprocess.Popen(
        [*command, "--measure-seconds", "0.1"],
        env={**os.environ, "XDG_CONFIG_HOME": str(home)},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.terminate()
            process.communicate(timeout=LIMIT)
    assert process.returncode == 0


@pytest.mark.slow
def test_a_node_says_where_both_ranges_are(smollm2: Path, tmp_path: Path) -> None:
    ports = tmp_path / "ports"
    where = ("--listen", "127.0.0.1:0", "--port-file", str(ports))
    with node(smollm2, tmp_path, "--both-ends", "always", *where) as process:
        assert process.stdout is not None
        first, second = process.stdout.readline(), process.stdout.readline()
        assert "as laptop: " in first and "as end of laptop: the LM head, " in second
        assert [line in said for line, said in zip(ports.read_text().split(), (first, second), strict=True)]


def listening(pid: int) -> int:
    """The number of TCP sockets on which a process listens."""
    inodes = {
        fields[9]
        for line in Path("/proc/net/tcp").read_text().splitlines()
        if (fields := line.split())[3] == "0A"
    }
    held = set[str]()
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # it was closed meanwhile
            held.add(os.readlink(fd).removeprefix("socket:[").removesuffix("]"))
    return len(inodes & held)


@pytest.mark.slow
def test_a_node_without_a_second_range_listens_once(smollm2: Path, tmp_path: Path) -> None:
    ports = tmp_path / "ports"
    where = ("--listen", "127.0.0.1:0", "--port-file", str(ports), "--ram", "190")
    with node(smollm2, tmp_path, "--both-ends", "if-small", *where) as process:
        assert process.stdout is not None
        assert "as laptop: " in process.stdout.readline()
        assert len(ports.read_text().split()) == 1
        assert listening(process.pid) == 1
