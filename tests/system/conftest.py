"""What the tests of the system's refusals share: command lines in processes of their own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from tests.patience import LIMIT

from shoal.engine.convert import convert

TINY = Path(__file__).parents[1] / "fixtures" / "tiny-llama"


@pytest.fixture(scope="session")
def cache_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An XDG_CACHE_HOME in which a model with a tokenizer has the name tiny."""
    home = tmp_path_factory.mktemp("cache")
    checkpoint = home / "checkpoint"
    shutil.copytree(TINY, checkpoint)
    vocab = {
        chr(256 + i): i for i in range(json.loads((TINY / "config.json").read_text("utf-8"))["vocab_size"])
    }
    tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [], unk_token=chr(256))).save(
        str(checkpoint / "tokenizer.json")
    )
    convert(checkpoint, home / "shoal" / "models" / "tiny")
    return home


def environment(**changes: str | None) -> dict[str, str]:
    """This process's environment, without what would change a stream, and with the changes; None: unset."""
    hidden = ("PYTHONUNBUFFERED", "PYTHONIOENCODING", "PYTHONUTF8", "LC_ALL", "LANG")
    merged = {key: value for key, value in os.environ.items() if key not in hidden} | changes
    return {key: value for key, value in merged.items() if value is not None}


def shell(line: str, **changes: str | None) -> subprocess.CompletedProcess[bytes]:
    """A line of sh, in which "$S" is the shoal command."""
    return subprocess.run(
        ["sh", "-c", line.replace("$S", f"{sys.executable} -m shoal")],
        env=environment(**changes),
        capture_output=True,
        check=False,
        timeout=LIMIT,
    )
