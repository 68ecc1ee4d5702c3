"""The texts that start a command with the device, read as systemd and a shell read them."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from shoal.boot import systemd_unit, termux_script
from shoal.cli import main

WORDS = ["up", "my model's 50% $HOME", "--http", "[::]:80", "--print-systemd"]
PLACES = {"XDG_CACHE_HOME": "/data/a b", "PATH": "/bin"}


def test_a_unit_has_the_same_words_and_the_places_of_keys_and_models() -> None:
    lines = systemd_unit(WORDS, PLACES).splitlines()
    (start,) = (line.removeprefix("ExecStart=") for line in lines if line.startswith("ExecStart="))
    assert start == f'{sys.executable} -m shoal up "my model\'s 50%% $$HOME" --http [::]:80'
    assert 'Environment="XDG_CACHE_HOME=/data/a b"' in lines and "PATH" not in start
    assert "Restart=always" in lines and "WantedBy=default.target" in lines


def test_a_script_runs_the_same_words_and_starts_them_again(tmp_path: Path) -> None:
    """In place of Python and Termux's commands, programs that say what they were given."""
    for name in ("termux-wake-lock", "sleep", "python"):
        program = tmp_path / name
        program.write_text(
            f'#!/bin/sh\necho {name} "$@" >> {tmp_path}/said\n[ {name} != sleep ] || kill $PPID\n'
        )
        program.chmod(0o755)
    script = termux_script(WORDS, PLACES).replace(shlex.quote(sys.executable), str(tmp_path / "python"))
    subprocess.run(
        ["sh", "-c", script], env={"PATH": f"{tmp_path}:/bin:/usr/bin", "HOME": str(tmp_path)}, check=False
    )
    assert (tmp_path / "said").read_text().splitlines() == [
        "termux-wake-lock",
        "python -m shoal up my model's 50% $HOME --http [::]:80",
        "sleep 30",
    ]
    assert script.startswith("#!/data/data/com.termux/files/usr/bin/sh\n")


def test_the_commands_print_them(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["up", "tiny", "--print-termux-boot"], ["node", "--print-systemd"]):
        monkeypatch.setattr(sys, "argv", ["shoal", *words])
        assert main(words) == 0
        assert " ".join(words[:-1]) in capsys.readouterr().out
