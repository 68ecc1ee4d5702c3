"""Writes engine/backends/_abi.py from csrc/kernels.h: cffi's out-of-line ABI module, without a compiler.

    python scripts/make_abi.py [OUTPUT]

The result is committed, so that neither an install nor a start has to parse C; tests/repo/test_abi.py
compares it with a fresh one.
"""

import sys
from pathlib import Path

from cffi import FFI

ROOT = Path(__file__).resolve().parent.parent
HEADER = ROOT / "csrc" / "kernels.h"
MODULE = ROOT / "engine" / "backends" / "_abi.py"


def write_abi(output: Path) -> None:
    ffi = FFI()
    ffi.cdef(HEADER.read_text(encoding="utf-8"))
    ffi.set_source("shoal.engine.backends._abi", None)
    ffi.emit_python_code(str(output))


if __name__ == "__main__":
    write_abi(Path(sys.argv[1]) if len(sys.argv) > 1 else MODULE)
