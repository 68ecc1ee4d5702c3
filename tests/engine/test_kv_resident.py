"""Runs the tests of resident_kv.py in a process of their own: they measure its memory."""

import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).with_name("resident_kv.py")


@pytest.mark.slow
def test_resident_memory_of_keys_and_values_stays_within_the_promise() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
