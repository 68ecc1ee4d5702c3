"""What `make dist` made, ways to install it, and a model small enough to be emulated."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from tests.models import smollm2_dir

from shoal.engine.hash_cache import file_sha256
from shoal.engine.index import COMMON, CONFIG, INDEX, TOKENIZER, FileEntry, read_index
from shoal.engine.model_directory import unit_file

ROOT = Path(__file__).resolve().parents[2]
DIST = ROOT / "dist"
LOGITS = Path(__file__).with_name("logits.py")
LAYERS = 3
DEPENDENCIES = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a command without what this process's environment says of Python and compilers."""
    mine = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON") and k not in {"CC", "CFLAGS"}}
    words = [str(word) for word in command]
    done = subprocess.run(words, env=mine | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout}\n{done.stderr}"
    return done


def pip(python: Path | str, *arguments: str | Path, **environment: str) -> None:
    run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments, **environment)


def install_sdist(python: Path, target: Path, **environment: str) -> None:
    (sdist,) = DIST.glob("*.tar.gz")
    pip(python, "--no-deps", f"--target={target}", sdist, **environment)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 without all but its first layers: not a good model, but real weights and shapes."""
    whole, cut = smollm2_dir(), tmp_path_factory.mktemp("models") / "cut"
    index, _ = read_index(whole / INDEX)
    embedding, *layers, head = index.units
    units = (
        embedding,
        *layers[:LAYERS],
        dataclasses.replace(head, files=(unit_file(LAYERS + 1), *head.files[1:])),
    )
    cut.mkdir()
    for name in (COMMON, TOKENIZER, *(unit.files[0] for unit in units[:-1])):
        shutil.copy(whole / name, cut)
    shutil.copy(whole / head.files[0], cut / units[-1].files[0])
    config = json.loads((whole / CONFIG).read_text(encoding="utf-8")) | {"num_hidden_layers": LAYERS}
    (cut / CONFIG).write_text(json.dumps(config), encoding="utf-8")
    files = {path.name: FileEntry(path.stat().st_size, file_sha256(path)) for path in cut.iterdir()}
    (cut / INDEX).write_bytes(dataclasses.replace(index, files=files, units=units).to_json())
    return cut


@pytest.fixture(scope="session")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The python of an environment with the wheel that pip chooses here and what `shoal run` needs."""
    folder = tmp_path_factory.mktemp("clean")
    run(sys.executable, "-m", "venv", folder)
    python = folder / "bin" / "python"
    path = str(python.parent)  # where no compiler is
    pip(python, "--no-index", "--no-deps", f"--find-links={DIST}", "shoal", PATH=path)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
        "optional-dependencies"
    ]
    pip(python, "--only-binary=:all:", *DEPENDENCIES, *extras["run"], PATH=path)
    run(python, "-m", "pip", "check")
    return python


@pytest.fixture(scope="session")
def expected(clean: Path, model: Path) -> str:
    """What the definition computes on this machine."""
    backend, _, line = run(clean, LOGITS, model, "scalar").stdout.strip().partition(": ")
    assert backend == "native (scalar)"
    return line


@pytest.fixture(scope="session")
def like_bionic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a C library that calls itself bionic."""
    folder = tmp_path_factory.mktemp("like_bionic")
    source, versions = (Path(__file__).with_name(f"like_bionic.{suffix}") for suffix in ("c", "map"))
    compiler = (sys.executable, "-m", "ziglang", "cc", "-target", "aarch64-linux-gnu.2.17")
    flags = (
        "-O2",
        "-fPIC",
        "-shared",
        f"-Wl,--version-script={versions}",
        "-Wl,-soname,libc.so",
        "-lpthread",
    )
    run(*compiler, *flags, source, "-o", folder / "libc.so")
    return folder
