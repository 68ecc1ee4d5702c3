"""bench/prefixes.py: rows are counted with and without sharing, and each line says which it was."""

from __future__ import annotations

from pathlib import Path

import pytest
from bench import prefixes
from tests.models import tiny_chat_model


def test_the_bench_counts_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_chat_model(tmp_path)
    sizes = ["--history", "60", "--prefix", "80", "--requests", "3", "--rounds", "1"]
    assert prefixes.main([str(tmp_path / "tiny"), *sizes]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if "shared" in line]
    rows = [int(line[-2]) for line in lines[2:]]
    own = 3 * (prefixes.OWN + prefixes.ANSWER - 1)
    assert rows == [3 * 80 + own, 80 + own]
    apart, shared = int(lines[0][4]), int(lines[1][3])
    assert shared < apart
