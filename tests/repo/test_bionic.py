"""What csrc/ takes from the C library is declared for Android too: without that `make dist` cannot link."""

import re
import subprocess
from pathlib import Path

from shoal.engine.backends.native import library_path

HEADER = Path(__file__).resolve().parents[2] / "packaging" / "bionic.h"


def test_every_function_from_the_c_library_is_declared() -> None:
    symbols = subprocess.run(
        ["readelf", "-W", "--dyn-syms", library_path()], check=True, capture_output=True, text=True
    ).stdout
    # Functions of the compiler's own begin with underscores.
    taken = re.findall(r"GLOBAL +DEFAULT +UND +([a-z]\w*)", symbols)
    assert {"malloc", "pthread_create"} <= {*taken}
    text = HEADER.read_text(encoding="utf-8")
    assert [name for name in taken if not re.search(rf"\b{name}(\(| __builtin_)", text)] == []
