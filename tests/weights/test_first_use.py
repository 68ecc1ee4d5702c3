"""Using a checkpoint that was not pulled: the costs are said first, and are right; then it answers."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tests.models import tiny_chat_checkpoint
from tests.patience import LIMIT
from tests.weights.gguf_files import write_tiny

from shoal import first_use
from shoal.cli import main
from shoal.engine.errors import ModelFileError
from shoal.fetch import WHEELS
from shoal.store import models_directory


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.slow
def test_a_directory_is_converted_on_first_use_and_not_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = tiny_chat_checkpoint(tmp_path / "Tiny")
    line = ["run", str(checkpoint), "hello", "-n", "3"]
    assert main(line) == 0
    first = capsys.readouterr()
    assert re.search(r"first use of .*Tiny: converting it to int8, which needs about 0 MB of disk", first.err)
    assert "of RAM to run it" in first.err and "its name from now on is tiny" in first.err
    assert main(line) == 0
    again = capsys.readouterr()
    assert again.out == first.out
    assert "first use" not in again.err
    assert main(["run", "tiny", "hello", "-n", "3"]) == 0
    assert capsys.readouterr() == (first.out, "")


@pytest.mark.slow
def test_a_gguf_file_is_converted_on_first_use(tmp_path: Path) -> None:
    write_tiny(tmp_path / "some.gguf", dtype=np.float16)
    assert first_use.model_directory(str(tmp_path / "some.gguf")) == models_directory() / "some"
    (tmp_path / "folder").mkdir()
    write_tiny(tmp_path / "folder" / "other.gguf")
    assert first_use.model_directory(str(tmp_path / "folder")) == models_directory() / "folder"


@pytest.mark.slow
def test_the_disk_that_is_said_is_the_disk_that_is_taken(tmp_path: Path) -> None:
    checkpoint = tiny_chat_checkpoint(tmp_path / "tiny")
    costs = first_use._costs(str(checkpoint))
    assert costs is not None and costs.download == 0
    directory = first_use.model_directory(str(checkpoint))
    units = sum(path.stat().st_size for path in directory.glob("unit-*"))
    # Files are padded to pages of 16 KiB, which is much for so small a model.
    padding = 2 * 16384 * len(list(directory.glob("unit-*")))
    assert costs.disk <= units <= costs.disk + padding
    assert costs.ram > costs.disk


@pytest.mark.slow
def test_the_real_model_takes_what_is_said(smollm2: Path) -> None:
    """Of the wheel's size alone, and of the configuration."""
    units = sum(path.stat().st_size for path in smollm2.glob("unit-*"))
    config = json.loads((smollm2 / "config.json").read_text())
    assert first_use._of_config(config, "smollm2", 0).disk == pytest.approx(units, rel=0.02)
    costs = first_use._costs("smollm2-135m")
    assert costs is not None and costs.download == WHEELS["smollm2-135m"].size
    assert costs.disk == pytest.approx(units, rel=0.15)


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("m-Q8_0.gguf", 8.6),
        ("m.Q4_K_M.gguf", 4.6),
        ("m.Q4_1.gguf", 5.0),
        ("m-q5_1.gguf", 6.0),
        ("m-IQ3_XXS.gguf", 3.6),
        ("m-q2_k.gguf", 2.6),
        ("m-F16.gguf", 16),
        ("m-bf16-00001-of-00003.gguf", 16),
        ("m-f32.gguf", 32),
        ("Qwen2-m.gguf", 4.6),  # the family's name is no type
        ("m.gguf", 4.6),
    ],
)
def test_the_type_in_a_files_name_tells_how_large_the_model_becomes(name: str, bits: float) -> None:
    costs = first_use._of_size(10**9, name)
    assert costs.disk == int(10**9 / bits * 8.5)
    assert str(costs).startswith("1,000 MB to download, about ")


@pytest.mark.parametrize("source", ["nothing-such", "./nothing", "some.gguf", "folder", "file.txt"])
def test_what_is_no_source_is_refused_as_before(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file.txt").write_text("text")
    with pytest.raises(ModelFileError, match=r"here|none yet"):
        first_use.model_directory(source)


def test_a_checkpoint_that_cannot_be_converted_is_refused_before_anything_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = tiny_chat_checkpoint(tmp_path / "tiny")
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "model_type": "mamba"}))
    assert main(["run", str(checkpoint), "hello"]) == 4
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.slow
def test_a_model_that_is_here_loads_nothing_that_converts(tmp_path: Path) -> None:
    checkpoint = tiny_chat_checkpoint(tmp_path / "tiny")
    assert main(["run", str(checkpoint), "hello", "-n", "1"]) == 0
    program = (
        "import sys; from shoal.cli import main; main(sys.argv[1:]);"
        "heavy = ('engine.convert', '.fetch', '.hub', '.sources');"
        "print([name for name in sys.modules if name.endswith(heavy)])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "run", "tiny", "hello", "-n", "1"],
        capture_output=True, text=True, timeout=LIMIT,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "[]", done
