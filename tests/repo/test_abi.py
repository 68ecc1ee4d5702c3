"""The committed cffi module is the one that kernels.h gives today."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_abi_module_is_fresh(tmp_path: Path) -> None:
    fresh = tmp_path / "_abi.py"
    subprocess.run([sys.executable, ROOT / "scripts/make_abi.py", fresh], check=True, capture_output=True)
    committed = (ROOT / "engine/backends/_abi.py").read_text()
    assert fresh.read_text() == committed, "csrc/kernels.h changed: run `make abi`"
