"""AVX-VNNI on machines without it: the right instruction stands in the object, and the rest of the file, with
that one instruction emulated, gives the bits of the definition. On other architectures the file is empty.
"""

from __future__ import annotations

import platform
import re
import subprocess
from pathlib import Path

import pytest

from .harness import CSRC, FLAGS, ROOT

pytestmark = pytest.mark.slow

DRIVER = ROOT / "tests" / "arm" / "driver.c"
EMULATED = Path(__file__).with_name("avxvnni_emulated.c")

if platform.machine() == "x86_64":

    def test_the_encoding_is_that_of_avx_vnni(tmp_path):
        """VEX, which needs no AVX-512: EVEX begins with byte 62, AVX-512's registers are zmm and k."""
        compiled = tmp_path / "avxvnni.o"
        subprocess.run(["cc", *FLAGS, "-c", str(CSRC / "avxvnni.c"), "-o", str(compiled)], check=True)
        code = subprocess.run(
            ["objdump", "-d", "--insn-width=16", str(compiled)], check=True, capture_output=True, text=True
        ).stdout
        instructions = re.findall(r"^ *[0-9a-f]+:\t([0-9a-f ]+)\t(.*)$", code, re.MULTILINE)
        products = [words for _, words in instructions if "vpdpbusd" in words]
        assert len(instructions) > 1000
        assert len(products) > 100
        assert all(words.startswith("{vex} vpdpbusd") and words.count("%ymm") == 3 for words in products)
        assert not [words for code, words in instructions if code.startswith("62")]
        assert not [words for _, words in instructions if re.search(r"%(zmm|k\d)", words)]

    def test_the_arithmetic_around_it(tmp_path):
        """Random programs of the driver of tests/arm: every op and buffer, rows from 1 to 120."""
        driver, dispatch = tmp_path / "driver", tmp_path / "dispatch.o"
        # Sets that do not run here would take longer to compile than all the rest: scalar stands for them.
        others = [f"-Dshoal_kernels_{isa}=shoal_kernels_scalar" for isa in ("avxvnni", "avx512")]
        source = str(CSRC / "dispatch.c")
        subprocess.run(["cc", *FLAGS, *others, "-c", source, "-o", str(dispatch)], check=True)
        left_out = {"avx2.c", "avxvnni.c", "avx512.c", "dispatch.c"}
        sources = [path for path in sorted(CSRC.glob("*.c")) if path.name not in left_out]
        command = ["cc", *FLAGS, str(DRIVER), str(EMULATED), str(dispatch), *map(str, sources)]
        subprocess.run([*command, "-o", str(driver), "-lpthread", "-lm"], check=True)
        expected, got = (
            subprocess.run(
                [driver, isa, "2", "0", "0", "4"], check=True, capture_output=True, text=True
            ).stdout
            for isa in ("scalar", "avx2")
        )
        assert expected.count("\n") > 200
        assert got == expected
