"""Installs on this machine, as pip does them: the wheel, and the sdist with clang and without a compiler."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.models import smollm2_dir

from .conftest import LOGITS, install_sdist, run

pytestmark = [pytest.mark.dist, pytest.mark.slow]


def test_the_wheel_answers_in_a_clean_environment(clean: Path) -> None:
    shoal = clean.with_name("shoal")
    question = ("What is the capital of France?", "--temperature", "0", "-n", "16", "--stats")
    answered = run(shoal, "run", smollm2_dir(), *question)
    assert "Paris" in answered.stdout
    assert answered.stderr.startswith("[native (")


def test_every_instruction_set_of_the_wheel_gives_the_same_bits(
    clean: Path, model: Path, expected: str
) -> None:
    code = "from shoal.engine.backends.native import isa_names; print(*isa_names())"
    sets = run(clean, "-c", code).stdout.split()
    assert sets[0] == "scalar"
    lines = run(clean, LOGITS, model, *sets).stdout.splitlines()
    assert lines == [f"native ({isa}): {expected}" for isa in sets]


def test_the_sdist_builds_with_clang(clean: Path, model: Path, expected: str, tmp_path: Path) -> None:
    """As on a phone, whose compiler is clang."""
    install_sdist(clean, tmp_path, CC="clang-19")
    (line,) = run(clean, LOGITS, model, PYTHONPATH=str(tmp_path)).stdout.splitlines()
    assert line.startswith("native (")
    assert line.endswith(expected)
    comment = run("readelf", "-p", ".comment", tmp_path / "shoal" / "libshoal.so").stdout
    assert "clang version 19" in comment


def test_the_sdist_installs_without_a_compiler(clean: Path, model: Path, tmp_path: Path) -> None:
    install_sdist(clean, tmp_path, CC="no-such-compiler")
    assert not (tmp_path / "shoal" / "libshoal.so").exists()
    command = (clean, "-m", "shoal", "run", model, "Hello", "--raw", "-n", "2", "--stats")
    said = run(*command, PYTHONPATH=str(tmp_path)).stderr
    assert said.startswith("shoal: running on numpy: the C library is missing: install a C compiler")
    assert "[numpy" in said
