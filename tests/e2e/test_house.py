"""A house of three devices, as their owner types it: each is a directory with a key of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.patience import LIMIT

from shoal.processes import NodeSpec, RunningNode, end, start

pytestmark = pytest.mark.slow
PROMPT = ("What is the capital of France?", "-n", "8")


class Device:
    """Commands of one device."""

    def __init__(self, place: Path, name: str) -> None:
        self.name, self.environ = name, {**os.environ, "XDG_CONFIG_HOME": str(place / name)}

    def begin(self, *words: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "shoal", *words]
        return subprocess.Popen(
            command, env=self.environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def does(self, *words: str) -> tuple[int, str, str]:
        """A command's exit code, output and messages."""
        process = self.begin(*words)
        out, err = process.communicate(timeout=LIMIT)
        return process.returncode, out, err

    def invites(self, other: Device) -> str:
        """Pairs the other device with this one; returns what `join` said."""
        process = self.begin("invite", "--listen", "127.0.0.1:0", "--name", self.name)
        assert process.stdout is not None
        try:
            token = next(line.split()[-1] for line in process.stdout if "shoal join" in line)
            code, out, err = other.does("join", token, "--name", other.name, "--pair-only")
            assert (code, err) == (0, "")
            assert f"{other.name} has joined" in process.communicate(timeout=LIMIT)[0]
            return out
        finally:
            end([process])


@pytest.fixture
def running(smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[RunningNode]]:
    """Nodes of phone and tablet. The tablet joined later, so the phone has not heard of it yet."""
    laptop, phone, tablet = (Device(tmp_path, name) for name in ("laptop", "phone", "tablet"))
    assert "joined the house of laptop: 2 devices" in laptop.invites(phone)
    assert "joined the house of laptop: 3 devices" in laptop.invites(tablet)
    found: list[RunningNode] = []
    try:
        for device in (phone, tablet):
            with monkeypatch.context() as there:
                there.setenv("XDG_CONFIG_HOME", device.environ["XDG_CONFIG_HOME"])
                spec = NodeSpec(device.name, ram_mb=400, options=("--measure-seconds", "0.1"))
                found.append(start(smollm2, spec, tmp_path))
        yield found
    finally:
        end([node.process for node in found])


def test_a_house_answers_its_head_alone_and_goes_on_without_a_revoked_device(
    smollm2: Path, tmp_path: Path, running: list[RunningNode]
) -> None:
    laptop, phone, stranger = (Device(tmp_path, name) for name in ("laptop", "phone", "stranger"))
    ask = ("run", str(smollm2), *PROMPT)
    addresses = [f"{host}:{port}" for host, port in (node.address for node in running)]
    over = ("--nodes", ",".join(addresses))
    code, alone, _ = laptop.does(*ask)
    assert code == 0 and alone.strip()
    assert laptop.does(*ask, *over)[:2] == (0, alone)
    for device, why in ((phone, "not its head"), (stranger, "only devices of the house may connect here")):
        code, out, err = device.does(*ask, "--nodes", addresses[1])
        assert (code, out) == (18, "") and why in err
    assert laptop.does("devices", "revoke", "tablet")[0] == 0
    code, out, err = laptop.does(*ask, *over)
    assert (code, out) == (0, alone) and "is not a device of this house" in err
    assert [line.split()[0] for line in phone.does("devices")[1].splitlines()[2:]] == ["laptop", "phone"]
