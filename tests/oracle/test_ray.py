"""The example with Ray Data, on a small file: two workers, and the scores of one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.models import tiny_chat_model

import shoal

pytestmark = pytest.mark.oracle

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "ray_data.py"


def test_an_llm_in_each_worker(tmp_path: Path) -> None:
    tiny_chat_model(tmp_path)
    texts = [f"The shoal of {number} fish turns" for number in range(40)] + ["x" * 1000, "y"]
    (tmp_path / "lines.txt").write_text("\n".join(texts) + "\n")
    arguments = [str(tmp_path / "tiny"), str(tmp_path / "lines.txt"), str(tmp_path / "scores")]
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), *arguments, "--workers", "2"],
        env=os.environ | {"RAY_USAGE_STATS_ENABLED": "0"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    with shoal.LLM(tmp_path / "tiny") as llm:
        assert llm.context < 1000
        scores = llm.score(texts[:40])
    expected: list[dict[str, Any]] = [
        {"text": text, "tokens": len(score.tokens), "logprob": score.logprob}
        for text, score in zip(texts, scores, strict=False)
    ]
    expected += [{"text": text, "tokens": None, "logprob": None} for text in texts[40:]]
    assert sorted(rows(tmp_path / "scores"), key=str) == sorted(expected, key=str)


def rows(directory: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet

    found: list[dict[str, Any]] = pyarrow.parquet.read_table(directory).to_pylist()
    return found
